"""A new bitmap file: whole and durable before it has its name."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path

from incbak import durable, host
from incbak.bitmap import format as fmt
from incbak.bitmap.body import keep_in_place
from incbak.bitmap.format import UNTOUCHED, Flag, Slot
from incbak.bitmap.page_cache import page_cache_id
from incbak.errors import BitmapError
from incbak.fingerprint import Beat, Fingerprint


def create_file(path: Path, slot: Slot) -> Slot:
    """Make a preallocated, durable bitmap file with nothing marked; the flag is clear, its owner is this process.

    Returns its header: the newer copy, with the page cache that the file is in.
    """
    _start, coarse, end = fmt.layout(slot)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        keep_in_place(fd)
        os.posix_fallocate(fd, 0, end)
        os.pwrite(fd, bytes([UNTOUCHED]) * slot.regions, coarse)
        os.pwrite(fd, fmt.encode_beat(Beat(time.time_ns(), writes=slot.fingerprint.writes)), fmt.HEARTBEAT)
        slot = replace(slot, cache_id=page_cache_id(fd))
        other = replace(slot, sequence=slot.sequence + 1)
        for copy in (slot, other):
            os.pwrite(fd, fmt.encode(copy), copy.sequence % 2 * fmt.SECTOR)
        durable.commit(temporary, path)
        return other
    except FileExistsError as e:
        raise BitmapError(f"bitmap {slot.name} exists already") from e
    except OSError as e:
        raise BitmapError(
            f"cannot create bitmap {path}: {e.strerror}", hint="Free space in the state directory."
        ) from e
    finally:
        os.close(fd)
        temporary.unlink(missing_ok=True)


def new_slot(name: str, size: int, granularity: int, disk_uuid: bytes, fingerprint: Fingerprint, enabled: bool) -> Slot:
    """The first header of a bitmap that this process owns; `create_file` knows its page cache."""
    pid = os.getpid()
    return Slot(
        name=name,
        size=size,
        granularity=granularity,
        disk_uuid=disk_uuid,
        flags=Flag.ENABLED if enabled else Flag(0),
        sequence=2,
        cache_id=bytes(16),
        owner_pid=pid,
        owner_start=host.start_time(pid) or 0,
        created_ns=time.time_ns(),
        reason="",
        fingerprint=fingerprint,
        digest=bytes(32),
    )

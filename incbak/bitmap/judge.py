"""The one judgement of a bitmap: the table of the package docstring, row by row. Reads, and changes nothing.

Whoever opens a bitmap, lists it, or tells what is dirty asks `judge`: there is no second opinion. What it needs besides
the file is who the disk is and what its image is now; an image that is not known or cannot be read shows nothing.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import numpy as np

from incbak import host
from incbak.bitmap import format as fmt
from incbak.bitmap.bits import Bits
from incbak.bitmap.body import digest_of
from incbak.bitmap.continuity import OWN_WRITE_NS, bypassed, bypassed_in_a_power_cut, changed, set_up_anew
from incbak.bitmap.format import TOUCHED, UNTOUCHED, Flag, Slot
from incbak.bitmap.page_cache import of_one_boot, page_cache_id
from incbak.fingerprint import Beat, Fingerprint
from incbak.opening import open_regular
from incbak.reasons import Reason


class Found(StrEnum):
    """How a bitmap came to be what it is in this session."""

    CREATED = "created"
    CLEAN = "clean"
    RECOVERED = "recovered"
    COARSE = "coarse"
    PROVISIONAL = "provisional"
    """Clean, of a block device that was set up again since: used only after a sample was compared."""
    INVALID = "invalid"


@dataclass(frozen=True)
class Header:
    """The header of a file as it stands. ``both``: both slots verify. ``length``: that of the file.

    ``until_ns``: as in `Beat`. ``cache_id``: of the page cache that the file was read from.
    """

    slot: Slot
    both: bool
    beat: Beat | None
    length: int
    until_ns: int
    cache_id: bytes


def read_header(path: Path) -> Header | Reason:
    """The newest slot, or why there is none; never raises for what the file holds."""
    try:
        fd = open_regular(path, os.O_RDONLY)  # an engine may have named it
        try:
            raw, length = os.pread(fd, fmt.HEADER, 0), os.fstat(fd).st_size
            cache = page_cache_id(fd)
        finally:
            os.close(fd)
    except OSError:
        return Reason.HEADER
    slot, both = fmt.newest(raw[: 2 * fmt.SECTOR])
    if isinstance(slot, Reason):
        return slot
    raw = raw.ljust(fmt.HEADER, b"\0")
    beat = fmt.decode_beat(raw[fmt.HEARTBEAT : fmt.HEARTBEAT + fmt.BEAT_SIZE])
    until_ns, busy = fmt.decode_note(raw[fmt.NOTE : fmt.NOTE + fmt.NOTE_SIZE])
    return Header(slot, both, beat, length, until_ns + OWN_WRITE_NS if busy else until_ns, cache)


def said_invalid(slot: Slot) -> Reason | None:
    """The reason in a header that says invalid."""
    if not slot.flags & Flag.INVALID:
        return None
    return Reason(slot.reason) if slot.reason in set(Reason) else Reason.FORMAT


def why_put_aside(path: Path) -> Reason:
    """Return why the file ``path`` was renamed to ``*.invalid``: it is damaged, or its header could not be written."""
    found = read_header(path)
    if isinstance(found, Reason):
        return found
    if found.length != fmt.layout(found.slot)[2]:
        return Reason.HEADER
    return said_invalid(found.slot) or Reason.TRACKING_FAILED


def judge(
    header: Header, name: str, disk_uuid: bytes, disk: Fingerprint | None, *, sampling: bool = False
) -> Found | Reason:
    """Return how the bitmap may be believed, or why not, apart from what `judge_body` finds.

    ``sampling``: the caller believes what is `Found.PROVISIONAL` only after a sample.
    """
    slot = header.slot
    if reason := said_invalid(slot):
        return reason
    if slot.name != name or slot.disk_uuid != disk_uuid:
        return Reason.WRONG_DISK
    if disk is None:
        return Reason.UNPROVEN
    if slot.size != disk.size:
        return Reason.RESIZED
    if header.length != fmt.layout(slot)[2]:
        return Reason.HEADER
    if slot.flags & Flag.CLEAN:
        if not header.both:
            return Reason.HEADER
        if sampling and set_up_anew(slot.fingerprint, disk):
            return Found.PROVISIONAL
        return changed(slot.fingerprint, disk) or Found.CLEAN
    return _unclean(header, disk)


def _unclean(header: Header, disk: Fingerprint) -> Found | Reason:
    slot, closed = header.slot, header.slot.fingerprint
    same_boot = of_one_boot(slot.cache_id, header.cache_id)
    if closed.inode != disk.inode:
        return Reason.DISK_CHANGED if same_boot else Reason.UNCLEAN_SHUTDOWN
    beat = header.beat or Beat(closed.mtime_ns, closed.mtime_ns, closed.ctime_ns, closed.writes)
    beat = beat._replace(until_ns=header.until_ns)
    if slot.cache_id == header.cache_id:
        return bypassed(beat, disk, time.time_ns()) or Found.RECOVERED
    reason = bypassed_in_a_power_cut(beat, closed, disk, host.boot_began_ns(), time.time_ns())
    return (Reason.UNPROVEN if reason and same_boot else reason) or Found.COARSE


def judge_body(slot: Slot, found: Found, body: Bits, coarse: Bits) -> Reason | None:
    """Whether bits and coarse map are whole. ``body``: all behind the header; ``coarse``: a byte for each region."""
    if found in (Found.CLEAN, Found.PROVISIONAL):
        return None if digest_of(body) == slot.digest else Reason.DIGEST
    return None if bool(((coarse == TOUCHED) | (coarse == UNTOUCHED)).all()) else Reason.COARSE_MAP


def read_body(path: Path, slot: Slot) -> tuple[Bits, Bits]:
    """The body and the coarse map of a file that nobody has open for more than looking. Raises `OSError`."""
    _start, coarse, end = fmt.layout(slot)
    with open(open_regular(path, os.O_RDONLY), "rb") as f:
        f.seek(fmt.HEADER)
        body = np.frombuffer(f.read(end - fmt.HEADER), dtype=np.uint8)
    if len(body) != end - fmt.HEADER:
        raise OSError(f"{path} is not a whole bitmap")
    at = coarse - fmt.HEADER
    return body, body[at : at + slot.regions]

"""What changes with every write to a block device, whoever writes and through whatever: the kernel's counts.

A block device has no time of change. The kernel counts the sectors that were written and discarded, within one boot and
one set-up of the device (``diskseq``); and a device may show the bytes of another device or of a file, where writes do
not count for it. So of each these are told:

- a whole device: its counts;
- a partition: its start and its counts, and what was written to the whole device but through no partition. The kernel
  counts a partition's writes for the whole device too, so that is the whole device's count less the counts of all
  partitions: it never decreases, and what is written to a neighbour does not change it;
- a loop device: offset and limit, and of the file behind it device, inode, size, ``mtime`` and ``ctime``; of a device
  behind it the same as here, and so on. Neighbouring partitions of one loop device do change that.

Counts and times are true when all that was written is on the device: see `settled`. What stands below device-mapper and
md is **not** looked at: a physical volume's counts move with each neighbour of a logical volume, and nothing tells what
was written where. Who writes to a physical volume or a member of an array directly is not seen here.

What is not known is told as nothing at all, and equals nothing: a device whose writes are not counted
(``queue/iostats``), a loop device whose file this process cannot find or whose times show nothing (`incbak.times`),
counts that do not stand still.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import time
from pathlib import Path
from typing import NamedTuple

from incbak import host, times
from incbak.opening import open_image

_DEPTH, _READINGS = 16, 100
_SETTLE_SECONDS = 3.0
_SECOND, _TICK = 1_000_000_000, 20_000_000
_SYS = Path("/sys/dev/block")
_LOOP_GET_STATUS64, _LOOP_INFO = 0x4C05, struct.Struct("=5Q")
_LOOP_INFO_SIZE = 232
_WRITTEN, _DISCARDED = 6, 13  # sectors; a flush of nothing is counted as a request
_Counts = tuple[int, ...]


class _Told(NamedTuple):
    """``setup``: what a new set-up changes; ``counts``: what a write changes; ``latest_ns``: newest time of a file."""

    setup: str
    counts: str
    latest_ns: int = 0


class _UnknownError(Exception):
    """Something that has to be compared cannot be told."""


def writes(path: Path) -> str:
    """Return ``boot:set-ups;counts`` of a block device; nothing of what is none, or where anything is not known."""
    told = _look(path)
    return f"{host.boot_id().hex()}:{told.setup};{told.counts}" if told else ""


def settled(path: Path) -> str:
    """Return the same when all that was written is on the device, and any later write shows. Raises `OSError`."""
    fd = open_image(path, os.O_RDONLY)  # an engine may have named it
    try:
        if not stat.S_ISBLK(os.fstat(fd).st_mode):
            return ""
        os.fdatasync(fd)
        opened = Path(f"/proc/self/fd/{fd}")
        settle(opened)
        return writes(opened)
    finally:
        os.close(fd)


def settle(path: Path) -> None:
    """Wait until no time of a file below the device can come again; who writes all the time is not waited for."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while (told := _look(path)) and may_come_again(told.latest_ns, time.time_ns()) and time.monotonic() < deadline:
        time.sleep(0.002)


def may_come_again(time_ns: int, now_ns: int) -> bool:
    """Whether a write after ``now_ns`` could get the same time. A clock that was set back is no reason."""
    return time_ns - _SECOND <= now_ns <= time_ns + grain(time_ns)


def grain(time_ns: int) -> int:
    """Return how far a file's time may lag behind the clock: a tick of the kernel, or the grain of the file system."""
    return 2 * _SECOND if time_ns % _SECOND == 0 else _TICK


def _look(path: Path) -> _Told | None:
    try:
        return _device(path, 0)
    except (OSError, ValueError, IndexError, _UnknownError):
        return None


def _device(path: Path, depth: int) -> _Told:
    number = path.stat()
    if not stat.S_ISBLK(number.st_mode) or depth > _DEPTH:
        raise _UnknownError
    place = (_SYS / f"{os.major(number.st_rdev)}:{os.minor(number.st_rdev)}").resolve(strict=True)
    whole = place if (place / "diskseq").exists() else place.parent
    if _number(whole / "queue" / "iostats") != 1:
        raise _UnknownError
    setup, counts = str(_number(whole / "diskseq")), _text(_counts(place))
    if place != whole:
        setup, counts = f"{setup}+{_number(place / 'start')}", f"{counts}+{_text(_direct(whole))}"
    if not (whole / "loop").is_dir():
        return _Told(setup, counts)
    below = _behind(path, whole, depth)
    return _Told(f"{setup}<{below.setup}", f"{counts}<{below.counts}", below.latest_ns)


def _direct(whole: Path) -> _Counts:
    """Return what was written to a device, but through none of its partitions: two readings in a row that are equal."""
    before: tuple[dict[str, _Counts], _Counts] | None = None
    for _ in range(_READINGS):
        parts = {p.parent.name: _counts(p.parent) for p in whole.glob("*/partition")}
        if (now := (parts, _counts(whole))) == before:
            return tuple(count - sum(each) for count, *each in zip(now[1], *parts.values(), strict=True))
        before = now
    raise _UnknownError


def _behind(path: Path, whole: Path, depth: int) -> _Told:
    """Return what is told of the file or device behind a loop device, if it is where the kernel says."""
    fd = open_image(path, os.O_RDONLY)
    try:
        status = bytearray(_LOOP_INFO_SIZE)
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, status)
    finally:
        os.close(fd)
    device, inode, _, offset, limit = _LOOP_INFO.unpack_from(status)
    name = Path((whole / "loop" / "backing_file").read_text(encoding="utf-8", errors="surrogateescape")[:-1])
    found = name.stat()
    if (found.st_dev, found.st_ino) != (device, inode):
        raise _UnknownError
    if stat.S_ISBLK(found.st_mode):
        below = _device(name, depth + 1)
        return below._replace(setup=f"{offset},{limit}@{below.setup}")
    if not times.are_kept(name):
        raise _UnknownError
    changes = (found.st_mtime_ns, found.st_ctime_ns)
    counts = ",".join(map(str, (found.st_size, *changes)))
    return _Told(f"{offset},{limit}@{device}/{inode}", counts, max(changes))


def _counts(place: Path) -> _Counts:
    fields = (place / "stat").read_text(encoding="ascii").split()
    return tuple(int(fields[i]) for i in (_WRITTEN, _DISCARDED) if i < len(fields))


def _text(counts: _Counts) -> str:
    return ":".join(map(str, counts))


def _number(place: Path) -> int:
    return int(place.read_text(encoding="ascii"))

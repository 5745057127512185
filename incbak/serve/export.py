"""A tracked disk as an NBD export: the path of every guest request."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from itertools import islice

from incbak.bitmap import bits as kernels
from incbak.bitmap.file import State
from incbak.nbd.export import Device
from incbak.serve.memory_bitmap import AnyBitmap
from incbak.serve.tracker import TrackedDisk

ALLOCATION = "base:allocation"
DIRTY = "qemu:dirty-bitmap:"
_HOLE, _ZERO, _IS_DIRTY = 1, 2, 1
_EXTENTS = 4096
"""Extents told at once."""
_FIRST_WINDOW = 64
_WINDOW = 1 << 14
"""Bytes of packed bits looked at in one step."""
PIECE = 256 << 20
"""Bytes that a trim or a write of zeroes changes inside the gate at once: so long may a transaction wait for it."""
CACHE_LIMIT = 1 << 30
"""Bytes that one request prefetches."""
READ_ONLY_SUFFIX = ":ro"


class DiskExport:
    """One disk under its own name. Bitmaps that are invalid are not on offer: they would lie."""

    multi_conn = True

    def __init__(self, tracked: TrackedDisk, *, read_only: bool = False) -> None:
        """With ``read_only`` it is another export of the disk, by the name of ``vda:ro``, that takes no writes."""
        self.tracked = tracked
        self.name = tracked.name + (READ_ONLY_SUFFIX if read_only else "")
        self.description = f"disk {tracked.name}" + (", read-only" if read_only else "")
        self.read_only = tracked.read_only or read_only

    @property
    def size(self) -> int:
        """As it is now; a connection keeps the size that it began with."""
        return self.tracked.size

    def contexts(self) -> list[str]:
        """``base:allocation`` and one context per valid bitmap."""
        valid = [b.name for b in list(self.tracked.bitmaps.values()) if b.state is not State.INVALID]
        return [ALLOCATION, *(DIRTY + name for name in valid)]

    def open(self) -> Device:
        """One connection's way in."""
        return TrackedDevice(self.tracked, read_only=self.read_only)


class TrackedDevice:
    """One connection: owns a slot of the disk's gate. See `incbak.nbd.export.Device`.

    With ``job`` it is that of the job that has the disk as its target, else raises `OSError` while there is one.
    """

    def __init__(self, tracked: TrackedDisk, *, read_only: bool = False, job: bool = False) -> None:
        self.tracked = tracked
        self.size, self.read_only = tracked.size, read_only or tracked.read_only
        disk = tracked.disk
        self.read_nowait = disk.read_nowait
        self._disk = disk
        self._guest = not job and not self.read_only
        if self._guest:
            tracked.let_in()
        self._slot = tracked.gate.slot()
        self.rest = tracked.rest

    def close(self) -> None:
        """The connection is gone."""
        self.tracked.gate.forget(self._slot)
        if self._guest:
            self.tracked.let_out()

    def may_block(self, offset: int, length: int) -> bool:
        """Whether a write there first has to make a region durable, or to save old content."""
        tracked = self.tracked
        return not tracked.settled.holds(offset, length) and tracked.must_wait(offset, length)

    def write(self, buf: memoryview, offset: int) -> None:
        """Record, save, write, in this order."""
        slot = self._slot
        try:
            if slot.acquire(False):
                try:
                    self.tracked.before_write(offset, len(buf))
                    self._disk.write(buf, offset)
                finally:
                    slot.release()
            else:
                with self.tracked.gate.joined():
                    self.tracked.before_write(offset, len(buf))
                    self._disk.write(buf, offset)
        except OSError as e:
            self.tracked.on_error("write", e)
            raise

    def read_into(self, buf: memoryview, offset: int) -> None:
        """What could not be read without waiting."""
        try:
            self._disk.read_into(buf, offset)
        except OSError as e:
            self.tracked.on_error("read", e)
            raise

    def flush(self) -> None:
        """Covers the writes of all connections."""
        try:
            self._disk.flush()
        except OSError as e:
            self.tracked.on_error("write", e)
            raise

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Recorded as any write; ``fast``: as the storage can, or not at all."""

        def change(at: int, part: int) -> None:
            if not fast:
                self._disk.write_zeroes(at, part, unmap=unmap)
            elif not self._disk.zero_fast(at, part, unmap=unmap):
                raise OSError(errno.EOPNOTSUPP, "the storage has no fast zeroes")

        self._in_pieces(offset, length, change)

    def trim(self, offset: int, length: int) -> None:
        """Recorded as any write."""
        self._in_pieces(offset, length, self._disk.trim)

    def _in_pieces(self, offset: int, length: int, change: Callable[[int, int], None]) -> None:
        """However long it is, nobody waits for more than a piece of it at the gate."""
        try:
            self._pieces(offset, length, change)
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                self.tracked.on_error("write", e)
            raise

    def _pieces(self, offset: int, length: int, change: Callable[[int, int], None]) -> None:
        end, spent = offset + length, 0.0
        if length > PIECE:
            with self.tracked.gate.joined():
                self.tracked.announce(offset, length)
        while offset < end:
            part = min(PIECE, end - offset)
            with self.tracked.gate.joined():
                began = time.monotonic()
                self.tracked.before_write(offset, part, spent)
                spent += time.monotonic() - began
                change(offset, part)
            offset += part

    def cache(self, offset: int, length: int) -> None:
        """Read, and drop what was read: at most `CACHE_LIMIT`, for it is a hint."""
        buffer = memoryview(bytearray(min(length, 1 << 20)))
        end = offset + min(length, CACHE_LIMIT)
        while offset < end:
            part = buffer[: end - offset]
            self.read_into(part, offset)
            offset += len(part)

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        """(length, flags) from ``offset``: a prefix of the range, one extent to ``limit``."""
        if offset + length > self.tracked.size:
            raise OSError(errno.EINVAL, f"disk {self.tracked.name} has {self.tracked.size} bytes now")
        if context == ALLOCATION:
            found = islice(self._disk.extents(offset, length), min(limit, _EXTENTS))
            return [(e.length, (_HOLE if e.hole else 0) | (_ZERO if e.zero else 0)) for e in found]
        with self.tracked.reading:
            bitmap = self.tracked.bitmaps.get(context.removeprefix(DIRTY))
            if bitmap is None or bitmap.state is State.INVALID:
                raise OSError(errno.EIO, f"there is no valid bitmap for {context}")
            return dirty_status(bitmap, offset, length, min(limit, _EXTENTS))


def dirty_status(bitmap: AnyBitmap, offset: int, length: int, limit: int) -> list[tuple[int, int]]:
    """The range in dirty (1) and clean (0) stretches, at most ``limit`` at once; in bounded memory at any length."""
    granularity, end = bitmap.granularity, offset + length
    found: list[tuple[int, int]] = []
    told = offset
    for start, stop in _dirty_stretches(bitmap, offset // granularity, -(-end // granularity)):
        start, stop = max(start * granularity, offset), min(stop * granularity, end)
        if start > told:
            found.append((start - told, 0))
        found.append((stop - start, _IS_DIRTY))
        told = stop
        if len(found) >= limit:
            return found[:limit]
    if told < end:
        found.append((end - told, 0))
    return found


def _dirty_stretches(bitmap: AnyBitmap, first: int, end: int) -> Iterator[tuple[int, int]]:
    """Of the clusters from ``first`` to before ``end``, runs that are dirty: (first, end), none adjacent.

    The bits are looked at in windows that grow, since many clients want to know of the first stretch only.
    """
    begin = stop = first
    low, size = first >> 3, _FIRST_WINDOW
    while low < kernels.bytes_for(end):
        base, window = low << 3, bitmap.packed(low, low + size)
        low, size = low + size, min(2 * size, _WINDOW)
        for run, count in kernels.runs(window, min(len(window) << 3, end - base)).tolist():
            start, upto = max(base + run, first), base + run + count
            if upto <= first:
                continue
            if start != stop:
                if stop > begin:
                    yield begin, stop
                begin = start
            stop = upto
    if stop > begin:
        yield begin, stop

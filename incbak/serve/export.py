"""A tracked disk as an NBD export: the path of every guest request."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import numpy as np

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


class DiskExport:
    """One disk under its own name. Bitmaps that are invalid are not on offer: they would lie."""

    multi_conn = True

    def __init__(self, tracked: TrackedDisk) -> None:
        self.tracked = tracked
        self.name = tracked.name
        self.description = f"disk {tracked.name}"
        self.read_only = tracked.read_only

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
        return TrackedDevice(self.tracked)


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
        """Recorded as any write; ``fast`` is refused, since no file system promises it."""
        if fast:
            raise OSError(errno.EOPNOTSUPP, "fast zeroes are not on offer")
        try:
            with self.tracked.gate.joined():
                self.tracked.before_write(offset, length)
                self._disk.write_zeroes(offset, length, unmap=unmap)
        except OSError as e:
            self.tracked.on_error("write", e)
            raise

    def trim(self, offset: int, length: int) -> None:
        """Recorded as any write."""
        try:
            with self.tracked.gate.joined():
                self.tracked.before_write(offset, length)
                self._disk.trim(offset, length)
        except OSError as e:
            self.tracked.on_error("write", e)
            raise

    def cache(self, offset: int, length: int) -> None:
        """Read, and drop what was read."""
        buffer = memoryview(bytearray(min(length, 1 << 20)))
        end = offset + length
        while offset < end:
            part = buffer[: end - offset]
            self.read_into(part, offset)
            offset += len(part)

    def status(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
        """(length, flags) from ``offset``: a prefix of the range at least one extent long."""
        if offset + length > self.tracked.size:
            raise OSError(errno.EINVAL, f"disk {self.tracked.name} has {self.tracked.size} bytes now")
        if context == ALLOCATION:
            return list(self._allocation(offset, length))
        with self.tracked.reading:
            bitmap = self.tracked.bitmaps.get(context.removeprefix(DIRTY))
            if bitmap is None or bitmap.state is State.INVALID:
                raise OSError(errno.EIO, f"there is no valid bitmap for {context}")
            return dirty_status(bitmap, offset, length)

    def _allocation(self, offset: int, length: int) -> Iterator[tuple[int, int]]:
        for number, extent in enumerate(self._disk.extents(offset, length)):
            if number == _EXTENTS:
                return
            yield extent.length, (_HOLE if extent.hole else 0) | (_ZERO if extent.zero else 0)


def dirty_status(bitmap: AnyBitmap, offset: int, length: int) -> list[tuple[int, int]]:
    """The range in dirty (1) and clean (0) stretches, at most so many at once."""
    granularity = bitmap.granularity
    first, last = offset // granularity, (offset + length - 1) // granularity
    base = first & ~7
    window: kernels.Bits = np.array(bitmap.snapshot()[first >> 3 : (last >> 3) + 1])
    found: list[tuple[int, int]] = []
    at, end = offset, offset + length
    for run, count in kernels.runs(window, last + 1 - base)[: _EXTENTS // 2].tolist():
        start = max((base + run) * granularity, offset)
        stop = min((base + run + count) * granularity, end)
        if stop <= at:
            continue
        if start > at:
            found.append((start - at, 0))
        found.append((stop - start, _IS_DIRTY))
        at = stop
    if at < end and len(found) < _EXTENTS - 1:
        found.append((end - at, 0))
    return found

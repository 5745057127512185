"""A disk whose writes are recorded before they are issued. The order of the steps is in the package docstring."""

from __future__ import annotations

import errno
import logging
import mmap
import threading
from collections.abc import Iterable

from incbak.bitmap.file import State
from incbak.bitmap.store import BitmapStore
from incbak.disk.base import Disk
from incbak.errors import BitmapError, DurabilityError
from incbak.serve.cbw import CopyBeforeWrite
from incbak.serve.gate import Gate
from incbak.serve.memory_bitmap import AnyBitmap

log = logging.getLogger(__name__)

UNIT_SHIFT = 16
MAP_LIMIT = 1 << 26
"""Entries of a settled map, one byte each, in memory only where touched: 4 TiB in units of 64 KiB."""


class SettledMap:
    """One byte per unit of the disk: not 0 when a write inside that unit has nothing left to record or to save.

    Bytes go from 0 to 1 only; to forget, the disk takes a new map while it is drained. A disk with more than
    `MAP_LIMIT` units has none, and looks at each bitmap at each write.
    """

    def __init__(self, size: int, granularities: Iterable[int]) -> None:
        self.shift = min([UNIT_SHIFT, *(g.bit_length() - 1 for g in granularities)])
        units = -(-size >> self.shift)
        self.bytes = mmap.mmap(-1, max(units, 1)) if units <= MAP_LIMIT else None

    def holds(self, offset: int, length: int) -> bool:
        """Whether every unit that the range touches is settled; ``length`` > 0."""
        if self.bytes is None:
            return False
        first, last = offset >> self.shift, (offset + length - 1) >> self.shift
        return self.bytes[first] != 0 if first == last else self.bytes.find(b"\0", first, last + 1) < 0

    def settle(self, offset: int, length: int) -> None:
        """Every unit that the range touches is settled; the caller is inside the gate."""
        if self.bytes is not None:
            first, last = offset >> self.shift, (offset + length - 1) >> self.shift
            self.bytes[first : last + 1] = b"\1" * (last + 1 - first)


class TrackedDisk:
    """One exported disk, its bitmaps, and the jobs that copy before write.

    `bitmaps`, `settled` and the attached copies change only while `gate` is drained (by `refresh`), except that a
    bitmap whose record cannot be made good is dropped from the recording ones at once, durably invalid.
    """

    def __init__(self, name: str, disk: Disk, store: BitmapStore | None = None) -> None:
        self.name, self.disk, self.store = name, disk, store
        self.size, self.read_only = disk.size, disk.read_only
        self.gate = Gate(name)
        self.bitmaps: dict[str, AnyBitmap] = {}
        self.busy: dict[str, str] = {}
        """Bitmaps that a job uses, with the job's id."""
        self.reading = threading.Lock()
        """Held while a bitmap that may be removed is read, and while a removed one is closed."""
        self.settled = SettledMap(self.size, ())
        self._recording: tuple[AnyBitmap, ...] = ()
        self._shadows: tuple[AnyBitmap, ...] = ()
        self._copies: tuple[CopyBeforeWrite, ...] = ()
        self._lock = threading.Lock()

    # -- while drained --------------------------------------------------------------------------------------------

    def refresh(self) -> SettledMap:
        """Take account of changed bitmaps and copies. The gate is drained.

        Returns the old map: let it go after the drain, for that takes time.
        """
        old = self.settled
        valid = [b for b in self.bitmaps.values() if b.enabled and b.state is not State.INVALID]
        self._recording = (*valid, *self._shadows)
        finest = [*(b.granularity for b in self._recording), *(c.granularity for c in self._copies)]
        self.settled = SettledMap(self.size, finest)
        return old

    def attach(self, copy: CopyBeforeWrite | None, shadow: AnyBitmap | None = None) -> None:
        """Copy before write from now on, and record in ``shadow`` too. The gate is drained; call `refresh` after."""
        self._copies += (copy,) if copy else ()
        self._shadows += (shadow,) if shadow else ()

    def detach(self, copy: CopyBeforeWrite | None, shadow: AnyBitmap | None = None) -> None:
        """The reverse of `attach`."""
        self._copies = tuple(c for c in self._copies if c is not copy)
        self._shadows = tuple(b for b in self._shadows if b is not shadow)

    # -- inside the gate ------------------------------------------------------------------------------------------

    def must_wait(self, offset: int, length: int) -> bool:
        """Whether `before_write` may take long: a first write to a region, or old content to be saved."""
        first, last = offset >> 26, (offset + length - 1) >> 26
        return any(b.known.find(0, first, last + 1) >= 0 for b in self._recording) or any(
            c.may_wait(offset, length) for c in self._copies
        )

    def before_write(self, offset: int, length: int, spent: float = 0.0) -> None:
        """Record and save all that a write of ``length`` > 0 bytes at ``offset`` asks for.

        Raises `OSError` when the write must not go out. The caller is inside the gate, and writes afterwards. A write
        that comes in pieces says how many seconds it has ``spent`` here: the bound on saving is for all of it.
        """
        if self.settled.holds(offset, length):
            return
        for bitmap in self._recording:
            self._record(bitmap, offset, length)
        for copy in self._copies:
            copy.before_write(offset, length, spent)
        self.settled.settle(offset, length)

    def announce(self, offset: int, length: int) -> None:
        """A write of that range will come in pieces: its regions are made durable by one sync, not by one for each.

        Nothing is recorded by it. Raises as `before_write`; the caller is inside the gate.
        """
        for bitmap in self._recording:
            self._record(bitmap, offset, length, mark=False)

    def _record(self, bitmap: AnyBitmap, offset: int, length: int, *, mark: bool = True) -> None:
        """Bits before write. What cannot be recorded makes the bitmap durably invalid, or fails the write."""
        try:
            bitmap.touch(offset, length)
            if mark:
                bitmap.set_bits(offset, length)
        except (BitmapError, DurabilityError, OSError) as e:
            if bitmap.state is not State.INVALID:
                log.error("disk %s: write refused: bitmap %s: %s", self.name, bitmap.name, e)
                raise OSError(errno.EIO, f"cannot record a write in bitmap {bitmap.name}") from e
            log.error("disk %s: bitmap %s is invalid from now on: %s", self.name, bitmap.name, e)
            with self._lock:
                self._recording = tuple(b for b in self._recording if b is not bitmap)

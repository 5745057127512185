"""A disk whose writes are recorded before they are issued. The order of the steps is in the package docstring."""

from __future__ import annotations

import errno
import logging
import mmap
import threading
import time
from collections.abc import Callable, Iterable

from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.format import BUSY
from incbak.bitmap.store import BitmapStore
from incbak.disk.base import Disk
from incbak.errors import BitmapError, DurabilityError
from incbak.serve.cbw import CopyBeforeWrite
from incbak.serve.gate import Gate
from incbak.serve.memory_bitmap import AnyBitmap, MemoryBitmap
from incbak.serve.schema import QmpError

log = logging.getLogger(__name__)

UNIT_SHIFT = 16
NOTED_NS = 20_000_000
"""For how long a note in the bitmaps' files says that this process writes."""
MAP_LIMIT = 1 << 26
"""Entries of a settled map, one byte each, in memory only where touched: 4 TiB in units of 64 KiB."""


class SettledMap:
    """One byte per unit of the disk: not 0 when a write inside that unit has nothing left to record or to save.

    Bytes go from 0 to 1 only; to forget, the disk takes a new map while it is drained. A disk with more than
    `MAP_LIMIT` units has none, and looks at each bitmap at each write.

    Clients that came when the disk had ``served`` bytes may still write where it ends no more: what is not wholly
    within ``size`` is never settled, so that such a write is looked at and refused.
    """

    def __init__(self, size: int, granularities: Iterable[int], served: int = 0) -> None:
        self.shift = min([UNIT_SHIFT, *(g.bit_length() - 1 for g in granularities)])
        units = -(-max(size, served) >> self.shift)
        self._within = size >> self.shift if served > size else units
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
            first, end = offset >> self.shift, min(((offset + length - 1) >> self.shift) + 1, self._within)
            if first < end:
                self.bytes[first:end] = b"\1" * (end - first)


class TrackedDisk:
    """One exported disk, its bitmaps, and the jobs that copy before write.

    `bitmaps`, `settled` and the attached copies change only while `gate` is drained (by `refresh`), except that a
    bitmap whose record cannot be made good is dropped from the recording ones at once, durably invalid.
    """

    def __init__(self, name: str, disk: Disk, store: BitmapStore | None = None) -> None:
        self.name, self.disk, self.store = name, disk, store
        self.size, self.read_only = disk.size, disk.read_only
        self._served = self.size
        """The most that it ever had: clients that came then may believe in it still."""
        self.gate = Gate(name)
        self.bitmaps: dict[str, AnyBitmap] = {}
        self.busy: dict[str, str] = {}
        """Bitmaps that a job uses, with the job's id."""
        self.on_error: Callable[[str, OSError], None] = lambda operation, error: None
        """Told of each guest's request that fails."""
        self.reading = threading.Lock()
        """Held while a bitmap that may be removed is read, and while a removed one is closed."""
        self.settled = SettledMap(self.size, ())
        self.writers = 0
        """Guests that are connected and may write."""
        self.written_by: str | None = None
        """The job that has this disk as its target; then there are no such guests."""
        self._recording: tuple[AnyBitmap, ...] = ()
        self._shadows: tuple[AnyBitmap, ...] = ()
        self._copies: tuple[CopyBeforeWrite, ...] = ()
        self._noted: tuple[Bitmap, ...] = ()
        self._lock = threading.Lock()
        self._until_ns = 0
        """Every bitmap's file says that writes may go out until then; 0: that none is in flight."""

    # -- who may write --------------------------------------------------------------------------------------------

    def let_in(self) -> None:
        """A guest that may write has come. Raises `OSError` while the disk is the target of a job."""
        with self._lock:
            if self.written_by is not None:
                raise OSError(errno.EBUSY, f"job {self.written_by} writes to disk {self.name}")
            self.writers += 1

    def let_out(self) -> None:
        """It is gone."""
        with self._lock:
            self.writers -= 1

    def take(self, job: str) -> None:
        """Keep guests out, for ``job`` writes here. Raises `QmpError` when some are in, or another job does so."""
        with self._lock:
            if self.written_by is not None:
                raise QmpError(f"Node '{self.name}' is busy: block device is in use by block job: backup")
            if self.writers:
                raise QmpError(f"Node '{self.name}' is busy: NBD clients that may write: {self.writers}")
            self.written_by = job

    def release(self) -> None:
        """Let guests in again."""
        with self._lock:
            self.written_by = None

    # -- while drained --------------------------------------------------------------------------------------------

    def refresh(self) -> SettledMap:
        """Take account of changed bitmaps and copies. The gate is drained.

        Returns the old map: let it go after the drain, for that takes time.
        """
        old = self.settled
        valid = [b for b in self.bitmaps.values() if b.enabled and b.state is not State.INVALID]
        self._recording = (*valid, *self._shadows)
        finest = [*(b.granularity for b in self._recording), *(c.granularity for c in self._copies)]
        self.settled = SettledMap(self.size, finest, self._served)
        self._noted = tuple(b for b in self.bitmaps.values() if isinstance(b, Bitmap) and b.state is not State.CLOSED)
        self._until_ns = 0
        return old

    @property
    def copied(self) -> bool:
        """Whether a job has a point in time of this disk."""
        return bool(self._copies)

    def resize(self, size: int) -> SettledMap:
        """Another size, as `Disk.resize`; bitmaps in memory with it, those in files are invalid already. As `refresh`.

        The gate is drained, and no job has a point in time of the disk. Raises `OSError`; then nothing has changed.
        """
        self.disk.resize(size)
        with self.reading:
            self.size = size
            self._served = max(self._served, size)
            for bitmap in self.bitmaps.values():
                if isinstance(bitmap, MemoryBitmap):
                    bitmap.resize(size)
        return self.refresh()

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
        if offset + length > self.size:
            return True
        first, last = offset >> 26, (offset + length - 1) >> 26
        return any(b.known.find(0, first, last + 1) >= 0 for b in self._recording) or any(
            c.may_wait(offset, length) for c in self._copies
        )

    def before_write(self, offset: int, length: int, spent: float = 0.0) -> None:
        """Record and save all that a write of ``length`` > 0 bytes at ``offset`` asks for.

        Raises `OSError` when the write must not go out. The caller is inside the gate, and writes afterwards. A write
        that comes in pieces says how many seconds it has ``spent`` here: the bound on saving is for all of it. Call
        `rest` some time after it.
        """
        if self._noted:
            now = time.time_ns()
            if not 0 < self._until_ns - now <= NOTED_NS:
                self._note(now + NOTED_NS | BUSY)
                self._until_ns = now + NOTED_NS
        if self.settled.holds(offset, length):
            return
        self._check(offset, length)
        for bitmap in self._recording:
            self._record(bitmap, offset, length)
        for copy in self._copies:
            copy.before_write(offset, length, spent)
        self.settled.settle(offset, length)

    def rest(self, waiting: Callable[[int], object] = lambda _milliseconds: ()) -> None:
        """Note that no write is in flight, if so: a later change of the image is another program's.

        The caller is outside the gate, and has written, or is about to tell a client so. A write that begins meanwhile
        may find no note of it, and is taken for another program's if we are killed within it. ``waiting``: ``poll`` of
        the caller's client. Where its next request has come already, nothing is at rest, and nothing is noted.
        """
        if self._until_ns and not waiting(0):
            self.gate.while_quiet(self._note_rest)

    def _note_rest(self) -> None:
        self._note(time.time_ns() & ~BUSY)
        self._until_ns = 0

    def _note(self, word: int) -> None:
        for bitmap in self._noted:
            bitmap.note_writes(word)

    def _check(self, offset: int, length: int) -> None:
        """A client that came when the disk was larger may ask for what is gone."""
        if offset + length > self.size:
            raise OSError(errno.ENOSPC, f"disk {self.name} has {self.size} bytes now")

    def announce(self, offset: int, length: int) -> None:
        """A write of that range will come in pieces: its regions are made durable by one sync, not by one for each.

        Nothing is recorded by it. Raises as `before_write`; the caller is inside the gate.
        """
        self._check(offset, length)
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

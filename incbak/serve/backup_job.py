"""``blockdev-backup``: copies the clusters of one point in time of a disk to a target, while the guest goes on.

The bitmap after each end, for ``bitmap-mode`` (QEMU's test 257 has the same table). ``since`` is what was written after
the point in time; the bitmap itself goes on recording throughout, so that it is a superset at every moment, whatever
kills the process:

==============  =============================  ====================================================
mode            after success                  after failure or cancel
==============  =============================  ====================================================
``never``       untouched                      untouched
``on-success``  ``since``                      untouched
``always``      ``since``                      ``since``, and what was not copied or the target
                                               refused (once it and the disk have flushed all else;
                                               otherwise untouched)
==============  =============================  ====================================================

A job that is cancelled while it copies does not wait for its target, so there the bitmap is untouched; one that is
cancelled when it is pending has flushed all.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.errors import IncbakError, NbdError
from incbak.serve.cbw import CHUNK, CopyBeforeWrite, OnCbwError, Run
from incbak.serve.gate import DrainTimeoutError
from incbak.serve.group import JobGroup
from incbak.serve.jobs import CancelledError, Emit, Job, JobOptions
from incbak.serve.memory_bitmap import AnyBitmap, MemoryBitmap
from incbak.serve.on_error import OnError
from incbak.serve.regrain import all_bits, regrain
from incbak.serve.scratch import Budget, Scratch
from incbak.serve.targets import JobTarget
from incbak.serve.tracker import TrackedDisk

log = logging.getLogger(__name__)

FINEST, COARSEST = 4096, CHUNK
DEFAULT_CLUSTER = 65536
_HOLE_LIMIT = 1 << 30
"""Bytes of holes told to the target at once."""
_END_DRAIN = 600.0
"""Seconds that the end of a job waits for the guest's writes in flight before it tries again."""


class BitmapMode(StrEnum):
    """When a job may change its bitmap."""

    NEVER = "never"
    ON_SUCCESS = "on-success"
    ALWAYS = "always"


@dataclass(frozen=True)
class BackupSpec:
    """What to copy: the clusters in ``bitmap``, or all (``whole``), or those the guest overwrites (``on_write``)."""

    bitmap: AnyBitmap | None = None
    mode: BitmapMode = BitmapMode.NEVER
    whole: bool = True
    on_write: bool = False
    on_cbw_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT
    on_source_error: OnError = OnError.REPORT
    on_target_error: OnError = OnError.REPORT


class BackupJob(Job):
    """`prepare` beside the guest, `begin` and perhaps `retreat` with the disk drained, then `start`."""

    def __init__(
        self,
        options: JobOptions,
        tracked: TrackedDisk,
        target: JobTarget,
        spec: BackupSpec,
        emit: Emit,
        gone: Callable[[Job], None],
        group: JobGroup | None = None,
    ) -> None:
        super().__init__(options, emit, gone, group)
        self.tracked, self.target, self.spec = tracked, target, spec
        wanted = spec.bitmap.granularity if spec.bitmap else DEFAULT_CLUSTER
        self.granularity = min(max(wanted, FINEST), COARSEST)
        self._copy: CopyBeforeWrite | None = None
        self._since: MemoryBitmap | None = None
        self._data_until = 0
        self._all_flushed = False
        self._sending: list[tuple[int, int]] = []
        """What was handed out and is not sent: the error of an earlier write may come up first."""
        self._paced = (time.monotonic(), 0)
        """Since when ``speed`` holds, and the bytes that were done by then."""

    # -- beginning ------------------------------------------------------------------------------------------------

    def prepare(self, budget: Budget) -> None:
        """What takes time. Raises `DiskError` when there can be no scratch file."""
        scratch = Scratch(budget, self.tracked.size)
        self._copy = CopyBeforeWrite(
            self.tracked.disk,
            self.granularity,
            scratch,
            on_error=self.spec.on_cbw_error,
            on_break=self.target.abort,
        )
        self._copy.prepare()
        if self.spec.bitmap and self.spec.mode is not BitmapMode.NEVER:
            self._since = MemoryBitmap("", self.tracked.size, self.spec.bitmap.granularity)

    def begin(self) -> None:
        """The point in time. The disk is drained; it is refreshed afterwards by the caller."""
        assert self._copy
        size, bitmap = self.tracked.size, self.spec.bitmap
        if bitmap and not self.spec.whole:
            todo = regrain(bitmap.snapshot(), size, bitmap.granularity, self.granularity)
        else:
            todo = all_bits(size, self.granularity)
        self.done = 0
        self.total = _bytes_in(todo, size, self.granularity)
        self._copy.begin(todo)
        if bitmap and not bitmap.enabled:
            self._since = None
        self.tracked.attach(self._copy, self._since)

    def retreat(self) -> None:
        """Undo `begin`; the disk is drained."""
        self.tracked.detach(self._copy, self._since)

    def discard(self) -> None:
        """Undo `prepare`, of a job that has not been started."""
        if self._copy:
            self._copy.close()

    # -- copying --------------------------------------------------------------------------------------------------

    def work(self) -> None:
        """Copy until nothing is left, then have the target and the disk flush.

        The disk, because a power cut may take from it what was copied and not flushed: it was written before the point
        in time, so the bitmap that counts from there would call the difference clean. Also its time of change: after
        a power cut, an older one tells that the image was put back to before the bitmap.
        """
        assert self._copy
        try:
            self.target.begin()
            self._copy_all(self._copy)
            self.target.flush()
            self._flush_disk()
            self._all_flushed = True
        except (OSError, NbdError):
            if self._copy.broken:  # that is the cause: it cut the target off
                raise self._copy.broken from None
            raise

    def _flush_disk(self) -> None:
        if not self.tracked.read_only:
            self.tracked.disk.flush_times()

    def _copy_all(self, copy: CopyBeforeWrite) -> None:
        buffer = memoryview(bytearray(max(CHUNK, self.granularity)))
        cursor = 0
        while True:
            debt = self._debt()
            self.pause_point(debt)
            if copy.broken:
                raise copy.broken
            if debt:
                continue
            run = self._next(cursor)
            if run is not None:
                cursor = run.end if self._transfer(run, buffer) else run.first
            elif not self.spec.on_write and not copy.left():
                break

    def _next(self, cursor: int) -> Run | None:
        """In order, but what is in scratch first while that fills up."""
        assert self._copy
        if self.spec.on_write:
            return self._copy.next_run(cursor, CHUNK, saved_only=True)
        if self._copy.pressed() and (run := self._copy.next_run(0, CHUNK, saved_only=True, wait=0)):
            return run
        return self._copy.next_run(cursor, _HOLE_LIMIT)

    def _transfer(self, run: Run, buffer: memoryview) -> bool:
        """Take one run (or its beginning), let the guest have it, and send it. False: read it again."""
        assert self._copy
        offset = run.first * self.granularity
        try:
            holes = 0 if run.saved else self._holes(run)
            self._copy.shrink(run, holes or min(run.count, max(CHUNK // self.granularity, 1)))
            length = min(run.count * self.granularity, self.tracked.size - offset)
            data = buffer[:length]
            if not holes:
                self._copy.read_into(run, data)
        except OSError as e:
            self._copy.put_back(run)
            self.mend("read", self.spec.on_source_error, e)
            return False
        self._sending = [(offset, length)]
        self._copy.done(run)
        self._send(None if holes else data, offset, length)
        self._sending = []
        self.done += length
        return True

    def _send(self, data: memoryview | None, offset: int, length: int) -> None:
        """Content or zeroes. What may have to be sent again is answered before anything else is sent."""
        assert self._copy
        while True:
            try:
                if data is None:
                    self.target.zeroes(offset, length)
                else:
                    self.target.write(data, offset)
                if self.spec.on_target_error is not OnError.REPORT:
                    self.target.confirm()
                return
            except (OSError, NbdError) as e:
                if self._copy.broken:
                    raise
                self.mend("write", self.spec.on_target_error, e)

    def _holes(self, run: Run) -> int:
        """How many clusters from the run's first on read as zeroes by what the file system says."""
        offset = run.first * self.granularity
        if offset < self._data_until:
            return 0
        end = min(run.end * self.granularity, self.tracked.size)
        extent = next(iter(self.tracked.disk.extents(offset, end - offset)))
        if extent.zero and extent.offset + extent.length == end:
            return run.count
        whole = extent.length // self.granularity if extent.zero else 0
        if not whole:
            self._data_until = max(extent.offset + extent.length, offset + self.granularity)
        return whole

    def _debt(self) -> float:
        """Seconds to wait so that ``speed`` is kept, at most one at a time: it may be changed meanwhile."""
        if not self.speed:
            return 0.0
        since, start = self._paced
        return min(max((self.done - start) / self.speed - (time.monotonic() - since), 0.0), 1.0)

    def set_speed(self, speed: int) -> None:
        """Bytes per second from now on, whatever the rate was before."""
        self.rested()
        super().set_speed(speed)

    def rested(self) -> None:
        """Time in which nothing could be done is not made up for."""
        self._paced = (time.monotonic(), self.done)

    def interrupt(self) -> None:
        """Wake the loop from whatever it waits for."""
        self.target.abort()

    # -- the end --------------------------------------------------------------------------------------------------

    def end(self, *, success: bool) -> None:
        """Detach, settle the bitmap, let target and scratch go."""
        assert self._copy
        keep = self._keep(success)
        self._copy.close()
        while True:
            with suppress(DrainTimeoutError):
                old = self._detach(keep)
                break
        del old
        if self.spec.bitmap:
            self.tracked.busy.pop(self.spec.bitmap.name, None)
        self.target.release()

    def _detach(self, keep: kernels.Bits | None) -> object:
        with self.tracked.gate.drained(_END_DRAIN):
            self.tracked.detach(self._copy, self._since)
            bitmap, since = self.spec.bitmap, self._since
            if keep is not None and bitmap is not None:
                bitmap.keep_bits(np.bitwise_or(keep, since.snapshot()) if since else keep)
            return self.tracked.refresh()

    def _keep(self, success: bool) -> kernels.Bits | None:
        """What stays dirty apart from ``since``; `None` when the bitmap is to be left alone."""
        bitmap, mode = self.spec.bitmap, self.spec.mode
        if bitmap is None or mode is BitmapMode.NEVER:
            return None
        if success:
            return np.zeros(kernels.bytes_for(-(-bitmap.size // bitmap.granularity)), dtype=np.uint8)
        if mode is BitmapMode.ON_SUCCESS or (refused := self._refused()) is None:
            return None
        assert self._copy
        left = self._copy.remaining()
        for offset, length in refused:
            kernels.set_range(left, offset // self.granularity, (offset + length - 1) // self.granularity)
        rest = regrain(left, bitmap.size, self.granularity, bitmap.granularity)
        bitmap.merge_bits(rest)
        return rest

    def _refused(self) -> list[tuple[int, int]] | None:
        """What the target refused of all that was sent, where it and the disk have the rest durably; or `None`."""
        if self._all_flushed:
            return []
        try:
            refused = self.target.settle() + self._sending
            self._flush_disk()
        except (IncbakError, OSError, CancelledError) as e:
            log.info("job %s: what was copied is not counted: %s", self.id, e)
            return None
        return refused


def _bytes_in(bits: kernels.Bits, size: int, granularity: int) -> int:
    last = -(-size // granularity) - 1
    short = -size % granularity if size and kernels.any_in_range(bits, last, last) else 0
    return kernels.count(bits) * granularity - short

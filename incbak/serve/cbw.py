"""Copy-before-write: a disk as it was at one instant, while a guest goes on writing to it.

Each cluster that the job still has to copy is in one of two states: its old content is **on the disk** (bit in
`_todo`), or **held** (bit in `_left` only): in memory, or in the scratch file. A *claim* is a run of clusters that
somebody is reading: the job, or a guest's write that has to save them. Nobody writes to a cluster of `_todo` that is
claimed; claims are short, none waits for a target.

The promises:

- A bit of `_todo` is cleared only when the old content is safe: held, or read by the job. Whoever finds it clear may
  overwrite the cluster; it is never set again. So a look without the lock errs on the safe side only.
- `before_write` returns within `TIMEOUT` and the read of a run, however long the range is, with the content safe or the
  copy broken (``break-snapshot``), or it raises (``break-guest-write``). It waits only where memory is full and scratch
  slow, or for the job to read a run.
- Once broken, a copy stays broken: it never hands out content again, so no new data gets into an old point in time.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.disk.base import Disk
from incbak.extents import StatusExtent
from incbak.serve.held import MEMORY, Held
from incbak.serve.scratch import Scratch

log = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that one guest write may wait for its old content to be safe."""
CHUNK = 1 << 20
"""Bytes read at once, by the job and before a write."""
_WINDOW = 1 << 16
"""Bytes of packed bits searched at a time."""


class OnCbwError(StrEnum):
    """Who suffers when old content cannot be saved: the backup, or the guest's write."""

    BREAK_SNAPSHOT = "break-snapshot"
    BREAK_GUEST_WRITE = "break-guest-write"


@dataclass(eq=False)
class Run:
    """A claim on ``count`` clusters from ``first``; ``saved`` tells where their content is."""

    first: int
    count: int
    saved: bool

    @property
    def end(self) -> int:
        """The cluster after the last."""
        return self.first + self.count


class BrokenError(OSError):
    """The point in time is lost; ``errno`` says why."""


class CopyBeforeWrite:
    """One point in time of ``disk``. `prepare`, then `begin` with the disk drained; `close` in the end."""

    def __init__(
        self,
        disk: Disk,
        granularity: int,
        scratch: Scratch,
        *,
        on_error: OnCbwError = OnCbwError.BREAK_SNAPSHOT,
        on_break: Callable[[], None] = lambda: None,
        timeout: float = TIMEOUT,
        memory: int = MEMORY,
    ) -> None:
        self.disk, self.granularity, self._scratch = disk, granularity, scratch
        self.clusters = -(-disk.size // granularity)
        self._shift = granularity.bit_length() - 1
        self._on_error, self._on_break, self._timeout = on_error, on_break, timeout
        self._todo: kernels.Bits = np.zeros(kernels.bytes_for(self.clusters), dtype=np.uint8)
        self._left = self._todo.copy()
        self._changed = threading.Condition()
        self._held = Held(scratch, self._shift, self._changed, memory)
        self._claims: list[Run] = []
        self._broken: OSError | None = None

    # -- life -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Start what needs starting; before the drain."""
        self._held.start()

    def begin(self, todo: kernels.Bits) -> None:
        """This is the instant. The disk is drained; ``todo`` is taken over."""
        self._todo = todo
        self._left = todo.copy()

    def close(self) -> None:
        """Nothing is handed out or saved any more; waiting writes go on."""
        with self._changed:
            self._broken = self._broken or BrokenError(errno.ECANCELED, "the job has ended")
            self._todo = np.zeros_like(self._todo)
            self._held.close()

    @property
    def broken(self) -> OSError | None:
        """Why the point in time is lost, if it is."""
        return self._broken

    def break_off(self, why: OSError) -> None:
        """The point in time is lost: nobody waits for it, nobody gets content from it."""
        with self._changed:
            if self._broken:
                return
            log.warning("disk %s: the point in time is lost: %s", self.disk.name, why)
            self._broken = BrokenError(why.errno or errno.EIO, why.strerror or str(why))
            self._changed.notify_all()
        self._on_break()

    # -- the guest's side -----------------------------------------------------------------------------------------

    def wants(self, offset: int, length: int) -> bool:
        """Whether a write there first has to save old content. A hint: takes no lock."""
        last = (offset + length - 1) >> self._shift
        return kernels.any_in_range(self._todo, offset >> self._shift, last)

    def may_wait(self, offset: int, length: int) -> bool:
        """Whether `before_write` may wait for the storage: a guess, from room in memory and one page of old content."""
        if not self.wants(offset, length):
            return False
        if length > CHUNK or not self._held.has_room(self.granularity):
            return True
        probe = memoryview(bytearray(1))
        return not self.disk.read_nowait(probe, offset)

    def before_write(self, offset: int, length: int, spent: float = 0.0) -> None:
        """Return once old content of the range is safe, or the copy is broken; ``spent`` seconds went before.

        Raises `OSError` when the policy is ``break-guest-write`` and the content cannot be saved.
        """
        if not self.wants(offset, length):
            return
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        deadline = time.monotonic() + self._timeout - spent
        try:
            if length > CHUNK:
                self._pass_holes(first, last)
            while run := self._claim_for_guest(first, last, deadline):
                self._save(run)
                first = run.end
        except BrokenError:
            raise
        except OSError as e:
            if self._on_error is OnCbwError.BREAK_GUEST_WRITE:
                raise
            self.break_off(e)

    def _claim_for_guest(self, first: int, last: int, deadline: float) -> Run | None:
        """A claim, with room for its content; ``None`` when nothing is left to save. Raises `OSError`: no room."""
        with self._changed:
            while not self._broken and (cluster := self._next(self._todo, first, last + 1)) is not None:
                if time.monotonic() > deadline:
                    raise self._late()
                if self._claim_on(cluster) is None:
                    run = self._claim(cluster, last + 1, CHUNK, saved=False)
                    if self._held.reserve(run.count << self._shift):
                        return run
                    self._claims.remove(run)
                    if self._held.error:
                        raise self._held.error
                if not self._changed.wait(deadline - time.monotonic()):
                    raise self._late()
            return None

    def _late(self) -> OSError:
        return OSError(errno.ETIMEDOUT, f"old content was not saved within {self._timeout:g} s")

    def _pass_holes(self, first: int, last: int) -> None:
        """What is a hole on the disk need not be read, however long it is: it is safe as it is, being zeroes."""
        while run := self._claim_unsaved(first, last):
            start, end = run.first << self._shift, min(run.end << self._shift, self.disk.size)
            holes: list[StatusExtent] = []
            try:
                holes = [e for e in self.disk.extents(start, end - start) if e.zero]
            finally:
                with self._changed:
                    for hole in holes:
                        self._clear_whole(hole.offset, hole.offset + hole.length)
                    self._claims.remove(run)
                    self._changed.notify_all()
            first = run.end

    def _claim_unsaved(self, first: int, last: int) -> Run | None:
        """All from the first cluster that has to be saved and nobody reads."""
        with self._changed:
            while not self._broken and (cluster := self._next(self._todo, first, last + 1)) is not None:
                if (claim := self._claim_on(cluster)) is None:
                    return self._claim(cluster, last + 1, (last + 1) << self._shift, saved=False)
                first = claim.end
            return None

    def _clear_whole(self, start: int, end: int) -> None:
        first = -(-start >> self._shift)
        last = (self.clusters if end == self.disk.size else end >> self._shift) - 1
        if first <= last:
            kernels.clear_range(self._todo, first, last)

    def _save(self, run: Run) -> None:
        """Read the old content of a claimed run and hold it: only then may the guest overwrite it."""
        found: dict[int, memoryview] | None = None
        try:
            found = self._old_content(run)
        finally:
            with self._changed:
                self._hold(run, found or {})
                if found is not None:
                    kernels.clear_range(self._todo, run.first, run.end - 1)
                self._claims.remove(run)
                self._changed.notify_all()

    def _hold(self, run: Run, found: dict[int, memoryview]) -> None:
        for cluster, content in found.items():
            self._held.put(cluster, content)
        kept = sum(len(content) for content in found.values())
        self._held.unreserve((run.count << self._shift) - kept)

    def _old_content(self, run: Run) -> dict[int, memoryview]:
        """By cluster; those that are all zeroes are left out. Raises `OSError`."""
        start = run.first << self._shift
        end = min(run.end << self._shift, self.disk.size)
        buffer = memoryview(bytearray(end - start))
        for extent in self._worth_reading(start, end - start):
            at = extent.offset - start
            self.disk.read_into(buffer[at : at + extent.length], extent.offset)
        parts = ((c, buffer[(c << self._shift) - start :][: self.granularity]) for c in range(run.first, run.end))
        return {c: part for c, part in parts if np.frombuffer(part, dtype=np.uint8).any()}

    def _worth_reading(self, offset: int, length: int) -> list[StatusExtent]:
        """What is not known to be holes; for a short range it costs more to ask than to read."""
        if length < CHUNK:
            return [StatusExtent(offset, length, zero=False, hole=False)]
        return [e for e in self.disk.extents(offset, length) if not e.zero]

    # -- the job's side -------------------------------------------------------------------------------------------

    def left(self) -> int:
        """Clusters not handed out yet."""
        with self._changed:
            return kernels.count(self._left)

    def remaining(self) -> kernels.Bits:
        """Packed bits of the clusters not handed out yet; a copy."""
        with self._changed:
            return self._left.copy()

    def pressed(self) -> bool:
        """Whether scratch should be relieved before anything else is copied."""
        return self._scratch.pressed()

    def next_run(self, cursor: int, limit: int, *, saved_only: bool = False, wait: float = 0.5) -> Run | None:
        """Claim the next run of at most ``limit`` bytes from ``cursor`` on, then from the start: all in one state.

        ``None`` when there is none now (after ``wait`` seconds): see `left`. Raises `BrokenError`.
        With ``saved_only``, content that is still on the disk is passed over.
        """
        deadline = time.monotonic() + wait
        with self._changed:
            while True:
                if self._broken:
                    raise self._broken
                if run := self._find(cursor, limit, saved_only) or self._find(0, limit, saved_only):
                    return run
                if not saved_only and not self._left.any():
                    return None
                if not self._changed.wait(deadline - time.monotonic()):
                    return None

    def _find(self, cursor: int, limit: int, saved_only: bool) -> Run | None:
        at = cursor
        while (
            cluster := self._next(self._left, at, self.clusters, but=self._todo if saved_only else None)
        ) is not None:
            if self._claim_on(cluster) is None:
                saved = not kernels.any_in_range(self._todo, cluster, cluster)
                return self._claim(cluster, self.clusters, limit, saved=saved)
            at = cluster + 1
        return None

    def claim_at(self, cluster: int, limit: int) -> Run:
        """Claim a run of at most ``limit`` bytes from ``cluster`` on, to be read and `put_back`: it stays to be had.

        Waits for whoever has it claimed. Raises `BrokenError`, or `OSError` after the bound of a guest's write.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while True:
                if self._broken:
                    raise self._broken
                if self._claim_on(cluster) is None:
                    saved = not kernels.any_in_range(self._todo, cluster, cluster)
                    return self._claim(cluster, self.clusters, limit, saved=saved)
                if not self._changed.wait(deadline - time.monotonic()):
                    raise OSError(errno.ETIMEDOUT, f"a cluster was in use for {self._timeout:g} s")

    def shrink(self, run: Run, count: int) -> None:
        """Keep only the first ``count`` clusters of a claimed run."""
        with self._changed:
            run.count = count
            self._changed.notify_all()

    def read_into(self, run: Run, buffer: memoryview) -> None:
        """The content of a claimed run, as it was. Raises `OSError`."""
        if run.saved:
            self._held.read_into(run.first, run.count, buffer)
        else:
            self.disk.read_into(buffer, run.first << self._shift)

    def put_back(self, run: Run) -> None:
        """A claimed run is as if it had not been claimed: its content is still to be had, by anybody.

        Raises `BrokenError` when the copy broke meanwhile: what was read must not be used.
        """
        with self._changed:
            self._claims.remove(run)
            self._changed.notify_all()
            if self._broken:
                raise self._broken

    def done(self, run: Run) -> None:
        """The job has the content of a claimed run: the guest may overwrite it, scratch lets it go.

        Raises `BrokenError` when the copy broke meanwhile: what was read must not be used.
        """
        with self._changed:
            self._claims.remove(run)
            self._changed.notify_all()
            if self._broken:
                raise self._broken
            kernels.clear_range(self._todo, run.first, run.end - 1)
            kernels.clear_range(self._left, run.first, run.end - 1)
            held = self._held.drop(run.first, run.count) if run.saved else 0
            self._held.error = None
        if held:
            start = run.first << self._shift
            self._scratch.discard(start, min(run.end << self._shift, self.disk.size) - start, held)

    # -- under the lock -------------------------------------------------------------------------------------------

    def _next(self, bits: kernels.Bits, first: int, end: int, but: kernels.Bits | None = None) -> int | None:
        """The first cluster in ``[first, end)`` with its bit set (and not set in ``but``)."""
        at, stop, width = first >> 3, kernels.bytes_for(end), 64
        while at < stop:
            window = bits[at : min(at + width, stop)]
            if but is not None:
                window = window & ~but[at : at + len(window)]
            if at == first >> 3:
                window = window.copy()
                window[0] &= 0xFF << (first & 7) & 0xFF
            hit = int((window != 0).argmax())
            if value := int(window[hit]):
                cluster = ((at + hit) << 3) + (value & -value).bit_length() - 1
                return cluster if cluster < end else None
            at, width = at + width, _WINDOW
        return None

    def _claim_on(self, cluster: int) -> Run | None:
        return next((c for c in self._claims if c.first <= cluster < c.end), None)

    def _claim(self, first: int, end: int, limit: int, *, saved: bool) -> Run:
        """The longest run from ``first`` that is all in one state, unclaimed, and at most ``limit`` bytes."""
        end = min([end, first + max(limit >> self._shift, 1), *(c.first for c in self._claims if c.first > first)])
        run = Run(first, self._state_ends(first, end, saved) - first, saved)
        self._claims.append(run)
        return run

    def _state_ends(self, first: int, end: int, saved: bool) -> int:
        """The first cluster of ``[first, end)`` in another state than left and ``saved``, or ``end``."""
        low, high = first >> 3, kernels.bytes_for(end)
        todo = self._todo[low:high]
        others = ~(self._left[low:high] & (~todo if saved else todo))
        base = low << 3
        found = self._next(others, first - base, end - base)
        return end if found is None else found + base


def describe(error: OSError) -> str:
    """QEMU's way of telling an errno in a job's ``error``."""
    return os.strerror(error.errno) if error.errno else str(error)

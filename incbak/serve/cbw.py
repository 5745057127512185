"""Copy-before-write: a disk as it was at one instant, while a guest goes on writing to it.

Each cluster that the job still has to copy is in one of two states: its old content is **on the disk** (bit in
`_todo`), or **saved** in the scratch file (bit in `_left` only). A *claim* is a run of clusters that somebody is
reading: the job, or a saver on behalf of a guest write. Nobody writes to a cluster of `_todo` that is claimed; claims
are short, none waits for a target.

The promises:

- A bit of `_todo` is cleared only when the old content is safe: in scratch, or read by the job. Whoever finds it
  clear may overwrite the cluster; it is never set again. So a look without the lock errs on the safe side only.
- `before_write` returns within `TIMEOUT`, with the content safe or the copy broken (``break-snapshot``), or it
  raises (``break-guest-write``). Saving is done by a thread of its own: a stalled write cannot be called off.
- Once broken, a copy stays broken: it never hands out content again, so no new data gets into an old point in time.
"""

from __future__ import annotations

import errno
import logging
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.disk.base import Disk
from incbak.serve.scratch import Scratch

log = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that one guest write may wait for its old content to be saved."""
CHUNK = 1 << 20
"""Bytes read at once, by the job and by a saver."""
SAVERS = 2
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
    error: OSError | None = None
    """Set when saving failed and the claim is over."""

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
    ) -> None:
        self.disk, self.granularity, self._scratch = disk, granularity, scratch
        self.clusters = -(-disk.size // granularity)
        self._shift = granularity.bit_length() - 1
        self._on_error, self._on_break, self._timeout = on_error, on_break, timeout
        self._todo: kernels.Bits = np.zeros(kernels.bytes_for(self.clusters), dtype=np.uint8)
        self._left = self._todo.copy()
        self._changed = threading.Condition()
        self._claims: list[Run] = []
        self._held: dict[int, int] = {}
        """Bytes of scratch per saved cluster; none for one that was all hole."""
        self._broken: OSError | None = None
        self._queue: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self._running = 0

    # -- life -----------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Start the savers; takes time, so before the drain."""
        self._running = SAVERS
        for number in range(SAVERS):
            threading.Thread(target=self._saver, name=f"saver-{number}", daemon=True).start()

    def begin(self, todo: kernels.Bits) -> None:
        """This is the instant. The disk is drained; ``todo`` is taken over."""
        self._todo = todo
        self._left = todo.copy()

    def close(self) -> None:
        """Nothing is handed out or saved any more; waiting writes go on. The scratch goes with the last saver."""
        with self._changed:
            self._broken = self._broken or BrokenError(errno.ECANCELED, "the job has ended")
            self._todo = np.zeros_like(self._todo)
            self._changed.notify_all()
        for _ in range(SAVERS):
            self._queue.put(None)

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
        """Whether a write there has to wait for old content to be saved. A hint: takes no lock."""
        last = (offset + length - 1) >> self._shift
        return kernels.any_in_range(self._todo, offset >> self._shift, last)

    def before_write(self, offset: int, length: int) -> None:
        """Return once old content of the range is safe, or the copy is broken.

        Raises `OSError` when the policy is ``break-guest-write`` and the content cannot be saved.
        """
        if not self.wants(offset, length):
            return
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        deadline = time.monotonic() + self._timeout
        with self._changed:
            while not self._broken and (cluster := self._next(self._todo, first, last + 1)) is not None:
                self._await_saved(cluster, last, deadline)

    def _await_saved(self, cluster: int, last: int, deadline: float) -> None:
        """Have ``cluster`` (and what follows, up to ``last``) saved, or wait for who reads it now; the lock is held."""
        claim = self._claim_on(cluster)
        if claim is None:
            claim = self._claim(cluster, last + 1, CHUNK, saved=False)
            self._queue.put(claim)
        over = self._changed.wait_for(lambda: self._broken or self._over(claim, cluster), deadline - time.monotonic())
        error = claim.error if over else OSError(errno.ETIMEDOUT, f"not saved within {self._timeout:g} s")
        if error and self._on_error is OnCbwError.BREAK_GUEST_WRITE:
            raise error
        if error:
            self.break_off(error)

    def _saver(self) -> None:
        buffer = memoryview(bytearray(CHUNK))
        try:
            while (run := self._queue.get()) is not None:
                self._save(run, buffer)
        finally:
            with self._changed:
                self._running -= 1
                last = not self._running
            if last:
                self._scratch.close()

    def _save(self, run: Run, buffer: memoryview) -> None:
        held: dict[int, int] = {}
        error: OSError | None = None
        try:
            if not self._broken:
                self._copy_to_scratch(run, buffer, held)
        except OSError as e:
            error = e
        with self._changed:
            if error is None and not self._broken:
                self._held.update(held)
                kernels.clear_range(self._todo, run.first, run.end - 1)
            run.error = error
            self._claims.remove(run)
            self._changed.notify_all()

    def _copy_to_scratch(self, run: Run, buffer: memoryview, held: dict[int, int]) -> None:
        """Holes cost nothing: the scratch file has them already."""
        start = run.first << self._shift
        end = min(run.end << self._shift, self.disk.size)
        for extent in self.disk.extents(start, end - start):
            if extent.zero:
                continue
            offset, stop = extent.offset, extent.offset + extent.length
            while offset < stop:
                cluster = offset >> self._shift
                part = buffer[: min(stop, (cluster + 1) << self._shift) - offset]
                part = part[:CHUNK]
                self.disk.read_into(part, offset)
                self._scratch.write(part, offset)
                held[cluster] = held.get(cluster, 0) + len(part)
                offset += len(part)

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

    def shrink(self, run: Run, count: int) -> None:
        """Keep only the first ``count`` clusters of a claimed run."""
        with self._changed:
            run.count = count
            self._changed.notify_all()

    def read_into(self, run: Run, buffer: memoryview) -> None:
        """The content of a claimed run, as it was. Raises `OSError`."""
        source = self._scratch if run.saved else self.disk
        source.read_into(buffer, run.first << self._shift)

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
            held = sum(self._held.pop(c, 0) for c in range(run.first, run.end)) if run.saved else 0
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

    def _over(self, claim: Run, cluster: int) -> bool:
        """Whether ``claim`` is no longer on ``cluster``: it has ended, or been shrunk."""
        return claim not in self._claims or cluster >= claim.end

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

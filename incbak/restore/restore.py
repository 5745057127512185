"""The way of the data: tree leaf -> digests -> blobs, verified -> target. Two threads, a bounded number of leaves."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError, RestoreError
from incbak.events import Progress, Reporter, Warned, silent
from incbak.extents import Extent, merge
from incbak.repo.index import REBUILD
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT, page_of
from incbak.restore.targets import Target

THREADS = 2
_AHEAD = 2 * THREADS
_ZERO_STEP = 1 << 30


@dataclass
class Restored:
    """What was done with one disk, in bytes. ``damaged`` ranges could not be read; ``salvage`` makes them zeroes."""

    disk: str
    size: int
    written: int = 0
    damaged: list[Extent] = field(default_factory=list)
    why: str = ""


_PARTLY = "The target may be partly overwritten: do not use it as it is."


def restore_disk(
    repo: Repository,
    record: Record,
    disk: DiskRecord,
    target: Target,
    *,
    salvage: bool = False,
    report: Reporter = silent,
) -> Restored:
    """Write ``disk`` as it was into ``target``, and make it durable; the target is closed either way.

    Raises `DamagedError` when anything does not verify: the target is abandoned, unless ``salvage`` asks for what can
    be had; then damaged clusters are zeroes in the target, and `Restored.damaged` says where.
    """
    try:
        job = _Restore(repo, record, disk, target, salvage, report)
        job.run()
        if job.done.damaged and not salvage:
            raise _damaged(record, job.done, repo, target)
        target.finish()
    except OSError as e:
        target.abandon()
        state = "" if target.blank else f"{_PARTLY} "
        raise RestoreError(
            f"cannot write {target.name}: {e.strerror}", hint=f"{state}Free space, or look at it."
        ) from e
    except BaseException:
        target.abandon()
        raise
    return job.done


class _Restore:
    """One disk on its way."""

    def __init__(
        self, repo: Repository, record: Record, disk: DiskRecord, target: Target, salvage: bool, report: Reporter
    ) -> None:
        self._tree = repo.tree(disk, record.cluster_size)
        self._reader = repo.reader()
        self._step, self._disk, self._target, self._report = record.cluster_size, disk, target, report
        self._salvage = salvage
        self._lock = threading.Lock()
        self._stop = False
        self.done = Restored(disk.name, disk.size)

    def run(self) -> None:
        leaf_bytes = FANOUT * self._step
        flying: deque[tuple[int, Future[None]]] = deque()
        pool = ThreadPoolExecutor(THREADS, "restore")
        try:
            at = 0
            for number, digest in self._leaves():
                if not self._target.blank:
                    self._zero(at, number * leaf_bytes)
                at = (number + 1) * leaf_bytes
                while len(flying) >= _AHEAD:
                    self._landed(*flying.popleft())
                flying.append((at, pool.submit(self._leaf, number, digest)))
            if not self._target.blank:
                self._zero(at, self._disk.size)
            while flying:
                self._landed(*flying.popleft())
        except BaseException:
            self._target.interrupt()
            raise
        finally:
            self._stop = True
            pool.shutdown(cancel_futures=True)
        self._report(Progress(self._disk.name, self._disk.size, self._disk.size))

    def _landed(self, at: int, work: Future[None]) -> None:
        work.result()
        self._report(Progress(self._disk.name, min(at, self._disk.size), self._disk.size))

    def _leaves(self) -> Iterator[tuple[int, bytes]]:
        try:
            yield from self._tree.leaves()
        except DamagedError as e:
            hint = "The tree itself is damaged. Try an older backup; run: incbak check --read-data"
            raise DamagedError(f"disk {self._disk.name}: {e}", hint=hint) from e

    def _zero(self, start: int, end: int) -> None:
        end = min(end, self._disk.size)
        for offset in range(start, end, _ZERO_STEP):
            self._target.zero(offset, min(_ZERO_STEP, end - offset))

    def _leaf(self, number: int, digest: bytes) -> None:
        first = number * FANOUT
        inside = min(self._tree.clusters - first, FANOUT)
        if inside <= 0:
            self._beyond()
            return
        try:
            page = page_of(digest, self._reader.read(digest))
        except DamagedError as e:
            self._note_damage(first, inside, str(e))
            return
        there: NDArray[np.bool_] = np.asarray(page.any(axis=1))
        if there[inside:].any():
            self._beyond()
        there = there[:inside]
        rows = np.flatnonzero(there)
        numbers = rows.tolist()
        for row, content in self._reader.read_many(np.ascontiguousarray(page[rows])):
            if self._stop:
                return
            cluster = first + numbers[row]
            if isinstance(content, DamagedError):
                self._note_damage(cluster, 1, str(content))
                continue
            self._put(cluster, content)
        if not self._target.blank:
            for start, count in _gaps(there):
                self._zero((first + start) * self._step, (first + start + count) * self._step)

    def _beyond(self) -> None:
        """A tree that has more than the disk is not of this disk; what lies beyond is no part of a salvage."""
        if not self._salvage:
            raise DamagedError(f"disk {self._disk.name}: its tree reaches beyond the end of the disk")

    def _put(self, cluster: int, content: bytes | memoryview) -> None:
        offset = cluster * self._step
        if len(content) != min(self._step, self._disk.size - offset):
            self._note_damage(cluster, 1, f"cluster {cluster} has {len(content)} bytes")
            return
        self._target.write(content, offset)
        with self._lock:
            self.done.written += len(content)

    def _note_damage(self, cluster: int, count: int, why: str) -> None:
        offset = cluster * self._step
        extent = Extent(offset, min(count * self._step, self._disk.size - offset))
        if self._salvage and not self._target.blank:
            self._target.zero(*extent)
        with self._lock:
            self.done.damaged = merge([*self.done.damaged, extent])
            self.done.why = self.done.why or why
        self._report(Warned(f"disk {self._disk.name}: {extent.length} bytes at {extent.offset} are damaged: {why}"))


def _gaps(there: NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
    """(first, count) of the runs of false."""
    edges = np.flatnonzero(np.diff(~there, prepend=False, append=False)).tolist()
    for start, end in zip(edges[0::2], edges[1::2], strict=True):
        yield start, end - start


def _damaged(record: Record, done: Restored, repo: Repository, target: Target) -> DamagedError:
    lost = sum(e.length for e in done.damaged)
    where = f"{lost} bytes in {len(done.damaged)} places"
    state = "Nothing was restored." if target.blank else _PARTLY
    way_out = "Restore another backup, or with --salvage what can be read of this one."
    return DamagedError(
        f"backup {record.id[:8]}, disk {done.disk}: {where} do not verify: {done.why}",
        hint=f"{state} {REBUILD if repo.index.doubt else way_out}",
    )

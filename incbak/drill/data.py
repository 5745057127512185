"""Restore a disk into nothing, and prove by digests that it is what was backed up."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from incbak.drill.scratch import Scratch
from incbak.errors import DamagedError
from incbak.events import Progress, Reporter, silent
from incbak.extents import Extent
from incbak.repo import blob
from incbak.repo.drills import DiskDrill
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.seal import Seal
from incbak.repo.tree import FANOUT, TreeReader, TreeUpdate, clusters_in
from incbak.restore.restore import restore_disk
from incbak.restore.targets import Target

_BATCH = 4096


@dataclass
class Proved:
    """What came of one disk. ``damaged``: digests that must be stored again; ``problems`` in words."""

    disk: DiskDrill
    damaged: set[bytes] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)


class HashTarget(Target):
    """Keeps the digests of what it is given, and of it what belongs to ``parts``."""

    blank = True

    def __init__(self, name: str, size: int, step: int, parts: Sequence[Scratch], seal: Seal) -> None:
        self.name, self._step, self._parts, self._seal = name, step, parts, seal
        self._lock = threading.Lock()
        self._update = TreeUpdate(_nothing, seal.digest, None, clusters_in(size, step))
        self._numbers: list[int] = []
        self._digests: list[bytes] = []
        self.written = 0

    def write(self, data: bytes | memoryview, offset: int) -> None:
        digest = self._seal.digest(data)
        for part in self._parts:
            part.put(data, offset)
        with self._lock:
            self._numbers.append(offset // self._step)
            self._digests.append(digest)
            self.written += 1
            if len(self._numbers) >= _BATCH:
                self._take()

    def _take(self) -> None:
        if self._numbers:
            rows = np.frombuffer(b"".join(self._digests), dtype=np.uint8).reshape(-1, blob.DIGEST)
            self._update.set(np.array(self._numbers, dtype=np.int64), rows)
            self._numbers, self._digests = [], []

    def zero(self, offset: int, length: int) -> None:
        pass

    def finish(self) -> None:
        self._take()

    def root(self) -> bytes:
        """Of all that was written; once, after `finish`."""
        return self._update.finish()

    def abandon(self) -> None:
        pass


def _nothing(digest: bytes) -> bytes:
    raise DamagedError(f"page {digest.hex()} was never made")


def prove_whole(
    repo: Repository, record: Record, disk: DiskRecord, parts: Sequence[Scratch], report: Reporter = silent
) -> Proved:
    """Restore all of ``disk``, with ``parts`` filled on the way, and compare the roots.

    What does not verify is in the result and raises nothing; `RestoreError` where a part cannot be written.
    """
    step, clusters = record.cluster_size, clusters_in(disk.size, record.cluster_size)
    target = HashTarget(f"the scratch of disk {disk.name}", disk.size, step, parts, repo.seal)
    try:
        done = restore_disk(repo, record, disk, target, salvage=True, report=report)
    except DamagedError as e:
        found = Proved(DiskDrill(name=disk.name, clusters=target.written, of=clusters, wrong=1), problems=[str(e)])
        found.damaged = _damaged_inner(repo, record, disk)
        return found
    wrong = sum(-(-e.length // step) for e in done.damaged)
    found = Proved(DiskDrill(name=disk.name, clusters=clusters, of=clusters, wrong=wrong))
    if done.damaged:
        lost = sum(e.length for e in done.damaged)
        found.problems = [f"disk {disk.name}: {lost} bytes in {len(done.damaged)} places do not verify: {done.why}"]
        found.damaged = _digests_in(repo.tree(disk, step), done.damaged, step)
    elif (root := target.root().hex()) != disk.root:
        what = f"disk {disk.name}: what was restored has the root {root[:16]}, the record says {disk.root[:16]}"
        found.problems = [what]
    return found


def _damaged_inner(repo: Repository, record: Record, disk: DiskRecord) -> set[bytes]:
    """The pages of a tree that are damaged themselves."""
    found: set[bytes] = set()
    for _page in repo.tree(disk, record.cluster_size).pages(set(), lambda digest, _why: found.add(digest)):
        pass
    return found


def _digests_in(tree: TreeReader, extents: Sequence[Extent], step: int) -> set[bytes]:
    """Of the clusters in these ranges; of a leaf that cannot be read, the leaf's."""
    found: set[bytes] = set()
    for extent in extents:
        first, end = extent.offset // step, -(-(extent.offset + extent.length) // step)
        for leaf in range(first // FANOUT, -(-end // FANOUT)):
            try:
                page = tree.leaf(leaf)
            except DamagedError:
                found.add(tree.leaf_digest(leaf))
                continue
            rows = page[max(first - leaf * FANOUT, 0) : end - leaf * FANOUT]
            found.update(row.tobytes() for row in rows)
    return found - {blob.ZERO_DIGEST}


def prove_sample(
    repo: Repository, record: Record, disk: DiskRecord, percent: float, seed: int, report: Reporter = silent
) -> Proved:
    """Read ``percent`` of the clusters that are not zero, at least one of each leaf, as ``seed`` draws them.

    They are read as by a restore, and compared with their digests. The tree is read whole.
    """
    tree, reader, rng = repo.tree(disk, record.cluster_size), repo.reader(), np.random.default_rng(seed)
    clusters = tree.clusters
    counted = wrong = 0
    found = Proved(DiskDrill(name=disk.name, clusters=0, of=clusters, wrong=0))
    try:
        for number, leaf in tree.leaves():
            page = tree.page(leaf)
            drawn = _draw(np.flatnonzero(page.any(axis=1)), percent, rng)
            counted += len(drawn)
            for row, content in reader.read_many(np.ascontiguousarray(page[drawn])):
                cluster, digest = number * FANOUT + int(drawn[row]), page[drawn[row]].tobytes()
                expected = min(record.cluster_size, disk.size - cluster * record.cluster_size)
                if why := _wrong(content, digest, expected, repo.seal):
                    wrong += 1
                    found.damaged.add(digest)
                    found.problems = found.problems or [f"disk {disk.name}: cluster {cluster} does not verify: {why}"]
            report(Progress(disk.name, min((number + 1) * FANOUT, clusters), clusters, "comparing", "clusters"))
    except DamagedError as e:
        wrong += 1
        found.problems.append(f"disk {disk.name}: {e}")
        found.damaged |= _damaged_inner(repo, record, disk)
    found.disk = DiskDrill(name=disk.name, clusters=counted, of=clusters, wrong=wrong)
    return found


def _draw(rows: NDArray[np.int64], percent: float, rng: np.random.Generator) -> NDArray[np.int64]:
    chosen = rows[rng.random(len(rows)) * 100 < percent]
    return chosen if len(chosen) or not len(rows) else rows[[int(rng.integers(len(rows)))]]


def _wrong(content: bytes | memoryview | DamagedError, digest: bytes, expected: int, seal: Seal) -> str:
    if isinstance(content, DamagedError):
        return str(content)
    if len(content) != expected:
        return f"it has {len(content)} bytes"
    return "" if seal.digest(content) == digest else "it does not match its digest"


__all__ = ["HashTarget", "Proved", "prove_sample", "prove_whole"]

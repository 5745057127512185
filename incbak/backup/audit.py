"""Is the bitmap telling the truth? Clusters that it calls clean are read again and compared with the base's tree.

Nothing is stopped for it: the image is read as it is, beside the guest. Marks are made before writes, so the order is
to read, to compare, and to look at the bitmap again: a cluster that differs and is clean even then was changed without
a mark, by a writer that nobody tracked, a failing disk, or a fault of ours.

A sample is a slice: of ``slices`` slices, slice ``turn`` has every ``slices``-th unit of 1 MiB, so that all of them
together are the whole disk, and each is spread over it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from incbak.backup.plan import Planned
from incbak.bitmap.store import BitmapView, view_file
from incbak.disk.file import FileDisk, open_disk
from incbak.errors import BitmapError, DiskError
from incbak.events import Progress, Reporter, silent
from incbak.extents import Extent, merge, total
from incbak.repo.record import DiskRecord
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT

UNIT = 1 << 20


@dataclass(frozen=True)
class Slice:
    """Which part of the clean clusters is read: number ``turn`` of ``slices``."""

    slices: int = 1
    turn: int = 0

    def of(self, first: int, count: int, cluster: int) -> NDArray[np.bool_]:
        """Which of the clusters ``[first, first + count)`` belong to it."""
        unit = np.arange(first, first + count, dtype=np.int64) // max(UNIT // cluster, 1)
        return np.asarray(unit % self.slices == self.turn % self.slices)


@dataclass(frozen=True)
class Findings:
    """``compared``: bytes of clean clusters that were looked at. ``wrong``: those that differ from the base."""

    compared: int
    wrong: tuple[Extent, ...]

    def told(self) -> str:
        """What is wrong, for people: at most a few ranges."""
        ranges = ", ".join(f"{e.length} bytes at {e.offset}" for e in self.wrong[:8])
        more = f" and {len(self.wrong) - 8} ranges more" if len(self.wrong) > 8 else ""
        return f"{total(self.wrong)} bytes differ from the base but are not marked: {ranges}{more}"


def audit_disk(repo: Repository, planned: Planned, part: Slice, report: Reporter = silent) -> Findings | None:
    """Audit the base's bitmap of a planned disk; ``None`` where there is none to believe in.

    Raises as `audit` does, also where the engine's bitmaps are in no file that can be looked at.
    """
    bitmap = planned.plan.disk.bitmap(planned.plan.base_bitmap or "")
    if bitmap is None or planned.before is None:
        return None
    image = planned.plan.disk.extra.get("path")
    if not bitmap.path or not image:
        raise BitmapError("only bitmaps of incbak serve, and of raw images that are off, can be audited")
    return audit(Path(image), Path(bitmap.path), repo, planned.before, part, report)


def audit(
    image: Path, bitmap: Path, repo: Repository, before: DiskRecord, part: Slice, report: Reporter = silent
) -> Findings:
    """Compare. ``before`` is the disk in the backup that the bitmap counts from.

    Raises `DiskError`, `BitmapError` or `DamagedError` when it cannot be done; then nothing is known.
    """
    looked = view_file(bitmap)
    if looked.reason:
        raise BitmapError(f"bitmap {bitmap} is invalid: {looked.reason.text}", reason=looked.reason)
    disk = open_disk(image, read_only=True, lock=False)
    try:
        if looked.slot is None or looked.slot.size != disk.size or looked.slot.granularity != repo.cluster_size:
            raise BitmapError(f"bitmap {bitmap} does not fit the image {image}")
        return _Audit(disk, looked, repo, before, part).run(report)
    except OSError as e:
        raise DiskError(f"cannot read {image}: {e.strerror}") from e
    finally:
        disk.close()


class _Audit:
    def __init__(self, disk: FileDisk, bitmap: BitmapView, repo: Repository, before: DiskRecord, part: Slice) -> None:
        self._disk, self._bitmap, self._part = disk, bitmap, part
        self._tree, self._cluster, self._seal = repo.tree(before), repo.cluster_size, repo.seal
        self._buffer = memoryview(bytearray(max(UNIT, self._cluster)))
        self._compared = 0

    def run(self, report: Reporter) -> Findings:
        wrong: list[Extent] = []
        clean = self._bitmap.clean_mask()
        for leaf in range(-(-self._tree.clusters // FANOUT)):
            first = leaf * FANOUT
            count = min(FANOUT, self._tree.clusters - first)
            report(Progress("", first * self._cluster, self._disk.size, "comparing with the base"))
            wanted = self._part.of(first, count, self._cluster) & clean(first, count)
            if wanted.any():
                expected = self._tree.digests(first, count)
                runs = _runs(first, wanted, len(self._buffer) // self._cluster)
                differs = [c for run in runs for c in self._differing(run, first, expected)]
                wrong += [self._extent(c, 1) for c in differs if clean(c, 1)[0]]
        return Findings(self._compared, tuple(merge(wrong)))

    def _extent(self, first: int, count: int) -> Extent:
        start = first * self._cluster
        return Extent(start, min(count * self._cluster, self._disk.size - start))

    def _differing(self, run: range, base: int, expected: NDArray[np.uint8]) -> Iterator[int]:
        """The clusters of ``run`` whose content is not what the leaf that begins at ``base`` says."""
        extent = self._extent(run.start, len(run))
        self._compared += extent.length
        before = expected[run.start - base : run.stop - base]
        if all(e.zero for e in self._disk.extents(*extent)):
            now = np.zeros_like(before)
        else:
            data = self._buffer[: extent.length]
            self._disk.read_into(data, extent.offset)
            now = self._seal.digests(data, self._cluster)
        yield from (run.start + np.flatnonzero((before != now).any(axis=1))).tolist()


def _runs(first: int, wanted: NDArray[np.bool_], most: int) -> Iterator[range]:
    """Runs of wanted clusters, each of ``most`` at most."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wanted, [False]]).astype(np.int8)))
    for start, end in edges.reshape(-1, 2).tolist():
        for at in range(start, end, most):
            yield range(first + at, first + min(at + most, end))

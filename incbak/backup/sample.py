"""Check a bitmap by a sample: random clusters that it calls clean are read again and compared with the base.

A block device that was let go of cleanly is unchanged where the kernel has counted no write since, which it does within
one boot and one set-up of the device only. Later nothing shows whether another program wrote: such a disk is read
whole. Its owner may ask for less (``trust-after-boot = "sample"``), and the bitmap is then believed where none of
`WANTED` clusters differs that had data in the base and are not marked. They are chosen from the system's source of
randomness, each equally likely, so that the choice cannot be predicted; they are read past the page cache, which may
still have what the device had before.

What it shows is a probability. If k of n such clusters were changed, that is missed with about (1 - k/n) ** WANTED: of
a disk of 1 TiB, a changed 1 % is found in 994 of 1000 cases, and a single changed cluster hardly ever. It tells a
device that holds other content (an older state, another disk), not one in which some files were written.

Where fewer clusters can be compared than that, all of them must be, and there must be one; else nothing is believed.
What differs once is invalid for good: the next sample might miss it.
"""

from __future__ import annotations

import mmap
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from incbak.backup.plan import Planned
from incbak.bitmap.look import view_file
from incbak.errors import BitmapError, DiskError
from incbak.extents import Extent, merge
from incbak.opening import open_image
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT, TreeReader

WANTED = 512
_FEW = 16
"""Leaf pages of which all clusters are listed; of more, clusters are drawn until there are enough."""
_ROUNDS = 32
_DICE = secrets.SystemRandom()

Clean = Callable[[int, int], NDArray[np.bool_]]


@dataclass(frozen=True)
class Sampled:
    """``compared``: clusters. ``wrong``: those that differ from the base. ``enough``: whether they suffice."""

    compared: int
    wrong: tuple[Extent, ...]
    enough: bool


def sample_disk(repo: Repository, planned: Planned) -> Sampled:
    """Compare a sample of the clean clusters of a planned disk with its base.

    Raises `BitmapError`, `DiskError` or `DamagedError` when it cannot be done.
    """
    disk, before = planned.plan.disk, planned.before
    bitmap, image = disk.bitmap(planned.plan.base_bitmap or ""), disk.extra.get("path")
    if bitmap is None or not bitmap.path or not image or before is None:
        raise BitmapError("its bitmap is in no file that can be looked at")
    clean = view_file(Path(bitmap.path), sampling=True).clean_mask()
    tree, cluster = repo.tree(before), repo.cluster_size
    chosen, enough = choose_clusters(tree, clean)
    wrong = []
    try:
        with _Uncached(Path(image), cluster) as device:
            for number in chosen:
                extent = Extent(number * cluster, min(cluster, before.size - number * cluster))
                found = repo.seal.digests(device.read(extent), cluster)
                if (found != tree.digests(number, 1)).any() and clean(number, 1)[0]:
                    wrong.append(extent)
    except OSError as e:
        raise DiskError(f"cannot read {image} past the page cache: {e.strerror or e}") from e
    return Sampled(len(chosen), tuple(merge(wrong)), enough)


def choose_clusters(tree: TreeReader, clean: Clean) -> tuple[list[int], bool]:
    """Choose `WANTED` clusters that are clean and not zero, or all, if there are fewer; and whether it was possible."""
    leaves = [leaf for leaf, _digest in tree.leaves()]
    if len(leaves) <= _FEW:
        found = [c for leaf in leaves for c in _usable(tree, clean, leaf, np.arange(FANOUT))]
        return sorted(found if len(found) <= WANTED else _DICE.sample(found, WANTED)), bool(found)
    chosen: set[int] = set()
    for _ in range(_ROUNDS):
        drawn = sorted({_DICE.randrange(len(leaves) * FANOUT) for _ in range(WANTED)})
        places, rows = np.divmod(np.array(drawn), FANOUT)
        new: set[int] = set()
        for place in np.unique(places).tolist():
            new.update(_usable(tree, clean, leaves[place], rows[places == place]))
        more = sorted(new - chosen)
        chosen.update(_DICE.sample(more, min(len(more), WANTED - len(chosen))))
        if len(chosen) == WANTED:
            return sorted(chosen), True
    return sorted(chosen), False


def _usable(tree: TreeReader, clean: Clean, leaf: int, rows: NDArray[np.int64]) -> list[int]:
    """Return those clusters of a leaf page, of the given ``rows``, that have data in the base and no mark."""
    first = leaf * FANOUT
    count = min(FANOUT, tree.clusters - first)
    rows = rows[rows < count]
    data = np.asarray(tree.leaf(leaf).any(axis=1))
    wanted = data[rows] & np.asarray(clean(first, count)[rows])
    return [int(row) + first for row in rows[wanted]]


class _Uncached:
    """A device, read with ``O_DIRECT``: the page cache may hold content from before the last set-up."""

    def __init__(self, path: Path, longest: int) -> None:
        self._fd = open_image(path, os.O_RDONLY | os.O_DIRECT)
        self._buffer = mmap.mmap(-1, max(longest, mmap.PAGESIZE))

    def __enter__(self) -> _Uncached:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def read(self, extent: Extent) -> memoryview:
        """Return the bytes of the extent, until the next call."""
        view = memoryview(self._buffer)[: extent.length]
        if os.preadv(self._fd, [view], extent.offset) != extent.length:
            raise OSError(f"it ends within {extent.length} bytes at {extent.offset}")
        return view

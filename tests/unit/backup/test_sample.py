"""Which clusters a sample looks at, and where it reads them."""

from __future__ import annotations

import os
import random
import secrets
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from incbak.backup import sample
from incbak.backup.sample import WANTED, choose_clusters
from incbak.extents import Extent
from incbak.repo.tree import FANOUT, TreeReader
from tests.kit.devices import loop_device


class Tree(TreeReader):
    """A disk of ``leaves`` pages in which the given clusters have data. ``fetched``: the leaf pages that were read."""

    def __init__(self, leaves: int, data: set[int]) -> None:
        self.clusters, self.data, self.fetched = leaves * FANOUT - 5, data, Counter[int]()

    def leaves(self):  # type: ignore[no-untyped-def]
        yield from ((leaf, b"x") for leaf in sorted({c // FANOUT for c in self.data}))

    def leaf(self, number: int) -> NDArray[np.uint8]:
        self.fetched[number] += 1
        page = np.zeros((FANOUT, 32), dtype=np.uint8)
        page[[c - number * FANOUT for c in self.data if c // FANOUT == number]] = 1
        return page


def _clean(dirty: set[int]):  # type: ignore[no-untyped-def]
    return lambda first, count: np.array([first + i not in dirty for i in range(count)])


def test_nobody_knows_beforehand_what_is_looked_at() -> None:
    assert isinstance(sample._DICE, secrets.SystemRandom)


@pytest.fixture
def _dice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_DICE", random.Random(5))


@pytest.mark.usefixtures("_dice")
@pytest.mark.parametrize("leaves", [3, 40])
def test_only_clean_clusters_with_data_are_chosen(leaves: int) -> None:
    data = set(range(0, leaves * FANOUT - 5, 2))
    dirty = set(range(0, leaves * FANOUT, 4))
    chosen, enough = choose_clusters(Tree(leaves, data), _clean(dirty))
    assert (len(chosen), len(set(chosen)), enough) == (WANTED, WANTED, True)
    assert set(chosen) <= data - dirty
    assert min(chosen) < leaves * FANOUT // 10 < leaves * FANOUT * 9 // 10 < max(chosen)


def test_where_there_are_few_all_are_compared() -> None:
    """Also in the last page, which is not full."""
    data = {3, 7, FANOUT, 2 * FANOUT - 6}
    assert choose_clusters(Tree(2, data), _clean({7})) == ([3, FANOUT, 2 * FANOUT - 6], True)


def test_where_there_is_none_nothing_is_shown() -> None:
    assert choose_clusters(Tree(2, {7}), _clean({7})) == ([], False)
    assert choose_clusters(Tree(2, set()), _clean(set())) == ([], False)


def test_too_few_of_a_large_disk_show_nothing() -> None:
    """What can be drawn is no sample of what cannot be."""
    chosen, enough = choose_clusters(Tree(40, {leaf * FANOUT for leaf in range(40)}), _clean(set()))
    assert not enough
    assert len(chosen) < 41


def test_the_work_does_not_grow_with_the_disk() -> None:
    tree = Tree(3000, set(range(0, 3000 * FANOUT, FANOUT // 4)))
    tree.leaf = lambda number: tree.fetched.update([number]) or np.ones((FANOUT, 32), dtype=np.uint8)  # type: ignore
    assert choose_clusters(tree, lambda first, count: np.ones(count, dtype=bool))[1]
    assert sum(tree.fetched.values()) <= 2 * WANTED


@pytest.mark.root
def test_clusters_are_read_past_the_page_cache(tmp_path: Path) -> None:
    """Who opens a device drops what the cache has of it; another reader may bring it back meanwhile."""
    backing = tmp_path / "backing"
    backing.write_bytes(b"o" * 65536)
    with loop_device(backing) as path, path.open("rb") as reader, sample._Uncached(path, 65536) as device:
        assert reader.read(65536) == b"o" * 65536
        with backing.open("r+b") as f:
            f.write(b"n" * 65536)
            os.fsync(f)
        reader.seek(0)
        assert reader.read(4096) == b"o" * 4096, "the page cache did not keep what it had: nothing is shown"
        assert bytes(device.read(Extent(0, 65536))) == b"n" * 65536

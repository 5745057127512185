"""The tree of a disk: a `TreeUpdate` is a dict, whatever the order, the size and the base."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.errors import DamagedError
from incbak.repo import blob, tree
from incbak.repo.blob import ZERO_DIGEST
from incbak.repo.tree import FANOUT, PAGE, TreeReader, TreeUpdate, depth_of, differing
from tests.unit.repo.scene import CLUSTER, new, record_of, restore, store, writing


class Pages:
    """A store of pages in memory; ``reads`` counts."""

    def __init__(self) -> None:
        self.blobs: dict[bytes, bytes] = {}
        self.reads = 0

    def store(self, data: bytes) -> bytes:
        digest = blob.digest_of(data)
        self.blobs[digest] = data
        return digest

    def fetch(self, digest: bytes) -> bytes:
        self.reads += 1
        if digest not in self.blobs:
            raise DamagedError(f"no page {digest.hex()}")
        return self.blobs[digest]

    def update(self, clusters: int, base: bytes | None, changes: dict[int, bytes], pieces: int = 1) -> bytes:
        update = TreeUpdate(self.fetch, self.store, base, clusters)
        numbers = list(changes)
        for i in range(pieces):
            part = numbers[i::pieces]
            if part:
                digests = np.frombuffer(b"".join(changes[n] for n in part), dtype=np.uint8).reshape(-1, 32)
                update.set(np.array(part, dtype=np.int64), digests)
        return update.finish()


def _digest(number: int) -> bytes:
    return ZERO_DIGEST if number == 0 else blob.digest_of(number.to_bytes(8, "little"))


SIZES = [1, 2, FANOUT - 1, FANOUT, FANOUT + 1, 3 * FANOUT + 5, FANOUT**2, FANOUT**2 + 1]


@st.composite
def _history(draw: st.DrawFn) -> tuple[int, list[dict[int, bytes]], int]:
    clusters = draw(st.sampled_from(SIZES))
    edges = {0, clusters - 1, clusters // 2, min(FANOUT, clusters) - 1, min(FANOUT + 1, clusters) - 1}
    where = st.one_of(st.sampled_from(sorted(edges)), st.integers(0, clusters - 1))
    step = st.dictionaries(where, st.integers(0, 5).map(_digest), max_size=12)
    return clusters, draw(st.lists(step, min_size=1, max_size=4)), draw(st.integers(1, 3))


@settings(max_examples=120, deadline=None)
@given(_history())
def test_an_update_is_a_dict(history: tuple[int, list[dict[int, bytes]], int]) -> None:
    clusters, steps, pieces = history
    pages, root, model = Pages(), None, dict[int, bytes]()
    for changes in steps:
        old = root
        root = pages.update(clusters, root, changes, pieces)
        before, model = model, {k: v for k, v in {**model, **changes}.items() if v != ZERO_DIGEST}
        found = TreeReader(pages.fetch, root, clusters)
        for number in {*model, *changes, 0, clusters - 1}:
            assert found.digests(number, 1)[0].tobytes() == model.get(number, ZERO_DIGEST)
        leaves = [(n, page) for n, digest in found.leaves() for page in [found.page(digest)]]
        told = {n * FANOUT + i: page[i].tobytes() for n, page in leaves for i in np.flatnonzero(page.any(axis=1))}
        assert told == model
        assert root == pages.update(clusters, None, model), "the same content has the same root, whatever its history"
        other = TreeReader(pages.fetch, old if old is not None else ZERO_DIGEST, clusters)
        changed = {n for first, count in differing(other, found) for n in range(first, first + count)}
        assert changed == {n for n in {*before, *model} if before.get(n) != model.get(n)}


@pytest.mark.parametrize(
    ("clusters", "depth"), [(1, 1), (FANOUT, 1), (FANOUT + 1, 2), (FANOUT**2, 2), (FANOUT**2 + 1, 3), (0, 1)]
)
def test_depth(clusters: int, depth: int) -> None:
    assert depth_of(clusters) == depth


def test_all_zero_is_the_zero_root_and_stores_nothing() -> None:
    pages = Pages()
    root = pages.update(5000, None, {n: _digest(1) for n in range(5000)})
    assert pages.update(5000, root, dict.fromkeys(range(5000), ZERO_DIGEST)) == ZERO_DIGEST
    empty = Pages()
    assert empty.update(5000, None, dict.fromkeys(range(5000), ZERO_DIGEST)) == ZERO_DIGEST
    assert empty.blobs == {}


def test_a_small_change_of_a_large_disk_touches_few_pages() -> None:
    """Work in proportion to the change, and equal pages are not read when two trees are compared."""
    pages, clusters = Pages(), FANOUT**2
    base = pages.update(clusters, None, {n * FANOUT: _digest(n + 1) for n in range(FANOUT)})
    stored = len(pages.blobs)
    pages.reads = 0
    root = pages.update(clusters, base, {77 * FANOUT + 3: _digest(9)})
    assert len(pages.blobs) == stored + 2
    assert pages.reads <= 4
    pages.reads = 0
    a, b = (TreeReader(pages.fetch, r, clusters) for r in (base, root))
    assert list(differing(a, b)) == [(77 * FANOUT + 3, 1)]
    assert pages.reads == 4


def test_pages_are_walked_once_and_damage_is_told() -> None:
    pages, clusters = Pages(), 3 * FANOUT
    same = {n: _digest(n % FANOUT + 1) for n in range(3 * FANOUT)}
    found = TreeReader(pages.fetch, pages.update(clusters, None, same), clusters)
    assert [level for _, level, _ in found.pages(set())] == [1, 0], "three equal leaves are one page"
    victim = next(d for d, level, _ in found.pages(set()) if level == 0)
    pages.blobs[victim] = b"short"
    fresh = TreeReader(pages.fetch, found.root, clusters)
    with pytest.raises(DamagedError, match="has 5 bytes"):
        fresh.leaf(0)


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_COMPACT", 2000)
    monkeypatch.setattr(tree, "_CACHE", 2)


@pytest.mark.usefixtures("small_batches")
def test_a_leaf_that_is_touched_again_and_again_through_a_real_writer(tmp_path: Path) -> None:
    """Clusters in any order, more of them than are kept pending: pages made on the way are still in no durable pack."""
    repo = new(tmp_path / "repo")
    clusters = 6 * FANOUT
    order = np.random.default_rng(1).permutation(clusters)
    with writing(repo) as writer:
        update = repo.update(writer, None, clusters * CLUSTER)
        one = store(writer, b"\1" * CLUSTER)
        two = store(writer, b"\2" * CLUSTER)
        for at in range(0, clusters, 100):
            numbers = order[at : at + 100]
            rows = b"".join(one if n % 2 else two for n in numbers.tolist())
            update.set(numbers, np.frombuffer(rows, dtype=np.uint8).reshape(-1, 32))
        made = record_of(repo, {"vda": (clusters * CLUSTER, update.finish())})
        assert update.changed == clusters
        writer.commit(made)
    assert PAGE == FANOUT * 32
    content = restore(repo, made)
    assert all(content[n][0] == (1 if n % 2 else 2) for n in range(clusters))

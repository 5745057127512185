"""Counts of what a chain of trees has, against counting every place of every backup."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.errors import DamagedError
from incbak.repo import tree as trees
from incbak.repo.blob import ZERO_DIGEST, digest_of
from incbak.repo.chains import BEFORE, BrokenError, DisorderError, Link, count_anew, stretches
from incbak.repo.index import Digests
from incbak.repo.tree import TreeReader, TreeUpdate

CLUSTERS = 11
FANOUT = 2


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trees, "FANOUT", FANOUT)
    monkeypatch.setattr(trees, "PAGE", FANOUT * 32)


def content(number: int) -> bytes:
    return digest_of(number.to_bytes(2, "big")) if number else ZERO_DIGEST


class Pages:
    """Where trees are stored, and how often they are read."""

    def __init__(self) -> None:
        self.there: dict[bytes, bytes] = {}
        self.read: list[bytes] = []

    def tree(self, numbers: Sequence[int]) -> bytes:
        """The root of a disk with these clusters."""
        update = TreeUpdate(self.there.__getitem__, self._store, None, len(numbers))
        digests = np.frombuffer(b"".join(map(content, numbers)), dtype=np.uint8).reshape(-1, 32)
        update.set(np.arange(len(numbers)), digests)
        return update.finish()

    def _store(self, page: bytes) -> bytes:
        digest = digest_of(page)
        self.there[digest] = page
        return digest

    def fetch(self, digest: bytes) -> bytes:
        self.read.append(digest)
        if digest not in self.there:
            raise DamagedError(f"page {digest.hex()} is gone")
        return self.there[digest]

    def change(self, old: Sequence[Link], new: Sequence[Link], clusters: int = CLUSTERS) -> Counter[bytes]:
        """What is told when one chain takes the place of the other."""
        found: Counter[bytes] = Counter()

        def tell(digests: Digests, times: int) -> None:
            for digest in digests:
                found[digest.tobytes()] += times

        for before, after in stretches(old, new):
            count_anew(TreeReader(self.fetch, ZERO_DIGEST, clusters), before, after, tell)
        return Counter({digest: times for digest, times in found.items() if times})


def places(pages: Pages, root: bytes, level: int) -> list[bytes]:
    """The digest at every place of a tree, in one order: pages and clusters."""
    if level < 0:
        return [root]
    page = pages.there.get(root, bytes(FANOUT * 32))
    below = [places(pages, page[at : at + 32], level - 1) for at in range(0, FANOUT * 32, 32)]
    return [root, *(digest for part in below for digest in part)]


def counted(pages: Pages, chain: Sequence[Link], clusters: int = CLUSTERS) -> Counter[bytes]:
    """By the definition: once for every run of equal digests at any place."""
    found: Counter[bytes] = Counter()
    level = trees.depth_of(clusters) - 1
    whole = [places(pages, link.digest, level) for link in (BEFORE, *chain)]
    for column in zip(*whole, strict=True):
        for before, now in pairwise(column):
            if now not in (before, ZERO_DIGEST):
                found[now] += 1
    return found


@given(st.integers(0, (1 << 64) - 1))
@settings(max_examples=150, deadline=None)
def test_whatever_joins_and_leaves(seed: int) -> None:
    """The counts by differences are those by the definition, and what is counted is what any tree has."""
    rng = Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trees, "FANOUT", FANOUT)
        patch.setattr(trees, "PAGE", FANOUT * 32)
        pages = Pages()
        numbers = [rng.choice((0, 1, 2, 3)) for _ in range(CLUSTERS)]
        all_links = []
        for name in range(rng.randrange(1, 9)):
            if rng.random() < 0.9:
                numbers = list(numbers)
                for _ in range(rng.choice((0, 1, 2, 9))):
                    numbers[rng.randrange(CLUSTERS)] = rng.choice((0, 1, 2, 3, 4))
            all_links.append(Link(pages.tree(numbers), str(name)))
        chain: list[Link] = []
        counts: Counter[bytes] = Counter()
        for _ in range(4):
            fresh = [link for link in all_links if rng.random() < 0.6]
            counts.update(pages.change(chain, fresh))
            chain = fresh
            counts = Counter({digest: times for digest, times in counts.items() if times})
            assert counts == counted(pages, chain)
        level = trees.depth_of(CLUSTERS) - 1
        there = {digest for link in chain for digest in places(pages, link.digest, level)} - {ZERO_DIGEST}
        assert counts.keys() == there


def test_only_what_differs_is_read() -> None:
    """The oldest goes, or one in the middle, or one comes: of 64 clusters, those beside what changed."""
    pages = Pages()
    contents = [list(range(1, 65)) for _ in range(4)]
    for name in range(1, 4):
        for later in contents[name:]:
            later[name * 9] = 100 + name
    chain = [Link(pages.tree(numbers), str(name)) for name, numbers in enumerate(contents)]
    for old, new in ((chain, chain[1:]), (chain, [*chain[:1], *chain[2:]]), (chain[:3], chain), (chain, chain[:3])):
        pages.read.clear()
        told = pages.change(old, new, 64)
        assert told
        assert len(pages.read) <= 4 * trees.depth_of(64)
        assert sum(map(abs, told.values())) <= 2 * (trees.depth_of(64) + 1)


def test_equal_pages_are_looked_at_once() -> None:
    """Else a forged tree whose pages repeat would be walked for ever: here 2**40 places, of one kind on each level."""
    pages, digest = Pages(), content(7)
    for _ in range(40):
        digest = pages._store(digest * FANOUT)
    found = pages.change([], [Link(digest, "a")], 1 << 40)
    assert found[content(7)] == 1 << 40
    assert len(pages.read) == 40


def test_what_cannot_be_read_says_whose_it_is() -> None:
    """The page of the one that stays, where both have it."""
    pages = Pages()
    one, two = Link(pages.tree([1, 2, 3]), "one"), Link(pages.tree([1, 2, 4]), "two")
    del pages.there[two.digest]
    for old, new in (([], [one, two]), ([one], [one, two]), ([one, two], [one]), ([one, two], [two])):
        with pytest.raises(BrokenError) as error:
            pages.change(old, new, 3)
        assert error.value.owner == "two"


def test_chains_that_do_not_fit() -> None:
    one, two = Link(b"1" * 32, "one"), Link(b"2" * 32, "two")
    for old, new in (([one, two], [two, one]), ([one], [Link(b"3" * 32, "one")])):
        with pytest.raises(DisorderError):
            list(stretches(old, new))
    assert list(stretches([one], [one])) == []
    assert list(stretches([], [one])) == [([BEFORE], [BEFORE, one])]
    assert list(stretches([one, two], [two])) == [([BEFORE, one, two], [BEFORE, two])]

"""The kernels on packed bits do what loops over single bits would."""

from __future__ import annotations

from itertools import groupby

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.bitmap import bits as kernels

SPAN = 200
ranges = st.tuples(st.integers(0, SPAN - 1), st.integers(0, SPAN - 1)).map(lambda t: (min(t), max(t)))


def _packed(members: set[int], clusters: int = SPAN) -> kernels.Bits:
    flags = np.zeros(clusters, dtype=np.uint8)
    flags[sorted(members)] = 1
    return np.packbits(flags, bitorder="little")


def _members(bits: kernels.Bits) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")).tolist())


@given(st.sets(st.integers(0, SPAN - 1)), ranges)
def test_ranges(members: set[int], span: tuple[int, int]) -> None:
    """faults row 60: heads and tails within a byte, across two, across many."""
    first, last = span
    covered = set(range(first, last + 1))
    bits = _packed(members)
    assert kernels.any_in_range(bits, first, last) == bool(members & covered)
    assert kernels.count(bits) == len(members)
    kernels.set_range(bits, first, last)
    assert _members(bits) == members | covered
    kernels.clear_range(bits, first, last)
    assert _members(bits) == members - covered


@given(st.sets(st.integers(0, SPAN - 1)), st.integers(1, SPAN))
def test_runs_are_the_members_in_order(members: set[int], clusters: int) -> None:
    """Bits beyond the last cluster do not count."""
    found = kernels.runs(_packed(members), clusters)
    inside = sorted(m for m in members if m < clusters)
    expected = [list(g) for _, g in groupby(enumerate(inside), lambda p: p[1] - p[0])]
    assert found.tolist() == [[g[0][1], len(g)] for g in expected]
    assert kernels.clusters_of(found).tolist() == inside


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(-3, 3), min_size=2, max_size=2), st.integers(1, 2))
def test_runs_join_where_chunks_meet(around: list[int], chunk: int) -> None:
    """A run across the boundary of the pieces that are unpacked at a time is one run."""
    edge = chunk * (kernels._CHUNK * 8)
    first, last = edge + min(around) - 1, edge + max(around)
    bits = np.zeros(kernels._CHUNK * 3, dtype=np.uint8)
    kernels.set_range(bits, first, last)
    kernels.set_range(bits, 5, 5)
    assert kernels.runs(bits, len(bits) * 8).tolist() == [[5, 1], [first, last - first + 1]]


@pytest.mark.parametrize("clusters", [0, 1, 7, 8, 9])
def test_nothing_marked(clusters: int) -> None:
    bits = np.zeros(kernels.bytes_for(clusters), dtype=np.uint8)
    assert kernels.runs(bits, clusters).shape == (0, 2)
    assert kernels.clusters_of(kernels.runs(bits, clusters)).tolist() == []
    assert kernels.count(bits) == 0

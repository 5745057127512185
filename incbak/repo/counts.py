"""Keys in their order with a count each, and sums of what comes and goes: the arrays under `needs`.

A key is the first 8 bytes of a digest, as in the index. Digests with the same key are counted together, so that none
of them can pass for unneeded while another is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from incbak.repo.columns import Column, near, span
from incbak.repo.index import Digests, prefixes
from incbak.repo.spool import Spool

Keys = NDArray[np.uint64]
Numbers = NDArray[np.int64]
StoredKeys = Keys | Column
StoredNumbers = NDArray[np.uint32] | Numbers | Column

_RUN = 1 << 18
"""Keys that are sorted at once: 4 MiB."""
RANGE = 1 << 19
"""Keys that are looked at together, as far as they are spread evenly, as digests are."""
MOST = (1 << 32) - 1
"""Stands for so many and more."""


def ranges(total: int) -> Iterator[tuple[np.uint64, np.uint64]]:
    """First and last key of as many stretches of all keys as ``total`` of them need."""
    parts = max(-(-total // RANGE), 1)
    bounds = [(part << 64) // parts for part in range(parts + 1)]
    for first, end in pairwise(bounds):
        yield np.uint64(first), np.uint64(end - 1)


def _between(keys: StoredKeys, first: np.uint64, last: np.uint64) -> slice:
    return slice(span(keys, first)[0], span(keys, last)[1])


class Counts:
    """Blocks of sorted keys with their counts, one block after the other. Never changed but by `append`."""

    def __init__(self) -> None:
        self._blocks: list[tuple[StoredKeys, StoredNumbers]] = []
        self._spool = Spool()

    def append(self, keys: Keys, counts: Numbers) -> None:
        """More keys, all behind those that are here."""
        if len(keys):
            self.add_stored(self._spool.put(keys), self._spool.put(counts.astype(np.uint32)))

    def add_stored(self, keys: StoredKeys, counts: StoredNumbers) -> None:
        """As `append`, for what lies in a file already."""
        self._blocks.append((keys, counts))

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self._blocks)

    def of(self, keys: Keys) -> Numbers:
        """The count of each key, which are sorted; -1 where it is not here. Shape (n,)."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for ours, counts in self._blocks:
            part = _between(keys, ours[0], ours[len(ours) - 1])
            wanted = keys[part]
            if len(wanted):
                block = near(ours, len(wanted))
                at = block.searchsorted(wanted)
                hit = block[at] == wanted
                found[part][hit] = counts[at[hit]]
        return found

    def between(self, first: np.uint64, last: np.uint64) -> tuple[Keys, Numbers]:
        """The keys of a stretch, and their counts."""
        return _joined(_slices(self._blocks, first, last))


def _slices(
    pairs: Sequence[tuple[StoredKeys, StoredNumbers]], first: np.uint64, last: np.uint64
) -> list[tuple[Keys, Numbers]]:
    """Of each pair of arrays what lies in a stretch of the keys."""
    found = []
    for keys, numbers in pairs:
        part = _between(keys, first, last)
        if part.start < part.stop:
            found.append((keys[part], numbers[part].astype(np.int64)))
    return found


def _joined(parts: Sequence[tuple[Keys, Numbers]]) -> tuple[Keys, Numbers]:
    if not parts:
        return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
    return np.concatenate([keys for keys, _ in parts]), np.concatenate([numbers for _, numbers in parts])


def laid_over(below: tuple[Keys, Numbers], above: tuple[Keys, Numbers]) -> tuple[Keys, Numbers]:
    """Both together; where both have a key, the one above counts."""
    keys, counts = below
    others, news = above
    at = np.searchsorted(keys, others)
    same = at < len(keys)
    same[same] = keys[at[same]] == others[same]
    counts = counts.copy()
    counts[at[same]] = news[same]
    fresh = ~same
    return np.insert(keys, at[fresh], others[fresh]), np.insert(counts, at[fresh], news[fresh])


def _summed(keys: Keys, numbers: Numbers) -> tuple[Keys, Numbers]:
    """Each key once, with the sum of its numbers, in order; sums of 0 are left out."""
    order = np.argsort(keys, kind="stable")
    keys, numbers = keys[order], numbers[order]
    starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]])) if len(keys) else np.zeros(0, np.int64)
    sums = np.add.reduceat(numbers, starts) if len(starts) else numbers
    stays = np.flatnonzero(sums)
    return keys[starts][stays], sums[stays]


class Tally:
    """By how much the count of each key changes. Memory is bounded, however many there are."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Keys, int]] = []
        self._pending = 0
        self._runs: list[tuple[StoredKeys, StoredNumbers]] = []
        self._spool = Spool()

    def add(self, digests: Digests, times: int) -> None:
        """All of these digests come, or go, so many times."""
        if len(digests):
            self._waiting.append((prefixes(digests), times))
            self._pending += len(digests)
            if self._pending >= _RUN:
                self._sort()

    def _sort(self) -> None:
        if self._waiting:
            numbers = [np.full(len(keys), times, dtype=np.int64) for keys, times in self._waiting]
            keys, sums = _summed(np.concatenate([keys for keys, _ in self._waiting]), np.concatenate(numbers))
            self._runs.append((self._spool.put(keys), self._spool.put(sums)))
            self._waiting, self._pending = [], 0

    def sums(self) -> Iterator[tuple[Keys, Numbers]]:
        """Every key that changes, in order, and by how much; in stretches."""
        self._sort()
        for first, last in ranges(sum(len(keys) for keys, _ in self._runs)):
            yield _summed(*_joined(_slices(self._runs, first, last)))

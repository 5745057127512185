"""Kernels on packed bits: cluster ``i`` is bit ``i & 7`` of byte ``i >> 3``. Pure; memory bounded whatever the size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from incbak.extents import Extent

Bits = NDArray[np.uint8]
Runs = NDArray[np.int64]
"""Shape (n, 2): first cluster and count of each run, sorted, disjoint, not adjacent."""

_CHUNK = 1 << 17
"""Bytes unpacked at a time: a million clusters."""


def bytes_for(clusters: int) -> int:
    """How many bytes hold so many bits."""
    return -(-clusters // 8)


def set_range(bits: Bits, first: int, last: int) -> None:
    """Set the bits ``first`` to ``last``, both included."""
    head, tail = first >> 3, last >> 3
    head_mask, tail_mask = (0xFF << (first & 7)) & 0xFF, 0xFF >> (7 - (last & 7))
    if head == tail:
        bits[head] |= head_mask & tail_mask
        return
    bits[head] |= head_mask
    bits[tail] |= tail_mask
    bits[head + 1 : tail] = 0xFF


def clear_range(bits: Bits, first: int, last: int) -> None:
    """Clear the bits ``first`` to ``last``, both included."""
    head, tail = first >> 3, last >> 3
    head_mask, tail_mask = (0xFF << (first & 7)) & 0xFF, 0xFF >> (7 - (last & 7))
    if head == tail:
        bits[head] &= 0xFF ^ (head_mask & tail_mask)
        return
    bits[head] &= 0xFF ^ head_mask
    bits[tail] &= 0xFF ^ tail_mask
    bits[head + 1 : tail] = 0


def any_in_range(bits: Bits, first: int, last: int) -> bool:
    """Whether any of the bits ``first`` to ``last`` is set."""
    head, tail = first >> 3, last >> 3
    head_mask, tail_mask = (0xFF << (first & 7)) & 0xFF, 0xFF >> (7 - (last & 7))
    if head == tail:
        return bool(bits[head] & head_mask & tail_mask)
    return bool(bits[head] & head_mask or bits[tail] & tail_mask or bits[head + 1 : tail].any())


def count(bits: Bits) -> int:
    """How many bits are set."""
    return int(np.bitwise_count(bits).sum(dtype=np.int64))


def runs(bits: Bits, clusters: int) -> Runs:
    """The runs of set bits among the first ``clusters``."""
    parts: list[Runs] = []
    for start in range(0, bytes_for(clusters), _CHUNK):
        chunk = bits[start : start + _CHUNK]
        if not chunk.any():
            continue
        flags = np.unpackbits(chunk, bitorder="little")[: clusters - start * 8]
        edges = np.flatnonzero(np.diff(flags, prepend=np.uint8(0), append=np.uint8(0)))
        firsts, ends = edges[0::2] + start * 8, edges[1::2] + start * 8
        if len(firsts):
            parts.append(np.stack([firsts, ends - firsts], axis=1).astype(np.int64))
    if not parts:
        return np.empty((0, 2), dtype=np.int64)
    return _joined(np.concatenate(parts))


def _joined(found: Runs) -> Runs:
    """Join runs that touch: those cut at a chunk's edge."""
    starts_new = np.ones(len(found), dtype=bool)
    starts_new[1:] = found[1:, 0] != found[:-1, 0] + found[:-1, 1]
    firsts = found[starts_new, 0]
    lasts = np.append(np.flatnonzero(starts_new)[1:] - 1, len(found) - 1)
    return np.stack([firsts, found[lasts, 0] + found[lasts, 1] - firsts], axis=1)


def clusters_of(found: Runs) -> NDArray[np.int64]:
    """Every cluster of the runs, in order. Shape (n,)."""
    if not len(found):
        return np.empty(0, dtype=np.int64)
    counts = found[:, 1]
    before = np.cumsum(counts) - counts
    return np.repeat(found[:, 0] - before, counts) + np.arange(int(counts.sum()), dtype=np.int64)


def extents_of(found: Runs, granularity: int, size: int) -> list[Extent]:
    """Return the runs as byte extents, cut at ``size``."""
    return [Extent(f * granularity, min(n * granularity, size - f * granularity)) for f, n in found.tolist()]

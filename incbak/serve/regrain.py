"""Bits of one granularity as bits of another: whatever was dirty stays dirty."""

from __future__ import annotations

import numpy as np

from incbak.bitmap import bits as kernels


def regrain(bits: kernels.Bits, size: int, have: int, want: int) -> kernels.Bits:
    """Packed ``bits`` of ``have`` bytes each as bits of ``want`` bytes each, of a disk of ``size`` bytes; a copy."""
    if have == want:
        return bits.copy()
    clusters = -(-size // want)
    edges = np.zeros(clusters + 1, dtype=np.int32)
    runs = kernels.runs(bits, -(-size // have))
    np.add.at(edges, runs[:, 0] * have // want, 1)
    np.add.at(edges, np.minimum(-(-(runs.sum(axis=1) * have) // want), clusters), -1)
    return np.packbits(np.cumsum(edges[:-1]) > 0, bitorder="little")


def all_bits(size: int, granularity: int) -> kernels.Bits:
    """Every cluster of a disk of ``size`` bytes."""
    clusters = -(-size // granularity)
    bits = np.full(kernels.bytes_for(clusters), 0xFF, dtype=np.uint8)
    if clusters & 7:
        bits[-1] = (1 << (clusters & 7)) - 1
    return bits

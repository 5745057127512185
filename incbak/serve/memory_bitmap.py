"""A bitmap that lives in memory only: QEMU's ``persistent: false``, and what a job records beside a persistent one."""

from __future__ import annotations

import threading

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import REGION
from incbak.extents import Extent
from incbak.reasons import Reason


class MemoryBitmap:
    """Has the shape of `incbak.bitmap.file.Bitmap`, is always valid, and is gone with the process."""

    persistent = False
    found = Found.CREATED
    state = State.DIRTY
    reason: Reason | None = None

    def __init__(self, name: str, size: int, granularity: int, *, enabled: bool = True) -> None:
        self.name, self.size, self.granularity, self.enabled = name, size, granularity, enabled
        self.known = bytearray(b"\1" * -(-size // REGION))
        self._shift = granularity.bit_length() - 1
        self._clusters = -(-size // granularity)
        self._bits: kernels.Bits = np.zeros(kernels.bytes_for(self._clusters), dtype=np.uint8)
        self._lock = threading.Lock()

    def touch(self, offset: int, length: int) -> None:
        """Nothing is to be made durable."""

    def set_bits(self, offset: int, length: int) -> None:
        """Set the bits of every cluster that the range touches; ``length`` > 0."""
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        with self._lock:
            kernels.set_range(self._bits, first, last)

    def is_dirty(self, offset: int, length: int) -> bool:
        """Whether any cluster of the range is marked."""
        return kernels.any_in_range(self._bits, offset >> self._shift, (offset + length - 1) >> self._shift)

    def runs(self) -> kernels.Runs:
        """The dirty clusters as (first, count)."""
        return kernels.runs(self._bits, self._clusters)

    def extents(self) -> list[Extent]:
        """The dirty bytes, sorted, cut at the disk's size."""
        return kernels.extents_of(self.runs(), self.granularity, self.size)

    def count(self) -> int:
        """How many bytes are dirty; a last partial cluster counts as what it has."""
        rest = self.size % self.granularity
        short = self.granularity - rest if rest and self.is_dirty(self.size - 1, 1) else 0
        return kernels.count(self._bits) * self.granularity - short

    def packed(self, first: int, end: int) -> kernels.Bits:
        """A private copy of some bytes of the packed bits."""
        with self._lock:
            return np.array(self._bits[first:end])

    def snapshot(self) -> kernels.Bits:
        """A private copy of the bits."""
        with self._lock:
            return np.array(self._bits)

    def merge_bits(self, other: kernels.Bits) -> None:
        """Set all bits that ``other`` (packed, same granularity and size) has."""
        with self._lock:
            np.bitwise_or(self._bits, other, out=self._bits)

    def keep_bits(self, other: kernels.Bits) -> None:
        """Clear all bits that ``other`` does not have."""
        with self._lock:
            np.bitwise_and(self._bits, other, out=self._bits)

    def begin_clear(self) -> None:
        """Forget all marks."""
        self._bits[:] = 0

    def end_clear(self) -> None:
        """Nothing is to be made durable."""

    def resize(self, size: int) -> None:
        """The disk has another size. What it has more counts as written; the caller has stopped writers.

        QEMU calls the new end clean. But where a disk was cut and grows again, a backup still has what was cut off,
        and an incremental that left it out would not be the disk.
        """
        clusters = -(-size // self.granularity)
        bits: kernels.Bits = np.zeros(kernels.bytes_for(clusters), dtype=np.uint8)
        kept = min(len(bits), len(self._bits))
        bits[:kept] = self._bits[:kept]
        if clusters & 7:
            bits[-1] &= 0xFF >> (8 - (clusters & 7))
        if size > self.size:
            kernels.set_range(bits, self.size >> self._shift, clusters - 1)
        with self._lock:
            self._bits, self._clusters, self.size = bits, clusters, size
            self.known = bytearray(b"\1" * -(-size // REGION))

    def set_enabled(self, enabled: bool) -> None:
        """Record writes, or not."""
        self.enabled = enabled


AnyBitmap = Bitmap | MemoryBitmap

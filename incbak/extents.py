"""Extents: half-open byte ranges ``[offset, offset + length)`` of a disk, and the algebra on them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

SECTOR = 512
"""What disks consist of, for QEMU too: a raw file whose size is no multiple of it ends with zeroes up to the next."""


def whole_sectors(size: int) -> int:
    """Return the size of the disk that ``size`` bytes of a raw image make."""
    return -(-size // SECTOR) * SECTOR


class Extent(NamedTuple):
    """``length`` bytes at ``offset``; both in bytes."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        """The first byte after the extent."""
        return self.offset + self.length


class StatusExtent(NamedTuple):
    """``length`` bytes at ``offset`` with an allocation status: ``zero`` reads as zeroes, ``hole`` takes no space."""

    offset: int
    length: int
    zero: bool
    hole: bool


def align_out(extent: Extent, granularity: int, size: int) -> Extent:
    """The smallest extent of whole units of ``granularity`` bytes around ``extent``, cut at ``size``."""
    start = extent.offset - extent.offset % granularity
    end = min(-(-extent.end // granularity) * granularity, size)
    return Extent(start, max(end - start, 0))


def merge(extents: Iterable[Extent]) -> list[Extent]:
    """Sorted, disjoint, non-adjacent extents that cover the same bytes; empty ones vanish."""
    merged: list[Extent] = []
    for extent in sorted(e for e in extents if e.length > 0):
        if merged and extent.offset <= merged[-1].end:
            last = merged[-1]
            merged[-1] = Extent(last.offset, max(last.end, extent.end) - last.offset)
        else:
            merged.append(extent)
    return merged


def split(extent: Extent, at_most: int) -> Iterator[Extent]:
    """``extent`` in pieces of ``at_most`` bytes, cut at multiples of ``at_most``."""
    offset = extent.offset
    while offset < extent.end:
        end = min((offset // at_most + 1) * at_most, extent.end)
        yield Extent(offset, end - offset)
        offset = end


def intersect(a: Iterable[Extent], b: Iterable[Extent]) -> list[Extent]:
    """The bytes in both; each argument sorted and disjoint, as :func:`merge` gives them."""
    left, right = list(a), list(b)
    out: list[Extent] = []
    i = j = 0
    while i < len(left) and j < len(right):
        start, end = max(left[i].offset, right[j].offset), min(left[i].end, right[j].end)
        if start < end:
            out.append(Extent(start, end - start))
        if left[i].end < right[j].end:
            i += 1
        else:
            j += 1
    return out


def total(extents: Iterable[Extent]) -> int:
    """The sum of the lengths, in bytes."""
    return sum(e.length for e in extents)

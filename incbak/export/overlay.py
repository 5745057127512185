"""Writes that are laid over a read-only image, in a file without a name: gone when the process ends."""

from __future__ import annotations

import errno
import logging
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.disk.file import FileDisk
from incbak.errors import DiskError
from incbak.extents import StatusExtent

log = logging.getLogger(__name__)

BLOCK = 4096
_WINDOW = 4 << 30
"""Bytes looked at in one step: a million blocks."""


class Image(Protocol):
    """What lies below."""

    name: str
    size: int

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``."""

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        """Zeroes and data."""


class Overlay:
    """``below`` with writes over it, by blocks of `BLOCK` bytes. Safe for many threads; writes go one at a time."""

    read_only = False

    def __init__(self, below: Image, directory: Path) -> None:
        self.below, self.name, self.size = below, below.name, below.size
        self._blocks = -(-self.size // BLOCK)
        try:
            with tempfile.TemporaryFile(dir=directory) as f:
                f.truncate(self.size)
                self._disk = FileDisk(os.dup(f.fileno()), Path(directory, "overlay"), read_only=False)
        except OSError as e:
            raise DiskError(f"cannot keep writes in {directory}: {e.strerror}", hint="See --scratch-dir.") from e
        self._directory, self._told = directory, False
        self._ours = np.zeros(kernels.bytes_for(self._blocks), dtype=np.uint8)
        self._lock = threading.Lock()

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``, each block from where it is."""
        for start, stop, ours in self._parts(offset, len(buf)):
            part = buf[start - offset : stop - offset]
            (self._disk if ours else self.below).read_into(part, start)

    def write(self, buf: memoryview, offset: int) -> None:
        """Whole blocks are written as they are; of one that is written in part the rest comes from below."""
        with self._lock, self._named():
            self._fill(offset, len(buf))
            self._disk.write(buf, offset)
            self._take(offset, len(buf))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes, which take no space where the file system can punch holes."""
        with self._lock, self._named():
            self._fill(offset, length)
            self._disk.write_zeroes(offset, length, unmap=True)
            self._take(offset, length)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Log, the first time, that the scratch directory is full: its guest is told no more than ENOSPC."""
        try:
            yield
        except OSError as e:
            if e.errno in (errno.ENOSPC, errno.EDQUOT) and not self._told:
                self._told = True
                log.error("%s: the file system of the scratch directory %s is full", self.name, self._directory)
            raise

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        """What is ours counts as data."""
        end = offset + length
        for at in range(offset, end, _WINDOW):
            for start, stop, ours in self._parts(at, min(_WINDOW, end - at)):
                if ours:
                    yield StatusExtent(start, stop - start, zero=False, hole=False)
                else:
                    yield from self.below.extents(start, stop - start)

    def close(self) -> None:
        """Let go of what was written."""
        self._disk.close()

    def _parts(self, offset: int, length: int) -> list[tuple[int, int, bool]]:
        """(start, end, whether it is here) of each stretch of the range."""
        first, last = offset // BLOCK, (offset + length - 1) // BLOCK
        base = first & ~7
        with self._lock:
            window = self._ours[first >> 3 : (last >> 3) + 1].copy()
        bits = np.unpackbits(window, bitorder="little")[first - base : last + 1 - base]
        edges = [0, *(np.flatnonzero(np.diff(bits)) + 1).tolist(), last + 1 - first]
        end = offset + length
        return [
            (max((first + a) * BLOCK, offset), min((first + b) * BLOCK, end), bool(bits[a])) for a, b in pairwise(edges)
        ]

    def _fill(self, offset: int, length: int) -> None:
        """Bring the blocks at both ends here, where the range does not cover them and they are still below."""
        end = offset + length
        for block in dict.fromkeys((offset // BLOCK, (end - 1) // BLOCK)):
            start, stop = block * BLOCK, min((block + 1) * BLOCK, self.size)
            if (start < offset or stop > end) and not kernels.any_in_range(self._ours, block, block):
                old = memoryview(bytearray(stop - start))
                self.below.read_into(old, start)
                self._disk.write(old, start)

    def _take(self, offset: int, length: int) -> None:
        kernels.set_range(self._ours, offset // BLOCK, (offset + length - 1) // BLOCK)

"""A disk in memory, for tests and scratch."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from blake3 import blake3

from incbak.disk.base import Disk
from incbak.extents import StatusExtent
from incbak.fingerprint import Fingerprint

_BLOCK = 4096


class MemoryDisk(Disk):
    """``size`` zero bytes to begin with; nothing is durable and nothing fails."""

    def __init__(self, size: int, *, name: str = "memory", read_only: bool = False) -> None:
        self.name, self.size, self.read_only = name, size, read_only
        self.data = bytearray(size)
        self._generation = 0

    def read_into(self, buf: memoryview, offset: int) -> None:
        if offset + len(buf) > self.size:
            raise OSError(errno.EIO, f"image {self.name} ends at {self.size}")
        buf[:] = memoryview(self.data)[offset : offset + len(buf)]

    def write(self, buf: memoryview | bytes, offset: int) -> None:
        self.data[offset : offset + len(buf)] = buf
        self._generation += 1

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.data[offset : offset + length] = bytes(length)
        self._generation += 1

    def trim(self, offset: int, length: int) -> None:
        self.write_zeroes(offset, length, unmap=True)

    def flush(self) -> None:
        pass

    def resize(self, size: int) -> None:
        self.data = self.data[:size].ljust(size, b"\0")
        self.size = size

    def check_resize(self, size: int) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        end = offset + length
        while offset < end:
            zero = self._is_zero(offset, end)
            start = offset
            while offset < end and self._is_zero(offset, end) == zero:
                offset = min((offset // _BLOCK + 1) * _BLOCK, end)
            yield StatusExtent(start, offset - start, zero=zero, hole=zero)

    def _is_zero(self, offset: int, end: int) -> bool:
        return not any(self.data[offset : min((offset // _BLOCK + 1) * _BLOCK, end)])

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, id(self) & 0xFFFFFFFF, self._generation + 1, blake3(self.data).digest(length=16))

    def close(self) -> None:
        pass

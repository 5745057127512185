"""A disk far larger than any storage: holes, one stretch of data, and a record of what was asked of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from incbak.disk.base import Disk
from incbak.extents import StatusExtent
from incbak.fingerprint import Fingerprint

HUGE = 1 << 50


class HugeDisk(Disk):
    """``data``: from where to where it is no hole, and reads as "d".

    `calls` lists (kind, offset, length) of what was read and changed; `on_change` is called before each change.
    """

    def __init__(self, data: tuple[int, int] = (0, 0), size: int = HUGE) -> None:
        self.name, self.size, self.read_only, self.data = "huge", size, False, data
        self.calls: list[tuple[str, int, int]] = []
        self.on_change: Callable[[str, int, int], None] = lambda kind, offset, length: None

    def _change(self, kind: str, offset: int, length: int) -> None:
        self.on_change(kind, offset, length)
        self.calls.append((kind, offset, length))

    def read_into(self, buf: memoryview, offset: int) -> None:
        self.calls.append(("read", offset, len(buf)))
        first, end = (min(max(edge - offset, 0), len(buf)) for edge in self.data)
        buf[:] = bytes(first) + b"d" * (end - first) + bytes(len(buf) - end)

    def write(self, buf: memoryview | bytes, offset: int) -> None:
        self._change("write", offset, len(buf))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self._change("zero", offset, length)

    def zero_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        self._change("fast", offset, length)
        return True

    def trim(self, offset: int, length: int) -> None:
        self._change("trim", offset, length)

    def flush(self) -> None:
        pass

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        end = offset + length
        for edge in (self.data[0], self.data[1], end):
            if offset < min(edge, end):
                zero = edge != self.data[1] or self.data[0] == self.data[1]
                yield StatusExtent(offset, min(edge, end) - offset, zero=zero, hole=zero)
                offset = min(edge, end)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, 1, 1, bytes(16))

    def close(self) -> None:
        pass

"""A disk that fails or stalls when told to: a wrapper with the disk's own interface."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

from incbak.disk.base import Disk
from incbak.extents import StatusExtent
from incbak.fingerprint import Beat, Fingerprint


@dataclass
class Faults:
    """What happens to which call: ``fail["read"] = (3, EIO)`` fails the third read and all later ones, once if
    ``once``; an operation in ``stall`` waits until its event is set.
    """

    fail: dict[str, tuple[int, int]] = field(default_factory=dict)
    once: bool = False
    stall: dict[str, threading.Event] = field(default_factory=dict)
    seen: dict[str, int] = field(default_factory=dict)

    def strike(self, kind: str) -> None:
        """Count a call and do what was asked."""
        self.seen[kind] = count = self.seen.get(kind, 0) + 1
        if event := self.stall.get(kind):
            event.wait()
        nth, code = self.fail.get(kind, (0, errno.EIO))
        if nth and (count == nth or (count > nth and not self.once)):
            raise OSError(code, os.strerror(code), f"(injected {kind} fault)")


class FaultyDisk(Disk):
    """``inner`` with ``faults``; kinds are ``read``, ``write``, ``zero``, ``trim``, ``flush`` and ``resize``."""

    def __init__(self, inner: Disk, faults: Faults) -> None:
        self.inner, self.faults = inner, faults
        self.name, self.size, self.read_only = inner.name, inner.size, inner.read_only

    def read_into(self, buf: memoryview, offset: int) -> None:
        self.faults.strike("read")
        self.inner.read_into(buf, offset)

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        if "read" in self.faults.stall or "read" in self.faults.fail:
            return False
        return self.inner.read_nowait(buf, offset)

    def write(self, buf: memoryview | bytes, offset: int) -> None:
        self.faults.strike("write")
        self.inner.write(buf, offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.faults.strike("zero")
        self.inner.write_zeroes(offset, length, unmap=unmap)

    def zero_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        self.faults.strike("zero")
        return self.inner.zero_fast(offset, length, unmap=unmap)

    def trim(self, offset: int, length: int) -> None:
        self.faults.strike("trim")
        self.inner.trim(offset, length)

    def flush(self) -> None:
        self.faults.strike("flush")
        self.inner.flush()

    def resize(self, size: int) -> None:
        self.faults.strike("resize")
        self.inner.resize(size)
        self.size = self.inner.size

    def check_resize(self, size: int) -> None:
        self.inner.check_resize(size)

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        return self.inner.extents(offset, length)

    def fingerprint(self) -> Fingerprint:
        return self.inner.fingerprint()

    def settle(self) -> None:
        self.inner.settle()

    def beat(self) -> Beat:
        return self.inner.beat()

    def close(self) -> None:
        self.inner.close()

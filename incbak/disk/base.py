"""The contract of a disk: every implementation keeps it, and one test suite checks them all."""

from __future__ import annotations

import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator

from incbak.extents import StatusExtent
from incbak.fingerprint import Beat, Fingerprint


class Disk(ABC):
    """Bytes ``0`` to ``size``. Safe for many threads. Offsets and lengths need no alignment; the caller keeps them
    inside the disk. A failure of the storage surfaces as `OSError` with the errno that the storage gave.
    """

    name: str
    """For messages."""
    size: int
    """Bytes; any number, but of an image in a file or on a device whole sectors."""
    read_only: bool

    @abstractmethod
    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``; never short: a disk that ends early raises ``EIO``."""

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        """Fill ``buf`` if that needs no wait for the storage; false means it does, or fails; ``buf`` is undefined."""
        self.read_into(buf, offset)
        return True

    @abstractmethod
    def write(self, buf: memoryview | bytes, offset: int) -> None:
        """Write all of ``buf``; visible to readers at once, durable after `flush`."""

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """The range reads as zeroes afterwards; with ``unmap`` it may take no space."""

    def zero_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        """As `write_zeroes`, where that takes far less than writing them would; false, and nothing is changed, else."""
        return False

    @abstractmethod
    def trim(self, offset: int, length: int) -> None:
        """The content of the range is of no more interest; what it reads as is undefined but stable."""

    @abstractmethod
    def flush(self) -> None:
        """All writes that had completed are durable. The first failure is final: every later flush fails too."""

    def flush_times(self) -> None:
        """As `flush`; also when it was written is durable, where that is known at all."""
        self.flush()

    def resize(self, size: int) -> None:
        """``size`` bytes from now on: what is cut off is gone, what is added reads as zeroes. Nobody writes meanwhile.

        Raises `OSError` where the size cannot be had; then it is as before.
        """
        self.check_resize(size)

    def check_resize(self, size: int) -> None:
        """Raises `OSError` where it is plain that `resize` would."""
        raise OSError(errno.EOPNOTSUPP, f"{self.name} cannot be resized")

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        """Tiles the range exactly, in order; data is never reported as zero."""

    @abstractmethod
    def fingerprint(self) -> Fingerprint:
        """What tells this disk, now, from another one or another time; call it after `flush`, with no writer."""

    def settle(self) -> None:  # noqa: B027
        """Bring what was written as far down as it shows in a `fingerprint`."""

    def beat(self) -> Beat:
        """A sign of life of who has the disk open, with what is cheap to see of it; at any time."""
        return Beat(time.time_ns())

    @abstractmethod
    def close(self) -> None:
        """Release the disk and its locks; idempotent; flushes nothing."""

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``; for short reads where a buffer does not pay."""
        buf = bytearray(length)
        self.read_into(memoryview(buf), offset)
        return bytes(buf)

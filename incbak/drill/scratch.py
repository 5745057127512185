"""A sparse file without a name, which holds one partition for a tool to look at: it is gone when we are."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from incbak.drill.partitions import Part
from incbak.errors import DiskError

NOBODY = 65534


class Scratch:
    """``part`` of a disk, in ``directory``; zeroes until it is written. Safe for many threads. A context."""

    def __init__(self, part: Part, directory: Path) -> None:
        self.part, self._directory = part, directory
        try:
            with tempfile.TemporaryFile(dir=directory) as f:
                self.fd = os.dup(f.fileno())
            os.ftruncate(self.fd, part.length)
            if os.geteuid() == 0:
                os.fchown(self.fd, NOBODY, NOBODY)
        except OSError as e:
            raise DiskError(f"cannot make a file in {directory}: {e.strerror}", hint="See --scratch-dir.") from e

    def put(self, data: bytes | memoryview, offset: int) -> None:
        """Of ``data`` at ``offset`` of the disk, what is inside of the partition. Raises `OSError`."""
        first, last = max(offset, self.part.start), min(offset + len(data), self.part.start + self.part.length)
        view = memoryview(data)[first - offset : max(last - offset, 0)]
        at = first - self.part.start
        try:
            while len(view):
                done = os.pwrite(self.fd, view, at)
                view, at = view[done:], at + done
        except OSError as e:
            raise OSError(e.errno, f"scratch directory {self._directory}: {e.strerror}") from e

    def read(self, offset: int, length: int) -> bytes:
        """Of the partition."""
        return os.pread(self.fd, length, offset)

    def write(self, data: bytes, offset: int) -> None:
        """Into the partition."""
        os.pwrite(self.fd, data, offset)

    @property
    def path(self) -> str:
        """A name for a program that inherits ``fd``."""
        return f"/proc/self/fd/{self.fd}"

    def close(self) -> None:
        """Gone."""
        os.close(self.fd)

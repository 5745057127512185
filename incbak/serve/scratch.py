"""Where old content goes before a guest overwrites it: an unlinked sparse file per job, bounded for all together."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from pathlib import Path

from incbak.errors import DiskError

_PUNCH_HOLE_KEEP_SIZE = 0x02 | 0x01
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class Budget:
    """The bytes that all scratch files of a process may hold together. Thread safe."""

    def __init__(self, directory: Path, limit: int | None = None) -> None:
        self.directory = directory
        self._limit = limit
        self._lock = threading.Lock()
        self._asked = (0.0, 0)
        self.used = 0

    @property
    def limit(self) -> int:
        """Bytes; without a fixed one, half of what is free in the directory besides; asked once a second."""
        if self._limit is not None:
            return self._limit
        when, limit = self._asked
        if time.monotonic() > when + 1 or not limit:
            stat = os.statvfs(self.directory)
            limit = (stat.f_bavail * stat.f_frsize + self.used) // 2
            self._asked = (time.monotonic(), limit)
        return limit

    @property
    def pressed(self) -> bool:
        """Whether more than half of it is used."""
        return bool(self.used) and self.used > self.limit // 2

    def charge(self, count: int) -> None:
        """Take ``count`` bytes. Raises `OSError` ``ENOSPC`` when they are not there."""
        limit = self.limit
        with self._lock:
            if self.used + count > limit:
                raise OSError(errno.ENOSPC, f"the scratch limit of {limit} bytes is reached")
            self.used += count

    def release(self, count: int) -> None:
        """Give ``count`` bytes back."""
        with self._lock:
            self.used -= count


class Scratch:
    """One file with the offsets of the disk; what was not written reads as zeroes. Nameless: it goes with us."""

    def __init__(self, budget: Budget, size: int) -> None:
        """Raises `DiskError` when the directory cannot hold such a file."""
        self._budget = budget
        self._lock = threading.Lock()
        self.held = 0
        try:
            self._fd = os.open(budget.directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
            os.ftruncate(self._fd, size)
        except OSError as e:
            hint = "Choose another directory with --scratch-dir."
            raise DiskError(f"cannot make a scratch file in {budget.directory}: {e.strerror}", hint=hint) from e

    def write(self, data: memoryview, offset: int) -> None:
        """Keep ``data``; each byte is written at most once. Raises `OSError`, ``ENOSPC`` beyond the budget."""
        self._budget.charge(len(data))
        with self._lock:
            self.held += len(data)
        try:
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as e:
            what = f"the file system of the scratch directory {self._budget.directory} is full"
            raise OSError(e.errno, what) if e.errno in (errno.ENOSPC, errno.EDQUOT) else e

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer``. Raises `OSError`."""
        while buffer:
            count = os.preadv(self._fd, [buffer], offset)
            if not count:
                raise OSError(errno.EIO, "the scratch file is shorter than the disk")
            buffer, offset = buffer[count:], offset + count

    def pressed(self) -> bool:
        """Whether this file holds something, and the budget is more than half used."""
        return bool(self.held) and self._budget.pressed

    def discard(self, offset: int, length: int, held: int) -> None:
        """Let a range go, of which ``held`` bytes were written. A file system that cannot punch keeps the space."""
        if held and _libc.fallocate(self._fd, _PUNCH_HOLE_KEEP_SIZE, offset, length) == 0:
            with self._lock:
                self.held -= held
            self._budget.release(held)

    def close(self) -> None:
        """Everything goes, and the budget has it back."""
        with self._lock:
            if self._fd < 0:
                return
            os.close(self._fd)
            self._fd = -1
        self._budget.release(self.held)
        self.held = 0

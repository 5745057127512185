"""Image locks that QEMU understands: so QEMU and incbak refuse to open one image for writing twice.

As QEMU's ``block/file-posix.c`` does it: for each permission a process has, it holds a shared OFD lock on byte
``100 + bit``; for each permission it does not let others have, on byte ``200 + bit``. Who wants a permission looks
whether another holds the byte that forbids it. OFD locks belong to the open file, so they go when the process does.
"""

from __future__ import annotations

import fcntl
import os
import struct

from incbak.errors import ImageInUseError
from incbak.opening import open_image

PERMISSION_BASE, UNSHARED_BASE = 100, 200
CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE = range(4)
_ALL = (CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE)
_FLOCK = struct.Struct("@hhqqi4x")

READER = ((CONSISTENT_READ,), (WRITE, RESIZE))
"""Permissions taken, and permissions refused to others."""
WRITER = ((CONSISTENT_READ, WRITE, RESIZE), (WRITE, RESIZE))


def _lock(fd: int, kind: int, byte: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def _held_by_another(fd: int, byte: int) -> bool:
    answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def writer_present(path: str) -> bool:
    """Whether another process has the image open for writing, as far as it takes locks. Raises `OSError`."""
    fd = open_image(path, os.O_RDONLY)
    try:
        return _held_by_another(fd, PERMISSION_BASE + WRITE)
    finally:
        os.close(fd)


def lock_image(fd: int, path: str, *, write: bool) -> None:
    """Take the locks of a writer or a reader on ``fd``; they last until it is closed. Raises `ImageInUseError`."""
    wanted, refused = WRITER if write else READER
    try:
        for bit in wanted:
            _lock(fd, fcntl.F_RDLCK, PERMISSION_BASE + bit)
        for bit in refused:
            _lock(fd, fcntl.F_RDLCK, UNSHARED_BASE + bit)
    except BlockingIOError:
        raise _in_use(path) from None
    clash = any(_held_by_another(fd, UNSHARED_BASE + bit) for bit in wanted)
    if clash or any(_held_by_another(fd, PERMISSION_BASE + bit) for bit in refused):
        for bit in _ALL:
            _lock(fd, fcntl.F_UNLCK, PERMISSION_BASE + bit)
            _lock(fd, fcntl.F_UNLCK, UNSHARED_BASE + bit)
        raise _in_use(path)


def _in_use(path: str) -> ImageInUseError:
    hint = "Stop the virtual machine or server that has it open, or back it up through its monitor: qmp:PATH."
    return ImageInUseError(f"image {path} is in use by another process", hint=hint)

"""Files that somebody else names are opened only when they are known to be files.

Opening is enough for harm: a watchdog is armed, a tape is wound, a FIFO keeps its reader waiting for ever, a terminal
becomes ours. A name that a peer gives (a monitor's image) or that an administrator mistypes may be any of these. So the
name is looked up without opening what it stands for (``O_PATH``), and what was found, not the name, is opened.

Every name that somebody else gives is opened here, or with ``O_DIRECTORY``, or is a socket that is connected to:

- an image, also one that is only looked at: `open_image`;
- a text of the user (configuration, passphrase, attachment, key, certificate): `open_text`, which also takes the pipe
  that a shell makes of ``<(command)``: it is open already, and its writer is the user's own process;
- what incbak has made itself, and no link: `open_regular`.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_image(path: Path | str, flags: int) -> int:
    """Return a descriptor of a regular file or a block device; symbolic links are followed. Raises `OSError`."""
    return _open(path, flags, devices=True, follow=True)


def open_regular(path: Path | str, flags: int) -> int:
    """Return a descriptor of a regular file whose name is no symbolic link. Raises `OSError`."""
    return _open(path, flags)


def open_text(path: Path | str) -> BinaryIO:
    """Return what a user named to be read: a regular file, or a pipe without a name; links are followed.

    Raises `OSError`.
    """
    fd = _open(path, os.O_RDONLY, follow=True, pipes=True)
    os.set_blocking(fd, True)
    return open(fd, "rb")


def _nameless(found: os.stat_result) -> bool:
    """Return whether a FIFO is a pipe of a process, which no name in a directory leads to."""
    ends = os.pipe()
    try:
        return found.st_dev == os.fstat(ends[0]).st_dev
    finally:
        for fd in ends:
            os.close(fd)


def _open(path: Path | str, flags: int, *, devices: bool = False, follow: bool = False, pipes: bool = False) -> int:
    found = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if follow else os.O_NOFOLLOW))
    try:
        info = os.fstat(found)
        mode = info.st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        known = stat.S_ISREG(mode) or (devices and stat.S_ISBLK(mode))
        if not known and not (pipes and stat.S_ISFIFO(mode) and _nameless(info)):
            what = "neither a file nor a block device" if devices else "not a regular file"
            raise OSError(errno.EINVAL, f"it is {what}", str(path))
        return os.open(f"/proc/self/fd/{found}", flags | os.O_NONBLOCK | os.O_CLOEXEC)  # of a drive: no tray is moved
    finally:
        os.close(found)

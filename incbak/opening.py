"""Files that somebody else names are opened only when they are known to be files.

Opening is enough for harm: a watchdog is armed, a tape is wound, a FIFO keeps its reader waiting for ever, a terminal
becomes ours. A name that a peer gives (a monitor's image) or that an administrator mistypes may be any of these. So the
name is looked up without opening what it stands for (``O_PATH``), and what was found, not the name, is opened.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def open_image(path: Path | str, flags: int) -> int:
    """Return a descriptor of a regular file or a block device; symbolic links are followed. Raises `OSError`."""
    return _open(path, flags, devices=True)


def open_regular(path: Path | str, flags: int) -> int:
    """Return a descriptor of a regular file whose name is no symbolic link. Raises `OSError`."""
    return _open(path, flags, devices=False)


def _open(path: Path | str, flags: int, *, devices: bool) -> int:
    found = os.open(path, os.O_PATH | os.O_CLOEXEC | (0 if devices else os.O_NOFOLLOW))
    try:
        mode = os.fstat(found).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(mode) and not (devices and stat.S_ISBLK(mode)):
            what = "neither a file nor a block device" if devices else "not a regular file"
            raise OSError(errno.EINVAL, f"it is {what}", str(path))
        return os.open(f"/proc/self/fd/{found}", flags | os.O_NONBLOCK | os.O_CLOEXEC)  # of a drive: no tray is moved
    finally:
        os.close(found)

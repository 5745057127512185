"""Decide whether the times of a file prove that it was not written: only on file systems known to keep them.

The kernel keeps the times of its own file systems. What FUSE shows is a program's word: ``nbdfuse`` and QEMU's FUSE
exports show a disk as a file whose times and inode stay as they are while it is written elsewhere. So of FUSE only
programs count that store files, or show those of a file system below, with the times that these have. All others, and
those that do not say which they are, show nothing.

Shared directories of a virtual machine's host (virtiofs, whose files look like those of FUSE, and 9p) count: the server
is asked, and keeps the times of files that it stores. The client may know them only as they were some seconds ago; so
it is with NFS, and as there, other hosts that write at the same time are not seen.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from incbak.mounts import PASSING, kind_of

_FUSE = 0x65735546
_STATFS_SIZE = 256
_STORING = frozenset({"sshfs", "glusterfs", "ceph", "ceph-fuse", "ntfs", "ntfs-3g", "exfat", "fuse2fs"})
"""They keep files on a server or a disk, with a time of change that each write sets."""
_KEEPING = frozenset({"virtiofs", "fuseblk", *PASSING, *(f"fuse.{name}" for name in _STORING)})
"""Types of mounts. ``fuseblk`` is a file system on a block device: NTFS, exFAT."""

_libc = ctypes.CDLL(None, use_errno=True)


def are_kept(path: Path) -> bool:
    """Return whether unchanged times prove that a file was not written; false where the file cannot be looked at."""
    with suppress(OSError):
        if _magic(path) != _FUSE:
            return True
        kind = kind_of(path)
        return kind in _KEEPING or kind.startswith("fuseblk.")
    return False


def _magic(path: Path) -> int:
    """Return the type of the file system, as the kernel numbers it. Raises `OSError`."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return int(ctypes.c_long.from_buffer(buffer).value)

"""Whether the times of a file show that nobody wrote to it: only on file systems that are known to keep them.

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

_MOUNTS = Path("/proc/self/mountinfo")
_FUSE = 0x65735546
_STATFS_SIZE = 256
_STORING = frozenset({"sshfs", "glusterfs", "ceph", "ceph-fuse", "ntfs", "ntfs-3g", "exfat", "fuse2fs"})
"""They keep files on a server or a disk, with a time of change that each write sets."""
_PASSING = frozenset({"mergerfs", "bindfs", "mhddfs", "rofs", "unionfs", "unionfs-fuse", "fuse-overlayfs"})
"""They pass on what a file system below says of its files: see also `incbak.disk.users`."""
_KEEPING = frozenset({"virtiofs", "fuseblk"} | {f"fuse.{name}" for name in _STORING | _PASSING})
"""Types of mounts. ``fuseblk`` is a file system on a block device: NTFS, exFAT."""

_libc = ctypes.CDLL(None, use_errno=True)


def are_kept(path: Path) -> bool:
    """Return whether a file whose times are what they were has not been written. What cannot be told is not so."""
    with suppress(OSError):
        if _magic(path) != _FUSE:
            return True
        kind = _kind(path.stat().st_dev)
        return kind in _KEEPING or kind.startswith("fuseblk.")
    return False


def _magic(path: Path) -> int:
    """Return the type of the file system, as the kernel numbers it. Raises `OSError`."""
    buffer = ctypes.create_string_buffer(_STATFS_SIZE)
    if _libc.statfs(os.fsencode(path), buffer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(path))
    return int(ctypes.c_long.from_buffer(buffer).value)


def _kind(device: int) -> str:
    """Return the type of the mounts of ``device``, with that of FUSE; nothing where there is none in our namespace."""
    number = f"{os.major(device)}:{os.minor(device)}"
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split(" ")[2] == number:
            return source.split(" ")[0]
    return ""

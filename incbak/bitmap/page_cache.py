"""Which page cache a file's content is in: what a killed owner stored and never synced is there, or is gone.

The same boot is not enough. A file system that failed, was unmounted, repaired and mounted again has lost what was in
its page cache, and the host has not been down. So the id of a page cache is of the boot and of the mounted file system:
of its superblock, that is. All mounts that share one superblock (bind mounts, other mount namespaces) share its pages.

ext4, XFS, F2FS and btrfs have a directory in sysfs for each superblock, from its mount to its last unmount. The kernel
gives each new directory of sysfs another inode number (since Linux 4.14; before, a number may come again), which is the
same in all mounts of sysfs, and which a remount leaves as it is.

Not told apart, as the boot alone stands for them: mounts of other file systems. A tmpfs has no files left after its
unmount; NFS, FUSE, overlay and the rest could lose what was not synced. So could those above where ``/sys`` is hidden.
Nor is it seen that a file system lost pages and stays mounted: a sync that fails shows that (`incbak.bitmap`), and the
kernel takes no store into a file system that was shut down.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from pathlib import Path

from blake3 import blake3

from incbak import host

_SYS = Path("/sys")
_KINDS = ("ext4", "xfs", "f2fs")
_BTRFS_FS_INFO, _BTRFS_FS_INFO_SIZE, _FSID = 0x8400941F, 1024, slice(16, 32)
_HALF = 8


def page_cache_id(fd: int) -> bytes:
    """Return the id of the page cache of an open file: 8 bytes for the boot, 8 for the boot and the superblock."""
    boot = host.boot_id()
    return _digest(boot) + _digest(boot + b"/" + _superblock(fd))


def of_one_boot(one: bytes, other: bytes) -> bool:
    """Return whether two ids are of the same boot."""
    return one[:_HALF] == other[:_HALF]


def _digest(what: bytes) -> bytes:
    return blake3(what).digest(length=_HALF)


def _superblock(fd: int) -> bytes:
    """Return what no other superblock has in this boot; nothing where the kernel does not tell."""
    try:
        return b"".join(
            b"%s=%d/" % (os.fsencode(place), place.stat().st_ino) for place in _places(fd) if place.is_dir()
        )
    except OSError:
        return b""


def _places(fd: int) -> list[Path]:
    """Return where sysfs may have the directory of the file system. Raises `OSError`."""
    device = os.fstat(fd).st_dev
    if os.major(device):
        name = os.readlink(_SYS / "dev/block" / f"{os.major(device)}:{os.minor(device)}").rpartition("/")[2]
        return [_SYS / "fs" / kind / name for kind in _KINDS]
    info = bytearray(_BTRFS_FS_INFO_SIZE)
    fcntl.ioctl(fd, _BTRFS_FS_INFO, info)
    return [_SYS / "fs/btrfs" / str(uuid.UUID(bytes=bytes(info[_FSID])))]

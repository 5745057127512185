"""What tells one disk, at one moment, from another, and what a disk's owner notes while it lives.

What another program cannot make equal, or not by accident, is compared: a file's inode, its time of change (``mtime``),
and the time of its inode's change (``ctime``), which no program can set. Permissions, owners and links move the latter
too; `Fingerprint.attributes` tells of them. A block device has no times; its kernel's count of writes stands for them,
within one boot and one set-up. What is unknown is never equal to anything: see `Fingerprint.writes`.
"""

from __future__ import annotations

import time
from typing import NamedTuple

NO_WRITES = bytes(32)


class Fingerprint(NamedTuple):
    """The state of a disk that nobody has open.

    ``mtime_ns`` and ``inode`` are 0 for block devices, whose node says nothing of their content. ``sample``
    is a 16-byte BLAKE3 digest of blocks spread over the disk, the first and the last among them: it tells
    another disk of the same size, not every change. ``ctime_ns`` is 0 where it is not to be compared.
    ``writes``: of a block device, 16 bytes for the boot and the set-up, 16 for the count; `NO_WRITES` otherwise.
    """

    size: int
    inode: int
    mtime_ns: int
    sample: bytes
    ctime_ns: int = 0
    attributes: bytes = bytes(8)
    writes: bytes = NO_WRITES


class Beat(NamedTuple):
    """A sign of life of a disk's owner: the clock, read first, and the disk's times and count as they were then.

    ``mtime_ns`` is 0 where only the clock is known.
    """

    clock_ns: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    writes: bytes = NO_WRITES


def beat_of(disk: Fingerprint) -> Beat:
    """A sign of life of now, of a disk that was not written since its fingerprint was taken."""
    return Beat(time.time_ns(), disk.mtime_ns, disk.ctime_ns, disk.writes)

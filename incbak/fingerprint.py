"""What tells one disk, at one moment, from another: kept in a bitmap's header at a clean shutdown."""

from __future__ import annotations

from typing import NamedTuple


class Fingerprint(NamedTuple):
    """The state of a disk that nobody has open.

    ``mtime_ns`` and ``inode`` are 0 for block devices, whose node says nothing of their content. ``sample``
    is a 16-byte BLAKE3 digest of blocks spread over the disk, the first and the last among them: it tells
    another disk of the same size, not every change.
    """

    size: int
    inode: int
    mtime_ns: int
    sample: bytes

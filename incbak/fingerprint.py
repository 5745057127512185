"""What tells one disk, at one moment, from another, and what a disk's owner notes while it lives.

What another program cannot make equal, or not by accident, is compared: a file's inode, its time of change (``mtime``),
and the time of its inode's change (``ctime``), which no program can set. Permissions, owners and links move the latter
too; `Fingerprint.attributes` tells of them, for the reason that is given. A block device has no times; what
`incbak.device` tells stands for them, within one boot and one set-up. Where the times of a file show nothing
(`incbak.times`), they are compared all the same, and do not suffice. What is unknown is never equal to anything: see
`Fingerprint.writes`.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import time
from pathlib import Path
from typing import NamedTuple

from blake3 import blake3

from incbak import device, times
from incbak.extents import whole_sectors
from incbak.opening import open_image

NO_WRITES = bytes(32)
_SAMPLES, _SAMPLE = 16, 4096


class Fingerprint(NamedTuple):
    """The state of a disk that nobody has open.

    ``mtime_ns`` and ``inode`` are 0 for block devices, whose node says nothing of their content. ``sample`` is a
    16-byte BLAKE3 digest of blocks spread over the disk, the first and the last among them: it tells another disk of
    the same size, not every change. ``ctime_ns`` is 0 in what was recorded where it is not to be compared. ``writes``:
    of a block device, 16 bytes for the boot and the set-up, 16 for the count; of a file `NO_WRITES`, or what equals
    nothing where its times show nothing.
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

    ``mtime_ns`` is 0 where only the clock is known. ``until_ns``: how late its own writes may be, as it
    noted around them; 0 where it has noted nothing. ``durable_ns``: times of change and of the inode's change that were
    known to be on the disk, so that no power cut takes them back.
    """

    clock_ns: int
    mtime_ns: int = 0
    ctime_ns: int = 0
    writes: bytes = NO_WRITES
    until_ns: int = 0
    durable_ns: tuple[int, int] = (0, 0)


def beat_of(disk: Fingerprint) -> Beat:
    """A sign of life of now, of a disk that was not written since its fingerprint was taken."""
    return Beat(time.time_ns(), disk.mtime_ns, disk.ctime_ns, disk.writes)


def take(fd: int, size: int, untold: bytes | None = None) -> Fingerprint:
    """The fingerprint of an open image, of which all that was written is on its device. Raises `OSError`.

    ``size``: in bytes; of a raw file in whole sectors. ``untold``: see `writes_of` and `writes_of_file`.
    """
    info = os.fstat(fd)
    digest = blake3()
    last = max(size - _SAMPLE, 0)
    for i in range(_SAMPLES):
        offset = last * i // (_SAMPLES - 1)
        digest.update(_read(fd, offset, min(_SAMPLE, size - offset), info.st_size))
    sample = digest.digest(length=16)
    if stat.S_ISBLK(info.st_mode):
        return Fingerprint(size, 0, 0, sample, writes=writes_of(fd, untold))
    attributes = struct.pack("<4Q", info.st_uid, info.st_gid, info.st_mode, info.st_nlink)
    known = blake3(attributes).digest(length=8)
    writes = writes_of_file(fd, untold)
    return Fingerprint(size, info.st_ino, info.st_mtime_ns, sample, info.st_ctime_ns, known, writes)


def without_ctime(image: Fingerprint) -> Fingerprint:
    """Return the fingerprint to record of an image whose ctime other programs move, as its owner says."""
    return image._replace(ctime_ns=0, attributes=bytes(8))


def of_content(image: Fingerprint, size: int) -> Fingerprint:
    """Return the fingerprint of a disk of ``size`` bytes that an image of another format than raw holds."""
    sample = blake3(image.sample + image.size.to_bytes(8, "little")).digest(length=16)
    return image._replace(size=size, sample=sample)


def _read(fd: int, offset: int, length: int, end: int) -> bytes:
    """``end``: that of the file, behind which its last sector is zeroes."""
    found = b""
    while len(found) < length:
        piece = os.pread(fd, length - len(found), offset + len(found))
        if not piece and offset + len(found) >= end and offset + length <= whole_sectors(end):
            return found.ljust(length, b"\0")
        if not piece:
            raise OSError(errno.EIO, f"it ends at {offset + len(found)}")
        found += piece
    return found


def unlike_any() -> bytes:
    """Return what stands for the writes of a device that tells nothing of them: it equals nothing else."""
    return os.urandom(32)


def writes_of(fd: int, untold: bytes | None = None) -> bytes:
    """What `incbak.device` tells of a block device; where it tells nothing, ``untold`` or what equals nothing."""
    counted = device.writes(Path(f"/proc/self/fd/{fd}"))
    if not counted:
        return untold or unlike_any()
    setup, _, counts = counted.encode().partition(b";")
    return blake3(setup).digest(length=16) + blake3(counts).digest(length=16)


def writes_of_file(fd: int, untold: bytes | None = None) -> bytes:
    """Return `NO_WRITES` where each write changes the file's times, else ``untold`` or a value that equals no other."""
    return NO_WRITES if times.are_kept(Path(f"/proc/self/fd/{fd}")) else untold or unlike_any()


def take_path(path: Path, *, raw: bool) -> Fingerprint:
    """Return the fingerprint of a file or block device, whoever has it open. Raises `OSError`.

    ``raw``: it is the disk, and no image of another format, which has a size in bytes.
    """
    fd = open_image(path, os.O_RDONLY)  # an engine may have named it
    try:
        if stat.S_ISBLK(os.fstat(fd).st_mode):
            os.fdatasync(fd)
        size = os.lseek(fd, 0, os.SEEK_END)
        return take(fd, whole_sectors(size) if raw else size)
    finally:
        os.close(fd)

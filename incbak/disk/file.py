"""Raw images: regular files and block devices, through the page cache.

A disk consists of sectors, so a file whose size is no multiple of 512 bytes is a disk of the next multiple, as it is in
QEMU, whether a VM runs or not; behind the file's end it reads as zeroes. Reading leaves such a file as it is; a write
to its last sector makes it longer.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from incbak import device
from incbak.disk.base import Disk
from incbak.disk.locks import lock_image
from incbak.errors import DiskError
from incbak.extents import StatusExtent, whole_sectors
from incbak.fingerprint import Beat, Fingerprint, take, unlike_any, writes_of, writes_of_file
from incbak.opening import open_image

_BLKFLSBUF = 0x1261  # linux/fs.h
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 0x01, 0x02, 0x10
_PUNCH = _PUNCH_HOLE | _KEEP_SIZE
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV, errno.EINVAL}
_ZEROES = bytes(1 << 20)

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]

MAGICS = {
    "qcow2": b"QFI\xfb",
    "qed": b"QED\0",
    "vmdk": b"KDMV",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix",
    "luks": b"LUKS\xba\xbe",
}


def probe_format(path: Path) -> str:
    """``raw``, unless the first bytes are those of another image format. Raises `DiskError` when it cannot be read."""
    try:
        with open(open_image(path, os.O_RDONLY), "rb") as f:
            head = f.read(512)
    except OSError as e:
        raise DiskError(f"cannot read {path}: {e.strerror}") from e
    return next((name for name, magic in MAGICS.items() if head.startswith(magic)), "raw")


def open_disk(path: Path, *, read_only: bool = False, lock: bool = True) -> FileDisk:
    """Open a raw image and take its QEMU-compatible lock.

    Raises `DiskError` when it cannot be opened or is neither file nor block device, `ImageInUseError` when locked.
    """
    try:
        fd = open_image(path, os.O_RDONLY if read_only else os.O_RDWR)
    except OSError as e:
        raise DiskError(f"cannot open image {path}: {e.strerror}", hint="Check the path and your permissions.") from e
    try:
        if lock:
            lock_image(fd, str(path), write=not read_only)
        disk = FileDisk(fd, path, read_only=read_only)
        if disk.is_block:
            forget_cached(fd)
        return disk
    except BaseException:
        os.close(fd)
        raise


def forget_cached(fd: int) -> None:
    """Drop what the page cache has of a device. While any process has it open the cache stays, and may be outdated.

    That is the case where what is below the device was written without it: the file of a loop device, the disk of a
    partition, a device that two hosts share.
    """
    with suppress(OSError):  # what could not be written shows in a later flush
        os.fdatasync(fd)
    try:
        fcntl.ioctl(fd, _BLKFLSBUF)
    except OSError:  # that is for root
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


class FileDisk(Disk):
    """A raw file or block device; see `Disk` for what each method promises. Owns ``fd``."""

    def __init__(self, fd: int, path: Path, *, read_only: bool) -> None:
        self.fd, self.path, self.name, self.read_only = fd, path, str(path), read_only
        self.is_block = stat.S_ISBLK(os.fstat(fd).st_mode)
        self._end = os.lseek(fd, 0, os.SEEK_END)  # of the file, within the last sector
        self.size = whole_sectors(self._end)
        self._flush_lock = threading.Lock()
        self._flush_error: OSError | None = None
        self._flushes_begun = self._flushes_done = 0
        self._nowait = True
        self._untold = unlike_any()  # while it is open, a device or file that tells nothing is what it was
        self._of_file = writes_of_file(fd, self._untold)
        self._durable_ns = (0, 0)
        """The times of the file that are on its storage for sure."""

    def read_into(self, buf: memoryview, offset: int) -> None:
        done = os.preadv(self.fd, [buf], offset)
        while done < len(buf):
            count = os.preadv(self.fd, [buf[done:]], offset + done)
            if count == 0 and offset + done >= self._end and offset + len(buf) <= self.size:
                buf[done:] = bytes(len(buf) - done)
                return
            if count == 0:
                raise OSError(errno.EIO, f"image {self.name} ends at {offset + done}")
            done += count

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        if not self._nowait:
            return False
        try:
            return os.preadv(self.fd, [buf], offset, os.RWF_NOWAIT) == len(buf)
        except OSError as e:  # another error than "would wait" is met again, and told, by the read that waits
            if e.errno in _UNSUPPORTED:
                self._nowait = False
            return False

    def write(self, buf: memoryview | bytes, offset: int) -> None:
        done = os.pwrite(self.fd, buf, offset)
        if done != len(buf):
            rest = memoryview(buf)
            while done < len(rest):
                done += os.pwrite(self.fd, rest[done:], offset + done)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        modes = (_PUNCH, _ZERO_RANGE) if unmap else (_ZERO_RANGE,)
        if length <= 0 or any(self._fallocate(mode, offset, length) for mode in modes):
            return
        end = offset + length
        while offset < end:
            piece = min(len(_ZEROES), end - offset)
            self.write(_ZEROES[:piece], offset)
            offset += piece

    def zero_fast(self, offset: int, length: int, *, unmap: bool) -> bool:
        """Of a device the kernel punches a hole fast or not at all, but zeroes a range also by writing."""
        modes = ((_PUNCH,) if unmap else ()) + (() if self.is_block else (_ZERO_RANGE,))
        return any(self._fallocate(mode, offset, length) for mode in modes)

    def trim(self, offset: int, length: int) -> None:
        if length > 0:
            self._fallocate(_PUNCH, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """False when the storage cannot; other errors raise."""
        while _libc.fallocate(self.fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code in _UNSUPPORTED:
                return False
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), self.name)
        return True

    def flush(self) -> None:
        """One at a time, since the kernel tells one caller only of a failure; those that wait share the next."""
        wanted = self._flushes_begun + 1
        with self._flush_lock:
            if self._flush_error:
                raise OSError(self._flush_error.errno, f"an earlier flush of {self.name} failed")
            if self._flushes_done >= wanted:
                return
            self._flushes_begun += 1
            self._sync(os.fdatasync)
            self._flushes_done = self._flushes_begun

    def flush_times(self) -> None:
        self.flush()
        with self._flush_lock:
            info = os.fstat(self.fd)
            self._sync(os.fsync)
            self._durable_ns = info.st_mtime_ns, info.st_ctime_ns

    def _sync(self, sync: Callable[[int], None]) -> None:
        try:
            sync(self.fd)
        except OSError as e:
            self._flush_error = e
            raise

    def resize(self, size: int) -> None:
        self.check_resize(size)
        if not self.is_block:
            os.ftruncate(self.fd, whole_sectors(size))
        self.size = self._end = whole_sectors(size)

    def check_resize(self, size: int) -> None:
        """A device is resized by whoever provides it; what it has now is all that can be asked for."""
        if self.is_block and (found := os.lseek(self.fd, 0, os.SEEK_END)) != size:
            raise OSError(errno.EINVAL, f"device {self.name} has {found} bytes")

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        end = offset + length
        if self.is_block and length:
            yield StatusExtent(offset, length, zero=False, hole=False)
            return
        while offset < end:
            at = self._seek(offset, os.SEEK_DATA)
            data = end if at is None else min(at, end)
            if data > offset:
                yield StatusExtent(offset, data - offset, zero=True, hole=True)
            if data < end:
                hole = min(self._seek(data, os.SEEK_HOLE) or end, end)
                if hole > data:
                    yield StatusExtent(data, hole - data, zero=False, hole=False)
                data = hole
            offset = data

    def _seek(self, offset: int, whence: int) -> int | None:
        try:
            return os.lseek(self.fd, offset, whence)
        except OSError as e:
            if e.errno == errno.ENXIO:
                return None
            raise

    def settle(self) -> None:
        if self.is_block:
            self.flush()
            device.settle(self.proc)

    def fingerprint(self) -> Fingerprint:
        if self.is_block:
            self.flush()  # what another program has only written to the page cache is not counted yet
        return take(self.fd, self.size, self._untold)

    @property
    def proc(self) -> Path:
        """The open image itself, wherever it was moved to."""
        return Path(f"/proc/self/fd/{self.fd}")

    def beat(self) -> Beat:
        clock = time.time_ns()
        if self.is_block:
            return Beat(clock, writes=writes_of(self.fd, self._untold))
        info = os.fstat(self.fd)
        return Beat(clock, info.st_mtime_ns, info.st_ctime_ns, self._of_file, durable_ns=self._durable_ns)

    def is_at(self, path: Path) -> bool:
        """Whether ``path`` still leads to what is open."""
        try:
            return os.path.samestat(os.fstat(self.fd), path.stat())
        except OSError:
            return False

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

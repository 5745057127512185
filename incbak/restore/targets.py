"""What a restore writes to: a file, a block device, or an NBD export."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import threading
from abc import ABC, abstractmethod
from contextlib import suppress
from pathlib import Path

from incbak import durable, newfile
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.holders import holders
from incbak.disk.users import find_users, refuse_users
from incbak.errors import DiskError, DurabilityError, IncbakError, NbdError, RestoreError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.restore.flushing import Flushing
from incbak.units import format_size

INCOMPLETE = ".incomplete"
_BLKROGET = 0x125E
_ZEROES = bytes(1 << 20)

durable.declare("restore.opened", "restore.written", "restore.synced", "restore.named")


class Target(ABC):
    """Where one disk goes. `write` and `zero` may be called by several threads at once, with ranges that are disjoint.

    ``blank``: it reads as zeroes before anything is written, so zero ranges need not be written.
    """

    blank = False
    name: str

    @abstractmethod
    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Content. Raises `OSError` or `IncbakError`."""

    @abstractmethod
    def zero(self, offset: int, length: int) -> None:
        """Zeroes."""

    @abstractmethod
    def finish(self) -> None:
        """Durable, and under its name. Raises `IncbakError`."""

    @abstractmethod
    def abandon(self) -> None:
        """Give up; nothing that was made stays under the target's name. Raises nothing."""

    def interrupt(self) -> None:  # noqa: B027
        """Threads that wait in `write` or `zero` raise soon; `abandon` follows. Raises nothing."""


class FileTarget(Target):
    """A sparse raw file, written beside its name and given it in the end.

    Raises `RestoreError` when the name is taken and ``force`` is false, or the file beside it is another user's;
    `ImageInUseError` when a process has the file there open as an image, or another restore is writing to it;
    `UsageError` below ``/dev``.
    """

    blank = True

    def __init__(self, path: Path, size: int, *, force: bool) -> None:
        newfile.refuse_foreign_links(path)
        self.path = Path(os.path.realpath(path))
        self.name, self._force = str(path), force
        self.temporary = self.path.with_name(self.path.name + INCOMPLETE)
        self._check()
        try:
            self._fd = newfile.create_locked(self.temporary)
            try:
                os.ftruncate(self._fd, size)
            except BaseException:
                self._discard()
                raise
        except OSError as e:
            raise RestoreError(f"cannot create {self.temporary}: {e.strerror}", hint="Check the path.") from e
        self._flushing = Flushing(self._fd, self.name)
        durable.crash_point("restore.opened")

    def _check(self) -> None:
        if not self.path.exists():
            return
        if not self._force:
            raise RestoreError(f"{self.name} exists", hint="Choose another path, or replace it with --force.")
        if not self.path.is_file():
            raise RestoreError(f"{self.name} is not a regular file")
        open_disk(self.path).close()
        refuse_users(self.path)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        self._flushing.wrote(len(data))
        while len(data):
            done = os.pwrite(self._fd, data, offset)
            data, offset = memoryview(data)[done:], offset + done

    def zero(self, offset: int, length: int) -> None:
        pass

    def finish(self) -> None:
        durable.crash_point("restore.written")
        self._flushing.finish()
        self._check()
        try:
            durable.commit(self.temporary, self.path, replace=self._force, fd=self._fd)
        except FileExistsError:
            raise RestoreError(f"{self.name} appeared during the restore; it is left alone") from None
        durable.crash_point("restore.named")
        self._flushing.close()
        os.close(self._fd)

    def abandon(self) -> None:
        self._flushing.close()
        with suppress(OSError):
            self._discard()

    def _discard(self) -> None:
        """What another process put under the name stays."""
        ours = newfile.names(self.temporary, self._fd)
        os.close(self._fd)
        if ours:
            self.temporary.unlink()

    def inherited(self) -> tuple[str, int]:
        """Return what a child that inherits the descriptor opens, and the descriptor."""
        return newfile.through(self._fd), self._fd


class DeviceTarget(Target):
    """A block device: nobody else may have it open or mounted, and it must be large enough."""

    def __init__(self, path: Path, size: int) -> None:
        self.name = str(path)
        try:
            self._guard = os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
        except OSError as e:
            why = _busy(path) if e.errno == errno.EBUSY else e.strerror
            hint = "Unmount it, and stop what has it open." if e.errno == errno.EBUSY else ""
            raise DiskError(f"cannot open device {path} for ourselves alone: {why}", hint=hint) from e
        try:
            if _read_only(self._guard):
                raise DiskError(
                    f"device {path} is read-only", hint=f"Nothing was written. See: blockdev --getro {path}"
                )
            self.disk: FileDisk = open_disk(path)
            try:
                refuse_users(path)
                if self.disk.size < size:
                    raise _too_small(self.name, self.disk.size, size)
            except BaseException:
                self.disk.close()
                raise
        except BaseException:
            os.close(self._guard)
            raise
        self.larger = self.disk.size - size
        durable.crash_point("restore.opened")

    def write(self, data: bytes | memoryview, offset: int) -> None:
        self.disk.write(data, offset)

    def zero(self, offset: int, length: int) -> None:
        self.disk.write_zeroes(offset, length, unmap=True)

    def finish(self) -> None:
        durable.crash_point("restore.written")
        try:
            self.disk.flush()
        except OSError as e:
            raise DurabilityError(f"cannot sync {self.name}: {e.strerror}", hint="Look at the storage.") from e
        durable.crash_point("restore.synced")
        self.abandon()

    def abandon(self) -> None:
        if self._guard >= 0:
            self.disk.close()
            os.close(self._guard)
            self._guard = -1


def _read_only(fd: int) -> bool:
    """Return whether the kernel refuses to write to an open block device."""
    return bool(struct.unpack("i", fcntl.ioctl(fd, _BLKROGET, bytes(4)))[0])


class NbdTarget(Target):
    """An export of an NBD server."""

    def __init__(self, uri: str, size: int) -> None:
        self.name = uri
        self._client = NbdClient.connect(uri)
        self._lock = threading.Lock()
        try:
            if self._client.read_only:
                raise RestoreError(f"{uri} is read-only")
            if self._client.size < size:
                raise _too_small(uri, self._client.size, size)
        except BaseException:
            self._client.close()
            raise
        self.larger = self._client.size - size
        durable.crash_point("restore.opened")

    def write(self, data: bytes | memoryview, offset: int) -> None:
        step = self._client.max_payload
        with self._lock:
            for start in range(0, len(data), step):
                self._client.submit_write(data[start : start + step], offset + start)

    def zero(self, offset: int, length: int) -> None:
        native = self._client.can(p.SEND_ZEROES)
        step = 1 << 30 if native else len(_ZEROES)
        with self._lock:
            for start in range(offset, offset + length, step):
                count = min(step, offset + length - start)
                if native:
                    self._client.submit_zeroes(start, count)
                else:
                    self._client.submit_write(_ZEROES[:count], start)

    def finish(self) -> None:
        durable.crash_point("restore.written")
        self._client.drain()
        if self._client.can(p.SEND_FLUSH):
            self._client.flush()
        durable.crash_point("restore.synced")
        self._client.close()

    def abandon(self) -> None:
        self._client.abort()

    def interrupt(self) -> None:
        self._client.abort()


def open_target(text: str, size: int, *, force: bool = False) -> Target:
    """The target that ``text`` names, with room for ``size`` bytes. Changes nothing that is there yet."""
    if text.startswith(("nbd:", "nbd+unix:", "nbds:", "nbds+unix:")):
        return NbdTarget(text, size)
    path = Path(text)
    newfile.refuse_foreign_links(path)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return FileTarget(path, size, force=force)
    except OSError as e:
        raise RestoreError(f"cannot look at {path}: {e.strerror}") from e
    if stat.S_ISBLK(mode):
        return DeviceTarget(path, size)
    if not stat.S_ISREG(mode):
        raise RestoreError(f"{path} is neither a file nor a block device")
    return FileTarget(path, size, force=force)


def _busy(path: Path) -> str:
    """What keeps a device from being opened exclusively."""
    return ", ".join(holders(path) or [user.what for user in find_users(path).found[:3]])


def _too_small(name: str, has: int, needs: int) -> RestoreError:
    return RestoreError(
        f"{name} is too small: it has {has} bytes ({format_size(has)}), the disk has {needs} ({format_size(needs)})",
        hint="Make it larger, or restore to a file.",
    )


__all__ = ["DeviceTarget", "FileTarget", "IncbakError", "NbdError", "NbdTarget", "Target", "open_target"]

"""Two more targets: a new qcow2 image, and an image that is already there, where only what differs is written."""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from pathlib import Path

from incbak import durable, newfile, programs
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.formats import named_format, recognise
from incbak.disk.users import refuse_users
from incbak.errors import DurabilityError, NbdError, RestoreError
from incbak.extents import whole_sectors
from incbak.nbd.uri import NbdUri
from incbak.private import PrivateDirectory
from incbak.restore.targets import DeviceTarget, FileTarget, NbdTarget, Target

_START_SECONDS = 20.0
_END_SECONDS = 600.0  # it writes its tables on its way out
_STEP = 65536


class Qcow2Target(Target):
    """A new qcow2 image, by ``qemu-nbd``; it has its name when it is whole and synced, as a `FileTarget`.

    Raises `RestoreError`, also when QEMU's tools are missing.
    """

    blank = True

    def __init__(self, path: Path, size: int, *, force: bool) -> None:
        for tool in ("qemu-img", "qemu-nbd"):
            if shutil.which(tool) is None:
                raise RestoreError(f"{tool} is not installed", hint="Install it (Debian: qemu-utils), or restore raw.")
        self.name = str(path)
        self._file = FileTarget(path, size, force=force)
        self._private = PrivateDirectory()
        self._directory = self._private.path
        self._server: subprocess.Popen[bytes] | None = None
        self._nbd: NbdTarget | None = None
        try:
            self._create(size)
            self._nbd = self._connect(size)
        except BaseException:
            self.abandon()
            raise

    def _create(self, size: int) -> None:
        path, fd = self._file.inherited()
        command = ["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)]
        made = programs.run(command, pass_fds=[fd])
        if made.code:
            raise RestoreError(f"cannot create {self.name}: {made.said or 'qemu-img failed'}")

    def _connect(self, size: int) -> NbdTarget:
        """The server ends when its only client is gone, so it does not outlive us."""
        sock = self._directory / "nbd"
        path, fd = self._file.inherited()
        command = ["qemu-nbd", "--format=qcow2", "--cache=writeback", f"--socket={sock}", path]
        with (self._directory / "log").open("wb") as log:
            self._server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True, pass_fds=[fd]
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RestoreError(f"cannot write {self.name}: {self._said() or 'qemu-nbd did not start'}")
            if sock.exists():
                try:
                    return NbdTarget(str(NbdUri("", path=str(sock))), size)
                except NbdError as e:
                    if not isinstance(e.__cause__, ConnectionRefusedError):  # bound, and not listening yet
                        raise
            time.sleep(0.01)

    def _said(self) -> str:
        return (self._directory / "log").read_text(errors="replace").strip()

    def write(self, data: bytes | memoryview, offset: int) -> None:
        assert self._nbd
        try:
            self._nbd.write(data, offset)
        except NbdError as e:
            raise self._cannot_write(e) from e

    def _cannot_write(self, error: NbdError) -> RestoreError:
        """Return what to say of an image that ``qemu-nbd`` cannot write."""
        return RestoreError(f"cannot write {self.name}: {self._said() or error}", hint="Free space, or look at it.")

    def zero(self, offset: int, length: int) -> None:
        pass

    def finish(self) -> None:
        assert self._nbd
        assert self._server
        try:
            self._nbd.finish()
        except NbdError as e:
            raise self._cannot_write(e) from e
        self._nbd = None
        try:
            status = self._server.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            raise DurabilityError(f"cannot finish {self.name}: qemu-nbd does not end") from None
        if status:
            raise DurabilityError(f"cannot finish {self.name}: {self._said() or f'qemu-nbd ended with {status}'}")
        self._file.finish()
        self._private.close()

    def abandon(self) -> None:
        if self._nbd:
            self._nbd.abandon()
        if self._server and self._server.poll() is None:
            self._server.kill()
            self._server.wait()
        self._file.abandon()
        self._private.close()


class InPlaceTarget(Target):
    """A raw image or block device that is there already: what it holds is read, and only what differs is written.

    ``changed``: bytes that were. Raises `DiskError`, `ImageInUseError` or `RestoreError` before anything is changed.
    """

    def __init__(self, path: Path, size: int) -> None:
        self.name, self.changed = str(path), 0
        self._lock = threading.Lock()
        self._device: DeviceTarget | None = None
        newfile.refuse_foreign_links(path)
        if not path.exists():
            raise RestoreError(f"{path} is not there", hint="Restore without --in-place.")
        if path.is_block_device():
            self._device = DeviceTarget(path, size)
            self._disk: FileDisk = self._device.disk
            self.larger = self._device.larger
            return
        if (form := named_format(path)) not in ("", "raw") and form == recognise(path):
            raise RestoreError(f"{path} is a {form} image", hint="Only raw images can be restored in place.")
        self._disk = open_disk(path)
        try:
            refuse_users(path)
        except BaseException:
            self._disk.close()
            raise
        if self._disk.size != whole_sectors(size):  # backups of old recorded the bytes of the file
            has = self._disk.size
            self._disk.close()
            raise RestoreError(
                f"{path} has {has} bytes, the disk has {size}", hint="Restore without --in-place, to another file."
            )
        durable.crash_point("restore.opened")

    def write(self, data: bytes | memoryview, offset: int) -> None:
        if memoryview(self._read(offset, len(data))) != memoryview(data):
            self._disk.write(data, offset)
            self._count(len(data))

    def zero(self, offset: int, length: int) -> None:
        for extent in self._disk.extents(offset, length):
            if not extent.zero:
                self._zero_data(extent.offset, extent.offset + extent.length)

    def _zero_data(self, start: int, end: int) -> None:
        for offset in range(start, end, _STEP):
            length = min(_STEP, end - offset)
            if self._read(offset, length).count(0) != length:
                self._disk.write_zeroes(offset, length, unmap=True)
                self._count(length)

    def _read(self, offset: int, length: int) -> bytearray:
        held = bytearray(length)
        self._disk.read_into(memoryview(held), offset)
        return held

    def _count(self, length: int) -> None:
        with self._lock:
            self.changed += length

    def finish(self) -> None:
        if self._device:
            self._device.finish()
            return
        durable.crash_point("restore.written")
        try:
            self._disk.flush()
        except OSError as e:
            raise DurabilityError(f"cannot sync {self.name}: {e.strerror}", hint="Look at the storage.") from e
        durable.crash_point("restore.synced")
        self._disk.close()

    def abandon(self) -> None:
        if self._device:
            self._device.abandon()
        elif self._disk.fd >= 0:
            self._disk.close()

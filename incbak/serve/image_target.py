"""A qcow2 file that one job writes to: the target of ``drive-backup`` with ``format: qcow2``, through ``qemu-nbd``.

The child gets a listening socket on which our connection waits already, and whose name is gone: nobody else can
connect, and a child whose only client is gone ends, so it does not outlive us however we die.

A new image is made under another name, and takes the place of a file that is there when the job begins, not before.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import socket
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from incbak import durable, newfile, programs
from incbak.disk.file import open_disk
from incbak.disk.users import refuse_users
from incbak.errors import DurabilityError, IncbakError, UsageError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.private import PrivateDirectory
from incbak.serve.jobs import TargetError
from incbak.serve.schema import QmpError
from incbak.serve.targets import OwnTarget

log = logging.getLogger(__name__)

_START_SECONDS = 30.0
_END_SECONDS = 60.0
"""For its tables to be written; they are durable already when the job has flushed."""
_WITH_SOCKET = 'exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'


class ImageTarget(OwnTarget):
    """See `incbak.serve.targets.JobTarget`. Raises `QmpError` when there can be no such image."""

    def __init__(self, path: Path, size: int, *, existing: bool) -> None:
        for tool in ("qemu-img", "qemu-nbd"):
            if shutil.which(tool) is None:
                raise QmpError(f"{tool} is not installed, which writes qcow2 images")
        try:
            newfile.refuse_foreign_links(path)
        except UsageError as e:
            raise QmpError(f"Could not open '{path}': {e}") from e
        self.path = Path(os.path.realpath(path))
        self._temporary: Path | None = None
        self._fd = -1
        self._child: subprocess.Popen[bytes] | None = None
        try:
            if not existing:
                _look_at(self.path)
                self._temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.{id(self):x}.tmp")
                self._fd = _create(self._temporary, size)
            elif self.path.exists():
                _refuse_used(self.path)
            super().__init__(str(path), NbdUri("", path=str(path)))
        except BaseException:
            self.withdraw()
            raise

    def _connect(self) -> NbdClient:
        ours, theirs = _connected()
        image, inherited = (newfile.through(self._fd), [self._fd]) if self._temporary else (str(self.path), [])
        with tempfile.TemporaryFile() as said:
            with theirs:
                command = ["sh", "-c", _WITH_SOCKET, "sh"]
                command += ["qemu-nbd", "--format=qcow2", "--cache=writeback", image]
                self._child = subprocess.Popen(
                    command, stdin=theirs.fileno(), stderr=said, start_new_session=True, pass_fds=inherited
                )
            try:
                return NbdClient.connect(ours, export="", timeout=_START_SECONDS)
            except (IncbakError, OSError) as e:
                self._end_child()
                said.seek(0)
                why = said.read(1000).decode(errors="replace").strip().removeprefix("qemu-nbd: ")
                raise QmpError(f"Could not open '{self.path}': {why or e}") from e

    def begin(self) -> None:
        """Now what was there goes; the image's name is durable from here on. Raises `TargetError`."""
        if not self._temporary:
            return
        try:
            os.replace(self._temporary, self.path)
            self._temporary = None
            if not newfile.names(self.path, self._fd):
                raise DurabilityError(f"{self.path} was replaced by another process while it was written")
            durable.sync_dir(self.path.parent)
        except (OSError, DurabilityError) as e:
            raise TargetError(getattr(e, "errno", None), f"cannot write {self.path}: {e}") from e

    def release(self) -> None:
        """When it returns the child is gone, and with it the lock on the image."""
        super().release()
        self._end_child()
        self.withdraw()

    def close(self) -> None:
        """As `release`, where no job has taken it."""
        super().close()
        self._end_child()

    def withdraw(self) -> None:
        """What was made and has not got its name goes."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
        if self._temporary:
            with suppress(OSError):
                self._temporary.unlink()

    def _end_child(self) -> None:
        """Its only client is gone: wait for it, with a limit."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            status = child.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            status = child.wait()
        if status:
            log.warning("qemu-nbd for %s ended with %d", self.path, status)


def _look_at(path: Path) -> None:
    """Raises `QmpError` or `DiskError`: there is something that is no file, or that somebody has open."""
    if not path.parent.is_dir():
        raise QmpError(f"Could not create '{path}': No such file or directory")
    if path.exists():
        if not path.is_file():
            raise QmpError(f"Could not create '{path}': not a file")
        _refuse_used(path)


def _refuse_used(path: Path) -> None:
    """Raises `DiskError` where the lock is taken, or any process has it open: its image would be gone below it."""
    open_disk(path).close()
    refuse_users(path)


def _create(path: Path, size: int) -> int:
    """The descriptor of a new, empty image. Raises `QmpError`, and leaves nothing then."""
    try:
        made_fd = newfile.create(path)
        fd = fcntl.fcntl(made_fd, fcntl.F_DUPFD_CLOEXEC, 10)  # 3 is the socket of the child
        os.close(made_fd)
    except (OSError, UsageError) as e:
        raise QmpError(f"Could not create '{path}': {e.strerror if isinstance(e, OSError) else e}") from e
    command = ["qemu-img", "create", "-q", "-f", "qcow2", newfile.through(fd), str(size)]
    made = programs.run(command, pass_fds=[fd])
    if made.code:
        os.close(fd)
        path.unlink(missing_ok=True)
        raise QmpError(f"Could not create '{path}': {made.said.removeprefix('qemu-img: ')}")
    return fd


def _connected() -> tuple[socket.socket, socket.socket]:
    """Our end of a connection, and the listening socket on which it waits; no name of it is left."""
    with PrivateDirectory() as directory:
        listening, ours = (socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(2))
        try:
            listening.bind(f"{directory}/nbd")
            listening.listen(1)
            ours.connect(f"{directory}/nbd")
        except OSError:
            listening.close()
            ours.close()
            raise
    return ours, listening

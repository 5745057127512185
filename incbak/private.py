"""Private directories for sockets and what a helper says, and an end for those whose process was killed.

Each has mode 0700 and is locked for as long as its process lives. Whoever makes the first of a process looks for others
of the same user whose lock is free, takes away what incbak puts into them, and removes them if nothing else is there.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

_PREFIX = "incbak-private-"
NAMES = ("nbd", "nbd.sock", "sink.sock", "qmp", "log")
"""What incbak and its helpers make in them."""
DIRECTORY = "sink"
"""A directory that incbak makes in them: see `incbak.engine.qemu_door`."""
_SOCKET_PATH = 107
_BELOW = len(f"/{_PREFIX}12345678/") + max(map(len, NAMES))
"""The length of the longest path in such a directory."""
_YOUNG = 60.0
"""Seconds for which one that is not locked may be about to be."""
_swept = False


class PrivateDirectory:
    """A new directory where `_place` says; `close` removes it. Raises `OSError`."""

    def __init__(self) -> None:
        global _swept
        place = _place()
        if not _swept:
            _swept = True
            sweep(place)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Idempotent; raises nothing."""
        if self._fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Path:
        return self.path

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _place() -> Path:
    """Return the system's directory for temporary files, or the first other one that can have a socket below it.

    The path of a socket has 107 bytes at most, and gets into URIs, which are UTF-8.
    """
    usual = Path(tempfile.gettempdir())
    others = [Path(p) for p in (os.environ.get("XDG_RUNTIME_DIR"), "/tmp", "/var/tmp") if p]
    return next((p for p in (usual, *others) if _has_room(p)), usual)


def _has_room(place: Path) -> bool:
    try:
        length = len(str(place).encode())
    except UnicodeEncodeError:
        return False
    return length + _BELOW <= _SOCKET_PATH and place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def sweep(directory: Path) -> None:
    """Remove private directories in ``directory`` whose processes are gone. Raises nothing."""
    with suppress(OSError):
        for path in directory.glob(_PREFIX + "*"):
            with suppress(OSError):
                _remove(path)


def _remove(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        ours = found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) == 0o700
        if not ours or abs(time.time() - found.st_mtime) < _YOUNG:
            return
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for name in NAMES:
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
        with suppress(FileNotFoundError):
            shutil.rmtree(DIRECTORY, dir_fd=fd)
        path.rmdir()
    finally:
        os.close(fd)

"""A repository in a local directory."""

from __future__ import annotations

import fcntl
import os
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from incbak import durable
from incbak.errors import DamagedError, DurabilityError, LockedError
from incbak.repo.seal import PLAIN, SEALED, Seal
from incbak.repo.storage.base import KINDS, LATER, Storage, Stream

_OPEN_FILES = 256
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
STALE_TEMPORARY = 7 * 86400
"""Seconds after which a temporary file that a dead run left may go."""


class LocalStream(Stream):
    """See `Stream`; a temporary name in the same directory until the commit."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / f".{os.getpid()}-{threading.get_native_id()}-{time.monotonic_ns()}.tmp"
        self._size = 0
        self._open, self._named = True, False
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            self._fd = os.open(self._path, flags, 0o600)
        except OSError as e:
            raise DurabilityError(f"cannot write in {directory}: {e.strerror}", hint=_HINT) from e

    def append(self, pieces: Iterable[bytes | memoryview]) -> int:
        try:
            durable.crash_point("repo.append")
            self._size += durable.write_all(self._fd, pieces)
        except OSError as e:
            raise DurabilityError(f"cannot write in {self._directory}: {e.strerror}", hint=_HINT) from e
        return self._size

    def commit(self, name: str) -> None:
        self._close()
        durable.commit(self._path, self._directory / name)
        self._named = True

    def abort(self) -> None:
        self._close()
        if not self._named:
            with suppress(OSError):
                self._path.unlink()

    def _close(self) -> None:
        if self._open:
            self._open = False
            os.close(self._fd)


_HINT = "Free space, or look at the storage; the next backup goes on."

durable.declare("repo.append")


class _OpenFile:
    """A descriptor that is closed when the last reader lets go of it."""

    def __init__(self, path: Path) -> None:
        self.fd = os.open(path, _READ)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class LocalStorage(Storage):
    """See `Storage`. ``root`` must exist; links below it are not followed."""

    def __init__(self, root: Path, seal: Seal = PLAIN) -> None:
        self.root, self.seal = root, seal
        self._files: OrderedDict[tuple[str, str], _OpenFile] = OrderedDict()
        self._mutex = threading.Lock()

    def make_directories(self) -> None:
        """The folders of a new repository, durable."""
        for kind in KINDS:
            durable.make_dir(self.root / kind)

    def sweep(self) -> None:
        """Remove temporary files that runs of long ago left behind."""
        limit = time.time() - STALE_TEMPORARY
        for kind in ("packs", "index", "backups", *LATER):
            for path in (self.root / kind).glob(".*.tmp"):
                with suppress(OSError):
                    if path.lstat().st_mtime < limit:
                        path.unlink()

    def list(self, kind: str) -> dict[str, int]:
        found = {}
        try:
            with os.scandir(self.root / kind) as entries:
                for entry in entries:
                    if not entry.name.startswith("."):
                        with suppress(FileNotFoundError):
                            info = entry.stat(follow_symlinks=False)
                            if stat.S_ISREG(info.st_mode):
                                found[entry.name] = info.st_size
        except FileNotFoundError:
            if kind in LATER:
                return {}
            raise DamagedError(f"the folder {self.root / kind} is missing") from None
        return found

    def check_folders(self) -> None:
        """Raises `DamagedError` where a folder is a link or a file: what is written there would go elsewhere."""
        for kind in KINDS:
            with suppress(FileNotFoundError):
                if not stat.S_ISDIR((self.root / kind).lstat().st_mode):
                    raise DamagedError(f"{self.root / kind} is no folder", hint="Links are not followed there.")

    def read(self, kind: str, name: str, limit: int) -> bytes:
        if kind not in SEALED:
            return self._read(kind, name, limit)
        return self.seal.open(kind, name, self._read(kind, name, limit + self.seal.overhead))

    def _read(self, kind: str, name: str, limit: int) -> bytes:
        fd = os.open(self.root / kind / name, _READ)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_size > limit:
                raise DamagedError(f"{self.root / kind / name} is no file of at most {limit} bytes")
            return _read_exactly(fd, 0, info.st_size)
        finally:
            os.close(fd)

    def read_range(self, kind: str, name: str, offset: int, length: int) -> bytes:
        file = self._opened(kind, name)
        return _read_exactly(file.fd, offset, length)

    def _opened(self, kind: str, name: str) -> _OpenFile:
        key = (kind, name)
        with self._mutex:
            if (file := self._files.get(key)) is None:
                file = self._files[key] = _OpenFile(self.root / kind / name)
                if len(self._files) > _OPEN_FILES:
                    self._files.popitem(last=False)
            else:
                self._files.move_to_end(key)
            return file

    def path(self, kind: str, name: str) -> Path | None:
        return self.root / kind / name

    def write(self, kind: str, name: str, data: bytes) -> None:
        if kind in LATER:
            durable.make_dir(self.root / kind)
        if kind in SEALED:
            data = self.seal.close(kind, name, data)
        durable.write_new(self.root / kind / name, [data])

    def stream(self, kind: str) -> Stream:
        if kind in LATER:
            durable.make_dir(self.root / kind)
        return LocalStream(self.root / kind)

    def remove(self, kind: str, name: str) -> None:
        self._let_go(kind, [name])
        durable.remove(self.root / kind / name)

    def remove_all(self, kind: str, names: Iterable[str]) -> None:
        gone = list(names)
        self._let_go(kind, gone)
        durable.remove_all(self.root / kind, gone)

    def _let_go(self, kind: str, names: Iterable[str]) -> None:
        """A file that is open takes space for as long as it is."""
        with self._mutex:
            for name in names:
                self._files.pop((kind, name), None)

    @contextmanager
    def lock(self, name: str, *, exclusive: bool, wait: float) -> Iterator[None]:
        path = self.root / "locks" / name
        fd = _locked(path, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH, time.monotonic() + wait)
        try:
            yield
        finally:
            os.close(fd)

    def close(self) -> None:
        with self._mutex:
            self._files.clear()


def _locked(path: Path, kind: int, deadline: float) -> int:
    """A descriptor that holds the lock on the file that has this name now, not on one that was removed meanwhile."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise DurabilityError(f"cannot open the lock {path}: {e.strerror}", hint="Look at the storage.") from e
        try:
            _flock(fd, path, kind, deadline)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False)):
                    return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _flock(fd: int, path: Path, kind: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                hint = "Wait for it to end, or give --lock-wait DURATION."
                raise LockedError(f"another run holds the lock {path.name}", hint=hint) from None
        time.sleep(0.05)


def _read_exactly(fd: int, offset: int, length: int) -> bytes:
    data = os.pread(fd, length, offset)
    if len(data) == length:
        return data
    parts = [data]
    done = len(data)
    while done < length and parts[-1]:
        parts.append(os.pread(fd, length - done, offset + done))
        done += len(parts[-1])
    return b"".join(parts)

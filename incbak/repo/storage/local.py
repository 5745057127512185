"""A repository in a local directory."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import secrets
import stat
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from incbak import durable
from incbak.errors import DamagedError, DurabilityError, LockedError, StorageError
from incbak.repo.seal import PLAIN, SEALED, Seal
from incbak.repo.storage.base import KINDS, Storage, Stream, hint_for

_OPEN_FILES = 256
_OTHER_FILES = 32
"""Descriptors that are left to the rest of the process."""
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
STALE_TEMPORARY = 7 * 86400
"""Seconds after which a temporary file may go of which it cannot be said whether the run that made it is dead."""
_CONTENT = ("packs", "index", "backups")
_PLAIN_LOCKS = ("repository.lock", "content.lock", "prune.lock", "pins.lock", "index.lock")
"""Made by the first run: on a full disk it is too late."""


class LocalStream(Stream):
    """See `Stream`; a temporary name in the same directory until the commit."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / f".{os.getpid()}-{threading.get_native_id()}-{time.monotonic_ns()}{durable.HELD}"
        self._size = 0
        self._open, self._named = True, False
        try:
            self._fd = durable.create_held(self._path)
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
        durable.commit(self._path, self._directory / name)
        self._named = True
        self._close()

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
        """Remove temporary files that dead runs left behind, and have the locks that a prune takes on a full disk."""
        for name in _PLAIN_LOCKS:
            with suppress(OSError):
                os.close(_opened_lock(self.root / "locks" / name))
        limit = time.time() - STALE_TEMPORARY
        for kind in (".", *KINDS):
            for path in (self.root / kind).glob(".*.tmp"):
                with suppress(OSError):
                    if path.name.endswith(durable.HELD) and durable.remove_abandoned(path):
                        continue
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
                            found[entry.name] = info.st_size if stat.S_ISREG(info.st_mode) else 0
        except FileNotFoundError:
            self._missing(kind)
            return {}
        except OSError as e:
            raise _unreadable(self.root / kind, e) from e
        return found

    def _missing(self, kind: str) -> None:
        """A copy may lack empty folders, and then all of them; what was in one that is missing beside others is lost.

        Raises `DamagedError`.
        """
        theirs = {*_CONTENT} - {kind} if kind in _CONTENT else set()
        if not self.root.is_dir() or any((self.root / other).is_dir() for other in theirs):
            hint = "Bring it back from a copy; if it was empty, make it anew with mkdir."
            raise DamagedError(f"the folder {self.root / kind} is missing", hint=hint)

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
                if len(self._files) >= _open_files():
                    self._files.popitem(last=False)
                file = self._files[key] = self._open(self.root / kind / name)
            else:
                self._files.move_to_end(key)
            return file

    def _open(self, path: Path) -> _OpenFile:
        try:
            return _OpenFile(path)
        except OSError as e:
            if e.errno not in (errno.EMFILE, errno.ENFILE):
                raise
        self._files.clear()
        return _OpenFile(path)

    def path(self, kind: str, name: str) -> Path | None:
        return self.root / kind / name

    def write(self, kind: str, name: str, data: bytes) -> None:
        self._make_folder(kind)
        if kind in SEALED:
            data = self.seal.close(kind, name, data)
        durable.write_new(self.root / kind / name, [data])

    def stream(self, kind: str) -> Stream:
        self._make_folder(kind)
        return LocalStream(self.root / kind)

    def _make_folder(self, kind: str) -> None:
        """Raises `DurabilityError`."""
        try:
            for each in _CONTENT if kind in _CONTENT else (kind,):
                durable.make_dir(self.root / each)
        except OSError as e:
            raise DurabilityError(f"cannot make {self.root / kind}: {e.strerror}", hint=_HINT) from e

    def remove(self, kind: str, name: str) -> None:
        self._let_go(kind, [name])
        try:
            durable.remove(self.root / kind / name)
        except DurabilityError as e:
            self._set_aside(kind, [name], e)
            durable.sync_dir(self.root / kind)

    def remove_all(self, kind: str, names: Iterable[str]) -> None:
        gone = list(names)
        self._let_go(kind, gone)
        try:
            durable.remove_all(self.root / kind, gone)
        except DurabilityError as e:
            self._set_aside(kind, gone, e)
            durable.remove_all(self.root / kind, gone)

    def _set_aside(self, kind: str, names: Iterable[str], why: DurabilityError) -> None:
        """Remove folders that have the names of files, or give them names that are not listed if they hold anything.

        Raises ``why`` where it is something else that cannot be removed.
        """
        if not isinstance(why.__cause__, IsADirectoryError):
            raise why
        for path in (self.root / kind / name for name in names):
            try:
                if path.is_dir() and not path.is_symlink():
                    try:
                        path.rmdir()
                    except OSError:
                        path.rename(path.with_name(f".{path.name}-{secrets.token_hex(4)}.aside"))
            except OSError as e:
                raise DurabilityError(f"cannot remove {path}: {e.strerror}", hint="Move it elsewhere.") from e

    def settle(self) -> None:
        with suppress(OSError, DurabilityError):
            fd = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                durable.sync_filesystem(fd, str(self.root))
            finally:
                os.close(fd)

    def _let_go(self, kind: str, names: Iterable[str]) -> None:
        """A file that is open takes space for as long as it is."""
        with self._mutex:
            for name in names:
                self._files.pop((kind, name), None)

    @contextmanager
    def lock(self, name: str, *, exclusive: bool, wait: float) -> Iterator[None]:
        self._make_folder("locks")
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
            fd = _opened_lock(path)
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


def _opened_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _open_files() -> int:
    """How many files may stay open, within what this process may have."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if most == resource.RLIM_INFINITY:
        return _OPEN_FILES
    return max(min(_OPEN_FILES, (most - _OTHER_FILES) // 2), 4)


def _unreadable(path: Path, cause: OSError) -> StorageError:
    return StorageError(f"cannot read {path}: {cause.strerror}", hint=hint_for(cause))


def _flock(fd: int, path: Path, kind: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                hint = "Wait for it to end, or give --lock-wait TIME."
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

"""The only way in which incbak makes metadata durable. Nothing else calls fsync, rename or unlink on it.

The write order of :func:`write_new`, which is the proof that a file is there whole or not at all:

1. a temporary name in the same directory, created with ``O_EXCL | O_NOFOLLOW``, mode 0600;
2. the content, every byte of it;
3. ``fsync`` of the file: a failure is final, the temporary file is removed, nothing is renamed;
4. the name appears: ``link`` (refuses to replace) or ``rename`` (replaces);
5. ``fsync`` of the directory: only now may the caller tell anybody.

**What file systems lack.** Where there are no hard links (FAT, some shares), 4 is ``renameat2`` with
``RENAME_NOREPLACE``, and where there is none of that either, a look whether the name is free and a ``rename``: all
names but those that a user gives are random. A file system that cannot sync a directory says ``EINVAL`` or ``ENOTSUP``:
nothing can be done about that, so 5 is left out.

**Temporary files of dead processes.** A temporary file is held with ``flock`` from the moment it is made until it has
its name, so one that can be locked is nobody's any more (`remove_abandoned`).

**Crash points.** Each step calls :func:`crash_point` with a name. ``INCBAK_CRASH_AT=NAME`` or ``NAME:N`` kills the
process with SIGKILL at the N-th time it comes by; ``INCBAK_FAULT_AT=NAME:N:ERRNO`` makes that step fail instead, and
``NAME:N+:ERRNO`` from then on. The name ``*`` stands for every step. Both cost one test of a module variable when they
are not set. `POINTS` lists the names that have been declared, for the campaigns that try them all.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from incbak import newfile
from incbak.errors import DurabilityError

POINTS: dict[str, int] = {}
"""Crash points by name, with their numbers in order of declaration."""

ANY = "*"
"""Stands for every crash point in what :func:`arm` is given."""

HELD = ".held.tmp"
"""How the names of temporary files end that `create_held` made."""

_NOT_SUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1

_lock = threading.Lock()
_crash: tuple[str, int] | None = None
_fault: tuple[str, int, bool, int] | None = None
_seen: dict[str, int] = {}


def declare(*names: str) -> None:
    """Name crash points when a module is loaded, so that a campaign can list them."""
    for name in names:
        POINTS.setdefault(name, len(POINTS) + 1)


def arm(crash_at: str | None = None, fault_at: str | None = None) -> None:
    """Set what :func:`crash_point` does, from the forms in the module's docstring; ``None`` disarms."""
    global _crash, _fault
    with _lock:
        _seen.clear()
        _crash = _fault = None
        if crash_at:
            name, _, count = crash_at.partition(":")
            _crash = (name, int(count or 1))
        if fault_at:
            name, count, code = fault_at.split(":")
            _fault = (name, int(count.rstrip("+")), count.endswith("+"), getattr(errno, code))


def crash_point(name: str) -> None:
    """Die or fail here if a test asked for it. Raises `OSError` when it is armed with a fault."""
    if _crash is None and _fault is None:
        return
    _strike(name)


def passed(name: str = ANY) -> int:
    """How often a crash point was passed, or all together, since :func:`arm` set one."""
    return _seen.get(name, 0)


def _strike(name: str) -> None:
    with _lock:
        _seen[name] = _seen.get(name, 0) + 1
        _seen[ANY] = _seen.get(ANY, 0) + 1
        seen = {name: _seen[name], ANY: _seen[ANY]}
    if _crash and seen.get(_crash[0]) == _crash[1]:
        os.kill(os.getpid(), signal.SIGKILL)
    if _fault and (count := seen.get(_fault[0], 0)) and (count == _fault[1] or (_fault[2] and count > _fault[1])):
        raise OSError(_fault[3], os.strerror(_fault[3]), f"(injected at {name})")


declare(
    "durable.created",
    "durable.written",
    "durable.synced",
    "durable.named",
    "durable.dir-synced",
    "durable.unlinked",
)


def sync_file(fd: int, what: str) -> None:
    """``fdatasync``. Raises `DurabilityError` naming ``what``.

    The first failure is final: the kernel may have dropped the pages, so a later success proves nothing.
    """
    try:
        crash_point("durable.sync")
        os.fdatasync(fd)
    except OSError as e:
        raise DurabilityError(f"cannot sync {what}: {e.strerror}", hint="Look at the storage under it.") from e


def sync_dir(path: Path) -> None:
    """Make the names in ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno not in _NOT_SUPPORTED:
            raise DurabilityError(f"cannot sync directory {path}: {e.strerror}") from e
    finally:
        os.close(fd)
    crash_point("durable.dir-synced")


def sync_filesystem(fd: int, what: str) -> None:
    """Make durable all that was written to the file system of ``fd``: many files at once. Raises `DurabilityError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.syncfs(fd) != 0:
        raise DurabilityError(f"cannot sync {what}: {os.strerror(ctypes.get_errno())}", hint="Look at the storage.")


def make_dir(path: Path, mode: int = 0o700) -> None:
    """Create ``path`` and its missing parents, each durable in its parent; an existing one is left as it is.

    Raises `UsageError` below ``/dev``, `OSError`.
    """
    if path.is_dir():
        return
    newfile.refuse_below_dev(path)
    make_dir(path.parent, mode)
    with suppress(FileExistsError):
        path.mkdir(mode)
    sync_dir(path.parent)


def create_held(temporary: Path, mode: int = 0o600) -> int:
    """A new temporary file, held by its descriptor: see the module's docstring. Raises `OSError`."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    for _ in range(8):
        fd = os.open(temporary, flags, mode)
        with suppress(OSError):  # no locks here: nobody can judge it, so it stays until it is old
            fcntl.flock(fd, fcntl.LOCK_EX)
        if os.path.lexists(temporary):
            return fd
        os.close(fd)  # it was removed before it was held
    raise OSError(errno.EAGAIN, "temporary files are removed as soon as they are made", str(temporary))


def remove_abandoned(temporary: Path) -> bool:
    """Remove a temporary file, whose name ends with `HELD`, if the process that made it is dead; whether it was."""
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(temporary)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def write_all(fd: int, pieces: Iterable[bytes | memoryview]) -> int:
    """Write every byte of every piece; returns the count. Raises `OSError` (a short write is tried again)."""
    count = 0
    for piece in pieces:
        view = memoryview(piece)
        count += len(view)
        while view:
            view = view[os.write(fd, view) :]
    return count


def write_new(path: Path, pieces: Iterable[bytes | memoryview], *, replace: bool = False, mode: int = 0o600) -> int:
    """A durable file at ``path`` with the concatenated pieces, or none: see the module's docstring.

    Returns the bytes written. Raises `FileExistsError` when ``path`` exists and ``replace`` is false, else
    `DurabilityError` when anything fails; then ``path`` is as it was. `UsageError` below ``/dev``.
    """
    newfile.refuse_below_dev(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}{HELD}")
    try:
        fd = create_held(temporary, mode)
        try:
            os.fchmod(fd, mode)  # whatever the umask
            crash_point("durable.created")
            count = write_all(fd, pieces)
            crash_point("durable.written")
            os.fsync(fd)
            crash_point("durable.synced")
            _name(temporary, path, replace=replace)
        finally:
            os.close(fd)
    except FileExistsError:
        _forget(temporary)
        raise
    except OSError as e:
        _forget(temporary)
        raise DurabilityError(f"cannot write {path}: {e.strerror}", hint=_hint(path, e)) from e
    sync_dir(path.parent)
    return count


def _hint(path: Path, error: OSError) -> str:
    if error.errno == errno.ENOENT:
        return f"Make the directory first: mkdir -p {path.parent}"
    if error.errno in (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EROFS):
        return f"Look at the directory and its permissions: ls -ld {path.parent}"
    return "Free space, or look at the storage."


def commit(temporary: Path, path: Path, *, replace: bool = False, fd: int | None = None) -> None:
    """Give a file that was written under another name its own: sync it, rename, sync the directory.

    ``fd``: the open file, where another user may have put another one in its place; else it is opened by its name.
    Refuses to replace (`FileExistsError`) unless told to. For files too large for :func:`write_new`. Raises
    `DurabilityError`.
    """
    own = fd is None
    try:
        fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC) if fd is None else fd
        try:
            crash_point("durable.written")
            os.fsync(fd)
            crash_point("durable.synced")
            if own:
                _name(temporary, path, replace=replace)
            else:
                _must_name(temporary, fd)
                _name(temporary, path, replace=replace)
                _must_name(path, fd)
        finally:
            if own:
                os.close(fd)
    except FileExistsError:
        raise
    except OSError as e:
        raise DurabilityError(f"cannot write {path}: {e.strerror}") from e
    sync_dir(path.parent)


def _must_name(path: Path, fd: int) -> None:
    if not newfile.names(path, fd):
        hint = "See who can write to that directory, and choose another."
        raise DurabilityError(f"{path} was replaced by another process while it was written", hint=hint)


def _name(temporary: Path, path: Path, *, replace: bool) -> None:
    if replace:
        os.rename(temporary, path)
    else:
        try:
            os.link(temporary, path)
            os.unlink(temporary)
        except OSError as e:
            if e.errno not in (*_NOT_SUPPORTED, errno.EPERM, errno.EMLINK):
                raise
            _rename_new(temporary, path)
    crash_point("durable.named")


def _rename_new(temporary: Path, path: Path) -> None:
    """Rename where there are no hard links. Raises `FileExistsError`."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(_AT_FDCWD, os.fsencode(temporary), _AT_FDCWD, os.fsencode(path), _RENAME_NOREPLACE) == 0:
        return
    if (code := ctypes.get_errno()) not in _NOT_SUPPORTED:
        raise OSError(code, os.strerror(code), str(path))
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
    os.rename(temporary, path)


def _forget(temporary: Path) -> None:
    with suppress(OSError):
        os.unlink(temporary)


def remove(path: Path) -> None:
    """Remove ``path`` durably; no error when it is not there."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except OSError as e:
        raise DurabilityError(f"cannot remove {path}: {e.strerror}") from e
    crash_point("durable.unlinked")
    sync_dir(path.parent)


def remove_all(directory: Path, names: Iterable[str]) -> None:
    """Remove the files of these names in ``directory``, durably, with one sync; no error for one that is not there."""
    for name in names:
        try:
            os.unlink(directory / name)
        except FileNotFoundError:
            continue
        except OSError as e:
            raise DurabilityError(f"cannot remove {directory / name}: {e.strerror}") from e
        crash_point("durable.unlinked")
    sync_dir(directory)


arm(os.environ.get("INCBAK_CRASH_AT"), os.environ.get("INCBAK_FAULT_AT"))

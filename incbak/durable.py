"""The only way in which incbak makes metadata durable. Nothing else calls fsync, rename or unlink on it.

The write order of :func:`write_new`, which is the proof that a file is there whole or not at all:

1. a temporary name in the same directory, created with ``O_EXCL | O_NOFOLLOW``, mode 0600;
2. the content, every byte of it;
3. ``fsync`` of the file: a failure is final, the temporary file is removed, nothing is renamed;
4. the name appears: ``link`` (refuses to replace) or ``rename`` (replaces);
5. ``fsync`` of the directory: only now may the caller tell anybody.

**Crash points.** Each step calls :func:`crash_point` with a name. ``INCBAK_CRASH_AT=NAME`` or ``NAME:N`` kills the
process with SIGKILL at the N-th time it comes by; ``INCBAK_FAULT_AT=NAME:N:ERRNO`` makes that step fail instead, and
``NAME:N+:ERRNO`` from then on. The name ``*`` stands for every step. Both cost one test of a module variable when they
are not set. `POINTS` lists the names that have been declared, for the campaigns that try them all.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from incbak.errors import DurabilityError

POINTS: dict[str, int] = {}
"""Crash points by name, with their numbers in order of declaration."""

ANY = "*"
"""Stands for every crash point in what :func:`arm` is given."""

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
    """Create ``path`` and its missing parents, each durable in its parent; an existing one is left as it is."""
    if path.is_dir():
        return
    make_dir(path.parent, mode)
    with suppress(FileExistsError):
        path.mkdir(mode)
    sync_dir(path.parent)


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
    `DurabilityError` when anything fails; then ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}.tmp")
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        try:
            os.fchmod(fd, mode)  # whatever the umask
            crash_point("durable.created")
            count = write_all(fd, pieces)
            crash_point("durable.written")
            os.fsync(fd)
            crash_point("durable.synced")
        finally:
            os.close(fd)
        _name(temporary, path, replace=replace)
    except FileExistsError:
        _forget(temporary)
        raise
    except OSError as e:
        _forget(temporary)
        raise DurabilityError(f"cannot write {path}: {e.strerror}", hint="Free space, or look at the storage.") from e
    sync_dir(path.parent)
    return count


def commit(temporary: Path, path: Path, *, replace: bool = False) -> None:
    """Give a file that was written under another name its own: sync it, rename, sync the directory.

    Refuses to replace (`FileExistsError`) unless told to. For files too large for :func:`write_new`. Raises
    `DurabilityError`.
    """
    try:
        fd = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            crash_point("durable.written")
            os.fsync(fd)
            crash_point("durable.synced")
        finally:
            os.close(fd)
        _name(temporary, path, replace=replace)
    except FileExistsError:
        raise
    except OSError as e:
        raise DurabilityError(f"cannot write {path}: {e.strerror}") from e
    sync_dir(path.parent)


def _name(temporary: Path, path: Path, *, replace: bool) -> None:
    if replace:
        os.rename(temporary, path)
    else:
        os.link(temporary, path)
        os.unlink(temporary)
    crash_point("durable.named")


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

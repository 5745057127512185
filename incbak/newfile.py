"""New files that no other user of this host has a hand in, whatever directory they are made in.

A directory may be open to others: a group of administrators, ``kvm``, a sticky ``/var/tmp``. So, wherever a file with
content of a disk is created:

1. It is created, never found: ``O_CREAT | O_EXCL | O_NOFOLLOW`` with its final mode. A file that is there already was
   opened by whoever made it, and stays open to them whatever its mode becomes.
2. A leftover of our own (a killed restore) is removed and created again, under its lock. One of another user, a link
   or anything but a regular file is refused.
3. Other programs (``qemu-img``, ``qemu-nbd``) get the open file, not its name: `through`.
4. After the file got its final name, the name must be that of the open file: `names`.
5. No link of another user is on the way to it: `refuse_foreign_links`. It would make of a new image a file in ``/etc``,
   or the content of a device. The kernel's ``protected_symlinks`` does not see paths that a program resolves.

No regular file is made below ``/dev``: it would be a mistyped device, in memory, and gone at the next boot. Only
``/dev/shm`` is for files.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from incbak.errors import ImageInUseError, RestoreError, UsageError

_FLAGS = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS = 40
_DEVICES, _MEMORY = "/dev", "/dev/shm"


def create(path: Path, mode: int = 0o600) -> int:
    """Create a regular file and return its descriptor, open for reading and writing.

    Raises `FileExistsError` when anything has the name, also a dangling link; `UsageError` below ``/dev``; `OSError`.
    """
    refuse_below_dev(path)
    return os.open(path, _FLAGS, mode)


def create_locked(path: Path, mode: int = 0o600) -> int:
    """As `create`, and lock it with ``flock``. What a process of this user left under the name is removed first.

    Raises `ImageInUseError` while another process has it locked, `RestoreError` when what is there is not our own,
    `UsageError` below ``/dev``, `OSError`.
    """
    left = -1
    try:
        try:
            fd = create(path, mode)
        except FileExistsError:
            left = _leftover(path)
            os.unlink(path)
            fd = create(path, mode)
        return _locked(fd, path)
    finally:
        if left >= 0:
            os.close(left)


def _leftover(path: Path) -> int:
    """Open and lock what is under the name, if it is a regular file of this user."""
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
        what = "no regular file" if not stat.S_ISREG(info.st_mode) else f"of another user (uid {info.st_uid})"
        hint = f"See whose it is: ls -l {path}. Remove it, or choose a directory that only you can write to."
        raise RestoreError(f"{path} is there already, and is {what}", hint=hint)
    return _locked(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), path)


def _locked(fd: int, path: Path) -> int:
    """Lock the open file and return it. Raises `ImageInUseError`, and closes it then."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if names(path, fd):
            return fd
        raise ImageInUseError(f"another restore has begun to write to {path}", hint="Wait until it has ended.")
    except BaseException as e:
        os.close(fd)
        if isinstance(e, BlockingIOError):
            hint = "Wait until it has ended."
            raise ImageInUseError(f"another restore is writing to {path}", hint=hint) from None
        raise


def names(path: Path, fd: int) -> bool:
    """Return whether ``path`` itself, not what a link there points to, is the open file ``fd``."""
    try:
        return os.path.samestat(path.lstat(), os.fstat(fd))
    except FileNotFoundError:
        return False


def through(fd: int) -> str:
    """Return a path of the open file for a child that inherits ``fd``, which no rename leads elsewhere."""
    return f"/proc/self/fd/{fd}"


def refuse_foreign_links(path: Path) -> None:
    """Raise `UsageError` when the way to ``path``, itself included, has a link of another user than root and us."""
    way, rest, links = Path("/"), list(reversed(Path.cwd().joinpath(path).parts[1:])), 0
    while rest:
        part = rest.pop()
        at = way.parent if part == ".." else way / part
        try:
            info = at.lstat()
        except OSError:
            return  # nothing is there yet, or what opens it says what is wrong
        if not stat.S_ISLNK(info.st_mode):
            way = at
            continue
        to, links = Path(os.readlink(at)), links + 1
        if info.st_uid not in (0, os.geteuid()):
            what = f"{at} is a link of another user (uid {info.st_uid}) to {to}"
            raise UsageError(what, hint="If that is where it should go, name that place.")
        if links > _LINKS:
            raise UsageError(f"{path}: too many links")
        way = Path("/") if to.is_absolute() else way
        rest += reversed(to.parts[1:] if to.is_absolute() else to.parts)


def refuse_below_dev(path: Path) -> None:
    """Raise `UsageError` when a file or directory of that name would be made below ``/dev``."""
    parent = os.path.realpath(path.parent)
    if not _below(parent, _DEVICES) or _below(parent, _MEMORY):
        return
    hint = "Is the device's name right? See: lsblk"
    raise UsageError(f"{path} is not there, and nothing is made below {_DEVICES} but devices", hint=hint)


def refuse_irreplaceable(path: Path) -> None:
    """Raise `UsageError` where a new file must not take the place of what has this name: a device, a pipe, a directory.

    ``/dev/stdout`` is such a name whatever it leads to. A link to a file can be replaced; what it leads to stays.
    """
    hint = "Name a file; one that is there is replaced."
    parent = os.path.realpath(path.parent)
    if _below(parent, _DEVICES) and not _below(parent, _MEMORY):
        raise UsageError(f"{path} is below {_DEVICES}, where no file is made", hint=hint)
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, ValueError) as e:
        raise UsageError(f"cannot write to {path}: {e.strerror if isinstance(e, OSError) else e}", hint=hint) from e
    if not stat.S_ISREG(mode):
        raise UsageError(f"{path} is no regular file, and is not replaced", hint=hint)


def _below(path: str, top: str) -> bool:
    return path == top or path.startswith(top + "/")

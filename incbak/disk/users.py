"""Who else on this host uses an image: the same file or device, under whatever name, with or without locks.

Locks are what programs agree on; some take none (QEMU with ``locking=off``). The kernel's own tables are asked instead:

- every process's descriptors and mappings (``/proc/*/fd``, ``/proc/*/maps``), by device and inode, so links, bind
  mounts, containers and files that were renamed or removed are the same file;
- what is mounted, in every mount namespace, and what swap is on;
- the same of every other device and file that holds bytes of the image, above, below and beside it
  (`incbak.disk.stacking` has the rule), and the loop devices among them;
- at last the kernel itself, which knows what no table shows (an iSCSI target, a process in a namespace that we cannot
  look into): a lease for reading is refused while a file is open for writing, and an exclusive open of a device while
  something is mounted from it or built on it.

`Users.complete` is false where not all processes can be seen: not root, or in a process namespace of our own. (Some
hosts shield the first process even from root; it runs no VMs.) Daemons that keep an array's metadata write to the
devices below it (`_MANAGERS`), and to no byte of the array. It is false too on a file
system that shows files of another one (overlay), where the same file has another device and inode by its other name.
What other hosts do with shared storage is nowhere to be
seen. Processes of the caller's choice are left out with their children, since they have the image open for the caller.
Nothing here waits for storage: files are looked at without asking their servers.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import signal
import stat
import struct
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from incbak.disk.holders import holders
from incbak.disk.stacking import Key, Stack, stack_of
from incbak.disk.stacking import key_of as identity
from incbak.errors import DiskError, ImageInUseError
from incbak.mounts import PASSING, kind_of, lines_of

_INITIAL_NAMESPACE = "pid:[4026531836]"
_MANAGERS = frozenset({"mdmon"})
_SHOWING = frozenset({"overlay", "aufs", "ecryptfs"})
_DONT_SYNC, _TYPE_AND_INODE = 0x4000, 0x001 | 0x100
_AT_FDCWD = -100
_STATX = struct.Struct("=28xH2xQ88xIIII")  # mode, inode, device that it is, device that it is on
_MOUNT = re.compile(r"[^ ]+ [^ ]+ (\d+):(\d+) [^ ]+ ([^ ]+) ([^ ]+)(?: .*?)? - ([^ ]+) ([^ ]+) ([^ ]+)", re.DOTALL)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class User:
    """``what``: a process with its program, a device or a mount, in words. ``process``: it is no more than one."""

    what: str
    writes: bool
    process: bool = False


@dataclass(frozen=True)
class Users:
    """``found``: who uses the image. ``complete``: all processes of this host were looked at; else ``why`` not."""

    found: tuple[User, ...] = ()
    complete: bool = True
    why: str = ""

    @property
    def writers(self) -> tuple[User, ...]:
        """Those that can change the image."""
        return tuple(user for user in self.found if user.writes)

    def doubt(self, path: Path) -> str:
        """What the owner of the image must know of a place where its users are not recognised, or an empty string."""
        return f"{path}: {self.why}, so a program that writes it by its other name is not noticed" if self.why else ""

    def unwritable(self) -> str:
        """Why nothing may be written to the image, or an empty string."""
        if self.found:
            return f"it is open elsewhere: {_several(self.found)}"
        if not self.complete:
            return f"{self.why or 'not all processes of this host can be seen'}, so one of them may have it open"
        return ""


def key_of(path: Path) -> Key:
    """The identity of the image ``path``, whatever leads there. Raises `DiskError`."""
    try:
        return identity(os.stat(path))
    except OSError as e:
        raise DiskError(f"cannot look at image {path}: {e.strerror}") from e


READS = "Back a running VM up through its monitor (qmp:PATH); or stop, unmount or detach what uses the image."
WRITES = "Stop, unmount or detach what uses it."
"""Hints for who is about to read the image, and for who is about to write it."""


def refuse_writers(path: Path, ours: Collection[int] = (), *, hint: str = READS) -> Users:
    """Look for users of ``path``. Raises `ImageInUseError`, naming them, where one of them can write."""
    users = find_users(path, ours)
    if users.writers:
        raise ImageInUseError(f"image {path} is in use: {_several(users.writers)}", hint=hint)
    return users


def refuse_users(path: Path) -> None:
    """As `refuse_writers`, of whoever only reads too: for what is about to be overwritten.

    Of a device a process may read: there are daemons that keep all of them open.
    """
    device = path.is_block_device()
    if found := [user for user in find_users(path).found if user.writes or not (device and user.process)]:
        raise ImageInUseError(f"{path} is in use: {_several(found)}", hint=WRITES)


def _several(users: Collection[User]) -> str:
    """The first of them, and how many more there are."""
    text = ", ".join(user.what for user in list(users)[:3])
    return text if len(users) <= 3 else f"{text} and {len(users) - 3} more"


def find_users(path: Path, ours: Collection[int] = ()) -> Users:
    """Everything on this host that uses the image ``path``, except the processes ``ours``. Raises `DiskError`."""
    key = key_of(path)
    stack = stack_of(key)
    found = [User(f"loop device /dev/{loop.name}", not loop.read_only) for loop in stack.loops]
    complete = _sees_all_namespaces() and stack.complete
    own: list[User] = []
    namespaces = {"": os.getpid()}
    for pid in _processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            try:
                namespaces.setdefault(os.readlink(f"/proc/{pid}/ns/mnt"), pid)
                if user := _process(pid, stack):
                    known = pid == os.getpid() or pid in ours or _parent(pid) in ours
                    (own if known else found).append(user)
            except PermissionError:
                complete = complete and pid == 1
    for pid in namespaces.values():
        found += _mounts(pid, stack)
    found += _swaps(stack)
    if not found and not any(user.writes for user in own) and (hidden := _kernel(path, key)):
        found.append(hidden)
    if shown := _shown_by(path):
        return Users(tuple(dict.fromkeys(found)), False, shown)
    return Users(tuple(dict.fromkeys(found)), complete)


def _processes() -> Iterator[int]:
    return (int(name) for name in os.listdir("/proc") if name.isdigit())


def _sees_all_namespaces() -> bool:
    """Processes of other namespaces, and with ``hidepid`` those of other users, have no entry in ``/proc`` at all."""
    try:
        if os.readlink("/proc/self/ns/pid") != _INITIAL_NAMESPACE:
            return False
        return os.geteuid() == 0
    except OSError:
        return False


# -- processes ----------------------------------------------------------------------------------------------------


def _process(pid: int, stack: Stack) -> User | None:
    """The process if it has the image open or mapped. Raises `OSError` when it ends, or cannot be looked at."""
    uses: list[tuple[Key | None, bool]]
    seen = ((fd, _look(f"/proc/{pid}/fd/{fd}")) for fd in os.listdir(f"/proc/{pid}/fd"))
    uses = [(key, _open_for_writing(pid, fd)) for fd, key in seen if key in stack.keys]
    if not any(writes for _key, writes in uses):
        uses += _mappings(pid, stack.keys)
    uses = [(key, writes) for key, writes in uses if _matters(stack, key, writes)]
    if not uses or (_name(pid) in _MANAGERS and not any(key in stack.image for key, _writes in uses)):
        return None
    return User(_program(pid), any(writes for _key, writes in uses), process=True)


def _matters(stack: Stack, key: Key | None, writes: bool) -> bool:
    """Below and beside the image only who writes does."""
    return writes or key in stack.image


def _parent(pid: int) -> int:
    return int(_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])


def _look(path: str) -> Key | None:
    """As `key_of`, without waiting for a server that may be gone. Raises `PermissionError`."""
    buffer = ctypes.create_string_buffer(256)
    if _libc.statx(_AT_FDCWD, os.fsencode(path), _DONT_SYNC, _TYPE_AND_INODE, buffer) != 0:
        if (code := ctypes.get_errno()) in (errno.EACCES, errno.EPERM):
            raise PermissionError(code, os.strerror(code), path)
        return None
    mode, inode, rmajor, rminor, major, minor = _STATX.unpack_from(buffer)
    if stat.S_ISBLK(mode):
        return Key(rdev=os.makedev(rmajor, rminor))
    return Key(os.makedev(major, minor), inode) if stat.S_ISREG(mode) else None


def _open_for_writing(pid: int, fd: str) -> bool:
    """Unknown counts as yes."""
    with suppress(OSError, ValueError):
        for line in _text(f"/proc/{pid}/fdinfo/{fd}").splitlines():
            if line.startswith("flags:"):
                return int(line.split()[1], 8) & os.O_ACCMODE != os.O_RDONLY
    return True


def _mappings(pid: int, keys: Collection[Key]) -> Iterator[tuple[Key | None, bool]]:
    """Each mapping of the image, and whether what is stored there goes to the image.

    The table's device number is not that of `os.stat` on every file system, so an inode that fits is looked at.
    """
    with open(f"/proc/{pid}/maps", "rb") as f:
        table = f.read()
    inodes = {b" %d " % key.inode for key in keys if key.inode}
    if not any(inode in table for inode in inodes):
        return
    for line in table.removesuffix(b"\n").split(b"\n"):
        where, mode, *_ = line.split(maxsplit=2)
        if any(inode in line for inode in inodes) and (key := _look(f"/proc/{pid}/map_files/{where.decode()}")) in keys:
            yield key, b"w" in mode and b"s" in mode


def _program(pid: int) -> str:
    name = _name(pid)
    return f"process {pid} ({name})" if name else f"process {pid}"


def _name(pid: int) -> str:
    with suppress(OSError):
        return _text(f"/proc/{pid}/comm").strip()
    return ""


# -- devices, mounts, swap ------------------------------------------------------------------------------------------


def _mounts(pid: int, stack: Stack) -> list[User]:
    """What is mounted in the namespace of a process from one of the devices."""
    found = []
    devices = {key.rdev: key for key in stack.keys if key.rdev}
    with suppress(OSError):
        for line in lines_of(Path(f"/proc/{pid}/mountinfo")) if devices else ():
            if not (m := _MOUNT.fullmatch(line)):
                continue
            major, minor, where, _, _, source, options = m.groups()
            writes = "rw" in options.split(",")
            key = devices.get(os.makedev(int(major), int(minor))) or devices.get(_number(source))
            if key and _matters(stack, key, writes):
                found.append(User(f"it is mounted on {where}", writes))
    return found


def _shown_by(path: Path) -> str:
    """Why a process that has the same file open by another name is not recognised, or an empty string."""
    with suppress(OSError):
        kind = kind_of(path)
        if not path.is_block_device() and (kind in _SHOWING or kind.startswith(PASSING)):
            return f"it is on a file system ({kind}) that shows files of another one"
    return ""


def _swaps(stack: Stack) -> list[User]:
    with suppress(OSError):
        names = [line.split(" ", 1)[0].split("\t", 1)[0] for line in lines_of(Path("/proc/swaps"))[1:]]
        return [User(f"swap is on {name}", True) for name in names if _look(_unescaped(name)) in stack.keys]
    return []


def _number(source: str) -> int:
    """Of a file system whose device is not its own (btrfs), that of the device that was named when it was mounted."""
    with suppress(OSError):
        if source.startswith("/dev/") and (found := _look(_unescaped(source))):
            return found.rdev
    return 0


def _unescaped(name: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), name)


# -- the kernel's word ----------------------------------------------------------------------------------------------


def _kernel(path: Path, key: Key) -> User | None:
    """A writer that no table shows, as far as the kernel tells."""
    exclusive = os.O_EXCL if key.rdev else 0
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | exclusive)
    except OSError as e:
        if e.errno != errno.EBUSY:
            return None
        what = ", ".join(f"it is {holder}" for holder in holders(path)[:3])
        return User(what or "the kernel has it (EBUSY), and no table says for whom", True)
    try:
        if not key.rdev:
            fcntl.fcntl(fd, fcntl.F_SETSIG, signal.SIGURG)  # SIGIO would end a process that does not expect it
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return User("something that cannot be seen has it open for writing", True)
    except OSError:  # a file system without leases, or a file of another user
        return None
    finally:
        os.close(fd)
    return None


def _text(path: str) -> str:
    with open(path, "rb") as f:
        return f.read().decode("utf-8", "surrogateescape")

"""Who else on this host uses an image: the same file or device, under whatever name, with or without locks.

Locks are what programs agree on; some take none (QEMU with ``locking=off``). The kernel's own tables are asked instead:

- every process's descriptors and mappings (``/proc/*/fd``, ``/proc/*/maps``), by device and inode, so links, bind
  mounts, containers and files that were renamed or removed are the same file;
- loop devices that are backed by a file, devices that are built on a device (device-mapper, md), partitions, and what
  is built on those in turn;
- what is mounted, in every mount namespace, and what swap is on;
- at last the kernel itself, which knows what no table shows (an iSCSI target, a process in a namespace that we cannot
  look into): a lease for reading is refused while a file is open for writing, and an exclusive open of a device while
  something is mounted from it or built on it.

`Users.complete` is false where not all processes can be seen: not root, or in a process namespace of our own. (Some
hosts shield the first process even from root; it runs no VMs.) What other hosts do with shared storage is nowhere to be
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

from incbak.errors import DiskError, ImageInUseError

_INITIAL_NAMESPACE = "pid:[4026531836]"
_DEPTH, _MOST = 16, 4096  # levels of devices that are looked through, and devices in all
_LOOP_GET_STATUS64, _LOOP_INFO = 0x4C05, struct.Struct("=QQQQQIIII")
_LOOP_READ_ONLY = 1
_DONT_SYNC, _TYPE_AND_INODE = 0x4000, 0x001 | 0x100
_AT_FDCWD = -100
_STATX = struct.Struct("=28xH2xQ88xIIII")  # mode, inode, device that it is, device that it is on
_MOUNT = re.compile(r"^\S+ \S+ (\d+):(\d+) \S+ (\S+) (\S+)(?: .*?)? - (\S+) (\S+) (\S+)$")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class User:
    """``what``: a process with its program, a device or a mount, in words."""

    what: str
    writes: bool


@dataclass(frozen=True)
class Users:
    """``found``: who uses the image. ``complete``: whether every process of this host was looked at."""

    found: tuple[User, ...] = ()
    complete: bool = True

    @property
    def writers(self) -> tuple[User, ...]:
        """Those that can change the image."""
        return tuple(user for user in self.found if user.writes)

    def unwritable(self) -> str:
        """Why nothing may be written to the image, or an empty string."""
        if self.found:
            return f"it is open elsewhere: {_several(self.found)}"
        if not self.complete:
            return "not all processes of this host can be seen, so one of them may have it open"
        return ""


@dataclass(frozen=True)
class Key:
    """A file by the device that it is on and its inode, or (``rdev``) a block device by its number."""

    device: int = 0
    inode: int = 0
    rdev: int = 0


def key_of(path: Path) -> Key:
    """The identity of the image ``path``, whatever leads there. Raises `DiskError`."""
    try:
        return _key(os.stat(path))
    except OSError as e:
        raise DiskError(f"cannot look at image {path}: {e.strerror}") from e


def _key(found: os.stat_result) -> Key:
    return Key(rdev=found.st_rdev) if stat.S_ISBLK(found.st_mode) else Key(found.st_dev, found.st_ino)


def refuse_writers(path: Path, ours: Collection[int] = ()) -> Users:
    """Look for users of ``path``. Raises `ImageInUseError`, naming them, where one of them can write."""
    users = find_users(path, ours)
    if users.writers:
        hint = "Back a running VM up through its monitor (qmp:PATH); or stop, unmount or detach what uses the image."
        raise ImageInUseError(f"image {path} is in use: {_several(users.writers)}", hint=hint)
    return users


def refuse_users(path: Path) -> None:
    """As `refuse_writers`, of whoever only reads too: for what is about to be overwritten."""
    if found := find_users(path).found:
        raise ImageInUseError(f"{path} is in use: {_several(found)}", hint="Stop, unmount or detach what uses it.")


def _several(users: Collection[User]) -> str:
    """The first of them, and how many more there are."""
    text = ", ".join(user.what for user in list(users)[:3])
    return text if len(users) <= 3 else f"{text} and {len(users) - 3} more"


def find_users(path: Path, ours: Collection[int] = ()) -> Users:
    """Everything on this host that uses the image ``path``, except the processes ``ours``. Raises `DiskError`."""
    key = key_of(path)
    keys, found = _built_on(key)
    complete = _sees_all_namespaces()
    own: list[User] = []
    namespaces = {"": os.getpid()}
    for pid in _processes():
        with suppress(FileNotFoundError, ProcessLookupError):
            try:
                namespaces.setdefault(os.readlink(f"/proc/{pid}/ns/mnt"), pid)
                if user := _process(pid, keys):
                    known = pid == os.getpid() or pid in ours or _parent(pid) in ours
                    (own if known else found).append(user)
            except PermissionError:
                complete = complete and pid == 1
    for pid in namespaces.values():
        found += _mounts(pid, keys)
    found += _swaps(keys)
    if not found and not any(user.writes for user in own) and (hidden := _kernel(path, key)):
        found.append(hidden)
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


def _process(pid: int, keys: Collection[Key]) -> User | None:
    """The process if it has the image open or mapped. Raises `OSError` when it ends, or cannot be looked at."""
    opened = [fd for fd in os.listdir(f"/proc/{pid}/fd") if _look(f"/proc/{pid}/fd/{fd}") in keys]
    uses = [_open_for_writing(pid, fd) for fd in opened] or list(_mappings(pid, keys))
    return User(_program(pid), any(uses)) if uses else None


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


def _mappings(pid: int, keys: Collection[Key]) -> Iterator[bool]:
    """For each mapping of the image, whether what is stored there goes to the image.

    The table's device number is not that of `os.stat` on every file system, so an inode that fits is looked at.
    """
    with open(f"/proc/{pid}/maps", "rb") as f:
        table = f.read()
    inodes = {b" %d " % key.inode for key in keys if key.inode}
    if not any(inode in table for inode in inodes):
        return
    for line in table.splitlines():
        where, mode, *_ = line.split(maxsplit=2)
        if any(inode in line for inode in inodes) and _look(f"/proc/{pid}/map_files/{where.decode()}") in keys:
            yield b"w" in mode and b"s" in mode


def _program(pid: int) -> str:
    try:
        return f"process {pid} ({_text(f'/proc/{pid}/comm').strip()})"
    except OSError:
        return f"process {pid}"


# -- devices, mounts, swap ------------------------------------------------------------------------------------------


def _built_on(key: Key) -> tuple[set[Key], list[User]]:
    """The image with its partitions and all that is built on it; and the loop devices that are backed by it."""
    keys, found, level = {key}, [], [key]
    for _ in range(_DEPTH):
        above = []
        for each in level:
            above += [Key(rdev=rdev) for rdev in _above(each)] if each.rdev else []
            for name, rdev, read_only in _loops(each):
                found.append(User(f"loop device /dev/{name}", not read_only))
                above.append(Key(rdev=rdev))
        level = [k for k in dict.fromkeys(above) if k not in keys]
        keys.update(level)
        if not level or len(keys) > _MOST:
            break
    return keys, found


def _above(key: Key) -> Iterator[int]:
    """The numbers of a device's partitions, and of the devices that are built on it."""
    base = Path(f"/sys/dev/block/{os.major(key.rdev)}:{os.minor(key.rdev)}")
    for place in (*base.glob("holders/*/dev"), *base.glob("*/partition")):
        with suppress(OSError, ValueError):
            major, _, minor = _text(str(place.with_name("dev"))).strip().partition(":")
            yield os.makedev(int(major), int(minor))


def _loops(key: Key) -> Iterator[tuple[str, int, bool]]:
    """(name, number, read-only) of each loop device that is backed by a file or device."""
    for place in Path("/sys/block").glob("loop*/loop"):
        name = place.parent.name
        with suppress(OSError, ValueError):
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                info = bytearray(232)
                fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
                device, inode, rdev, *_, flags = _LOOP_INFO.unpack_from(info)
                if (Key(rdev=rdev) if rdev else Key(device, inode)) == key:
                    yield name, os.fstat(fd).st_rdev, bool(flags & _LOOP_READ_ONLY)
            finally:
                os.close(fd)


def _mounts(pid: int, keys: Collection[Key]) -> list[User]:
    """What is mounted in the namespace of a process from one of the devices."""
    found = []
    numbers = {key.rdev for key in keys if key.rdev}
    with suppress(OSError):
        for line in _text(f"/proc/{pid}/mountinfo").splitlines() if numbers else ():
            if not (m := _MOUNT.match(line)):
                continue
            major, minor, where, _, _, source, options = m.groups()
            if os.makedev(int(major), int(minor)) in numbers or _number(source) in numbers:
                found.append(User(f"it is mounted on {where}", "rw" in options.split(",")))
    return found


def _swaps(keys: Collection[Key]) -> list[User]:
    with suppress(OSError):
        names = [line.split()[0] for line in _text("/proc/swaps").splitlines()[1:] if line.strip()]
        return [User(f"swap is on {name}", True) for name in names if _look(_unescaped(name)) in keys]
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
        return User("the kernel has it (EBUSY), and no table says for whom", True) if e.errno == errno.EBUSY else None
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

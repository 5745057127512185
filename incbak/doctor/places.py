"""A directory: whose it is, on what it lies, and whether what incbak needs there works."""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

from incbak.doctor.finding import Finding, fault, ok, warning
from incbak.mounts import kind_of
from incbak.units import format_size

_IN_MEMORY = {"tmpfs", "ramfs", "overlay"}
_NETWORK = {"nfs", "nfs4", "cifs", "smb3", "9p", "ceph", "glusterfs", "fuse.sshfs", "fuse.glusterfs", "afs"}
_FLOCK = struct.Struct("hhqqi4x")


def nearest(path: Path) -> Path:
    """The path itself, or the closest directory above that exists: there it would be made."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def filesystem(path: Path) -> str:
    """Return the type of the file system that ``path`` is on or would be made on, or an empty string."""
    with suppress(OSError):
        return kind_of(nearest(path))
    return ""


def private(what: str, path: Path) -> list[Finding]:
    """Only its owner may look in, and that is us."""
    info = path.stat()
    found = []
    if info.st_uid != os.geteuid():
        text = f"{path} belongs to user {info.st_uid}, and this is user {os.geteuid()}"
        found.append(warning(what, text, "Run incbak as one user, always."))
    if info.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        text = f"{path} can be read by others (mode {stat.S_IMODE(info.st_mode):04o})"
        found.append(warning(what, text, f"chmod 700 {path}"))
    return found


def lasting(what: str, path: Path, loss: str) -> list[Finding]:
    """On a file system that survives a restart of the host and is of this host. ``loss`` says what is lost else."""
    kind = filesystem(path)
    if kind in _IN_MEMORY:
        return [warning(what, f"{path} is on {kind}: {loss} with the next restart of the host", "Choose a disk.")]
    if kind in _NETWORK:
        hint = "Use it from one host only, and check that its server keeps locks and syncs."
        return [warning(what, f"{path} is on a network file system ({kind})", hint)]
    return []


def roomy(what: str, path: Path, wanted: int) -> list[Finding]:
    """``wanted`` bytes are free."""
    free = free_bytes(path)
    if free >= wanted:
        return []
    return [warning(what, f"only {format_size(free)} are free in {path}", "Free space, or choose another place.")]


def free_bytes(path: Path) -> int:
    """What this user may still write."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def works(what: str, path: Path) -> list[Finding]:
    """A file can be made there, locked, written and synced. It has no name, or loses it at once."""
    step = "make a file"
    try:
        with tempfile.TemporaryFile(dir=path) as file:
            step = "lock a file"
            fcntl.fcntl(file.fileno(), fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0))
            step = "write a file"
            file.write(bytes(4096))
            file.flush()
            step = "sync a file"
            os.fsync(file.fileno())
    except OSError as e:
        return [fault(what, f"cannot {step} in {path}: {e.strerror}", "Look at its permissions, space and storage.")]
    return [ok(what, f"{path} ({filesystem(path) or 'unknown file system'}, {format_size(free_bytes(path))} free)")]

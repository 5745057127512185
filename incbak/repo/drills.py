"""How drills went: ``drills/ID``, one file for each. By them `status` and the report say when a restore last worked.

A drill is written when it has ended, whatever came of it; one that was killed says nothing. The last `KEPT` of each VM
stay, and the last good one. With each goes what the repository's ``config`` was then (size, inode, time of change): of
a repository that was copied or put back since, nobody has tried a restore. A drill in the future is a wrong clock's and
counts for nothing; so does a file that does not verify.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from incbak.errors import DamagedError, FormatTooNewError
from incbak.repo.digested import digested, verified_body
from incbak.repo.ids import is_id, new_id
from incbak.repo.storage.base import Storage

VERSION = 1
KIND = "drills"
KEPT = 10
_LIMIT = 4 << 20
_FAR = 1e11
"""Seconds since 1970 that a date can still be made of."""


class DiskDrill(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``clusters`` of ``of`` were restored and compared; ``wrong`` of them were not what they should be."""

    name: str
    clusters: int
    of: int
    wrong: int


class SystemDrill(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file system; ``partition`` 0 is the whole disk. ``state``: ``good``, ``bad``, or ``unchecked``, and ``why``."""

    disk: str
    partition: int
    name: str
    state: str
    why: str = ""


class BootDrill(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Whether the guest gave the sign of life, after how many seconds; ``why`` not."""

    good: bool
    seconds: float
    why: str = ""


class Drill(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One drill of one backup. ``at``: when it ended, seconds since 1970. ``problems``: in words; none: it was good.

    ``sample``: percent of the clusters that were drawn with ``seed``; 100 is all of them.
    """

    version: int = VERSION
    vm: str
    backup: str
    at: float
    seconds: float
    sample: float
    seed: int
    exit_code: int
    disks: tuple[DiskDrill, ...] = ()
    systems: tuple[SystemDrill, ...] = ()
    boot: BootDrill | None = None
    problems: tuple[str, ...] = ()
    repository: str = ""
    host: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing was wrong."""
        return not self.problems and self.exit_code == 0


@dataclass(frozen=True)
class Drills:
    """Of one VM: the last drill, and the last good one."""

    last: Drill | None = None
    good: Drill | None = None


def read_drills(storage: Storage, clock: Callable[[], float] = time.time) -> list[Drill]:
    """The drills of this repository as it is here, oldest first. What cannot be read is passed over."""
    return [drill for _name, drill in _known(storage, clock)]


def drills_of(found: Iterable[Drill], vm: str) -> Drills:
    """Of ``found``, oldest first, what is of ``vm``."""
    mine = [drill for drill in found if drill.vm == vm]
    return Drills(mine[-1] if mine else None, next((d for d in reversed(mine) if d.good), None))


def add_drill(storage: Storage, drill: Drill, clock: Callable[[], float] = time.time) -> Drill:
    """Make a drill durable, and let go of old ones of its VM. Returns it as it is kept. Raises `DurabilityError`."""
    kept = msgspec.structs.replace(drill, repository=_here(storage))
    body = msgspec.json.encode(kept)
    storage.write(KIND, new_id(), digested(body))
    mine = [(name, each) for name, each in _known(storage, clock) if each.vm == drill.vm]
    last_good = next((name for name, each in reversed(mine) if each.good), None)
    storage.remove_all(KIND, [name for name, _each in mine[:-KEPT] if name != last_good])
    return kept


def _known(storage: Storage, clock: Callable[[], float]) -> list[tuple[str, Drill]]:
    here, now = _here(storage), clock()
    found = []
    for name in storage.list(KIND):
        drill = _read(storage, name)
        if drill and drill.repository == here and 0 < drill.at <= now:
            found.append((name, drill))
    return sorted(found, key=lambda each: (each[1].at, each[0]))


def _read(storage: Storage, name: str) -> Drill | None:
    if not is_id(name):
        return None
    try:
        return _decode(name, storage.read(KIND, name, _LIMIT))
    except (DamagedError, OSError):
        return None


def _here(storage: Storage) -> str:
    """What tells this repository from a copy of it."""
    path = storage.path(".", "config")
    if path is None:
        return "-"
    try:
        info = os.stat(path, follow_symlinks=False)
    except OSError:
        return ""
    return f"{info.st_size}:{info.st_ino}:{info.st_ctime_ns}"


def _decode(name: str, data: bytes) -> Drill:
    body = verified_body(data, f"drill {name}")
    try:
        found = msgspec.json.decode(body, type=Drill)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise DamagedError(f"drill {name} is malformed: {e}") from e
    if found.version > VERSION:
        raise FormatTooNewError(f"drill {name} is of version {found.version}", hint="Use a newer incbak.")
    if not 0 <= found.at < _FAR:
        raise DamagedError(f"drill {name} is malformed: its time")
    return found


__all__ = ["BootDrill", "DiskDrill", "Drill", "Drills", "SystemDrill", "add_drill", "drills_of", "read_drills"]

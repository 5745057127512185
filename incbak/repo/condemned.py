"""Condemned packs: what is to be removed when its grace is over. ``condemned/ID`` lists some, and says since when.

Nothing that is listed needs a condemned pack, and no backup builds on one, so it can go at any time. It stays for the
grace because a restore or an export of a backup that was pruned may be reading it. Readers read condemned packs as any
other.

A file that does not verify is *unknown*: until a prune takes it away, no backup builds on any pack that is there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec

from incbak.errors import DamagedError, FormatTooNewError
from incbak.repo.digested import digested, verified_body
from incbak.repo.ids import is_id, new_id
from incbak.repo.storage.base import Storage

VERSION = 1
_LIMIT = 64 << 20


class Condemnation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One file. ``at``: seconds since 1970."""

    version: int
    at: float
    packs: tuple[str, ...]

    def over(self, now: float, grace: float) -> bool:
        """Whether the grace, in seconds, is over. A time far in the future was a wrong clock's, and is no reason
        to keep the packs: only readers of pruned backups gain from the grace."""
        return abs(now - self.at) >= grace


@dataclass(frozen=True)
class Condemned:
    """All files: those that verify by name, and why the others do not."""

    files: Mapping[str, Condemnation] = field(default_factory=dict)
    unknown: Mapping[str, str] = field(default_factory=dict)
    packs: frozenset[str] = frozenset()


def read_condemned(storage: Storage) -> Condemned:
    """All files of the folder. Raises `FormatTooNewError`."""
    files: dict[str, Condemnation] = {}
    unknown: dict[str, str] = {}
    for name in storage.list("condemned"):
        try:
            if is_id(name):
                files[name] = decode(name, storage.read("condemned", name, _LIMIT))
        except FileNotFoundError:
            continue
        except FormatTooNewError:
            raise
        except (DamagedError, OSError) as e:
            unknown[name] = str(e)
    return Condemned(files, unknown, frozenset(p for c in files.values() for p in c.packs))


def condemn(storage: Storage, packs: list[str], now: float) -> str:
    """Write a file, durably; its name. Only `incbak.repo.prune` may, with the locks that it tells of."""
    name = new_id()
    body = msgspec.json.encode(Condemnation(VERSION, now, tuple(packs)))
    storage.write("condemned", name, digested(body))
    return name


def decode(name: str, data: bytes) -> Condemnation:
    """What a file says. Raises `DamagedError` naming it."""
    body = verified_body(data, f"condemned {name}", hint="Run: incbak prune")
    try:
        found = msgspec.json.decode(body, type=Condemnation)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise DamagedError(f"condemned {name} is malformed: {e}", hint="Run: incbak prune") from e
    if found.version > VERSION:
        raise FormatTooNewError(f"condemned {name} is of version {found.version}", hint="Use a newer incbak.")
    if not all(map(is_id, found.packs)):
        raise DamagedError(f"condemned {name} names what is no pack", hint="Run: incbak prune")
    return found

"""What checks have found damaged: content that must be stored again, and backups that are no base any more.

Notes are small files in ``damaged/``. Content on a note is not deduplicated against, so the next backup that reads it
stores it again. Each later check reads the noted content again, whatever it reads otherwise: what is still damaged is a
problem, and what another copy now holds intact is removed from the note. A backup is removed from it by a check that
reads everything.

A note that cannot be read is *unknown*: it may be of any content and of any backup. Until a check has read everything,
which replaces it, no backup builds on what is stored, and no policy removes a backup.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from incbak.errors import DamagedError
from incbak.repo.ids import is_id, new_id
from incbak.repo.storage.base import Storage

_LIMIT = 64 << 20


class Note(msgspec.Struct, frozen=True):
    """One check's findings: digests in hex, and ids of backups that need them."""

    digests: list[str]
    backups: list[str]


@dataclass(frozen=True)
class Damage:
    """All notes together; ``names``: of those that could be read; ``unknown``: why each of the others cannot be."""

    digests: frozenset[bytes] = frozenset()
    backups: frozenset[str] = frozenset()
    names: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)

    def __bool__(self) -> bool:
        """Return whether any content may be damaged."""
        return bool(self.digests or self.unknown)

    def covers(self, digest: bytes) -> bool:
        """Return whether content may be damaged by what is noted."""
        return bool(self.unknown) or digest in self.digests

    def of(self, backups: Iterable[str]) -> frozenset[str]:
        """Return which of these backups, by id, may need damaged content."""
        return frozenset(backups) if self.unknown else self.backups.intersection(backups)


def read_damage(storage: Storage) -> Damage:
    """Read all notes."""
    digests: set[bytes] = set()
    backups: set[str] = set()
    names: list[str] = []
    unknown: dict[str, str] = {}
    for name in notes(storage):
        try:
            note = msgspec.json.decode(storage.read("damaged", name, _LIMIT), type=Note)
            digests.update(bytes.fromhex(d) for d in note.digests)
        except FileNotFoundError:
            continue  # replaced by a concurrent check
        except (msgspec.MsgspecError, ValueError, RecursionError, OSError, DamagedError) as e:
            why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
            unknown[name] = f"the note of damage {name} cannot be read: {why}"
            continue
        backups.update(note.backups)
        names.append(name)
    return Damage(frozenset(digests), frozenset(backups), tuple(names), unknown)


def notes(storage: Storage) -> list[str]:
    """The names of all notes."""
    return [name for name in storage.list("damaged") if is_id(name)]


def replace_notes(storage: Storage, digests: set[bytes], backups: set[str], old: Iterable[str]) -> None:
    """Note the findings of a check that has looked at all that ``old`` notes say: these go when the new one is durable.

    ``old`` was listed before it began: what others have noted since stays.
    """
    add_note(storage, digests, backups)
    for name in old:
        storage.remove("damaged", name)


def add_note(storage: Storage, digests: set[bytes], backups: set[str]) -> None:
    """Add findings to what is noted; nothing where there are none."""
    if digests or backups:
        note = Note(sorted(d.hex() for d in digests), sorted(backups))
        storage.write("damaged", new_id(), msgspec.json.encode(note))

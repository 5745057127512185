"""What checks have found damaged: content that must be stored again, and backups that are no base any more.

Notes are small files in ``damaged/``. Content on a note is not deduplicated against, so the next backup that reads it
stores it again. Each later check reads the noted content again, whatever it reads otherwise: what is still damaged is a
problem, and what another copy now holds intact is removed from the note. A backup is removed from it by a check that
reads everything.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
    """All notes together; ``names``: of those that could be read."""

    digests: frozenset[bytes]
    backups: frozenset[str]
    names: tuple[str, ...] = ()


def read_damage(storage: Storage) -> Damage:
    """All notes; one that cannot be read is passed over."""
    digests: set[bytes] = set()
    backups: set[str] = set()
    names: list[str] = []
    for name in storage.list("damaged"):
        try:
            note = msgspec.json.decode(storage.read("damaged", name, _LIMIT), type=Note)
            digests.update(bytes.fromhex(d) for d in note.digests)
        except (msgspec.MsgspecError, ValueError, RecursionError, OSError, DamagedError):
            continue
        backups.update(note.backups)
        names += [name] if is_id(name) else []
    return Damage(frozenset(digests), frozenset(backups), tuple(names))


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

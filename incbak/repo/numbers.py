"""Numbers of backups are given once: ``removed/ID`` says which were given to backups that are gone.

A sync tells by the numbers what it has copied and whether a repository was put back to an older state (`incbak.sync`).
If the newest backup of a VM is removed and the next one gets its number, that looks as if the repository was put back.
So before the newest backup of a VM is removed its number is written down, durably. A file holds all that is known, and
takes the place of those that were there; only a run that holds ``prune.lock`` writes one. One that cannot be read says
nothing: then a number may be given twice, and the sync that meets it says so.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress

import msgspec

from incbak.errors import DamagedError, DurabilityError
from incbak.events import Reporter, Warned
from incbak.repo.digested import digested, verified_body
from incbak.repo.ids import is_id, new_id
from incbak.repo.record import Record
from incbak.repo.storage.base import Storage

VERSION = 1
KIND = "removed"
_LIMIT = 16 << 20
_LARGEST = 1 << 53
"""No repository has so many backups: a number that is forged must not spoil those that come."""


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``numbers``: by VM, the largest that a removed backup had."""

    version: int
    numbers: dict[str, int]


def removed_numbers(storage: Storage) -> dict[str, int]:
    """Return the largest number of a removed backup for each VM of which it is noted."""
    found: dict[str, int] = {}
    for numbers in _files(storage).values():
        for vm, number in numbers.items():
            found[vm] = max(number, found.get(vm, 0))
    return found


def _files(storage: Storage) -> dict[str, Mapping[str, int]]:
    """Return what each file says that can be read."""
    read = {name: _read(storage, name) for name in storage.list(KIND)}
    return {name: numbers for name, numbers in read.items() if numbers is not None}


def last_number(storage: Storage, records: Iterable[Record]) -> int:
    """Return the largest number that was given to any backup, ``records`` being all that are there; 0 for none."""
    return max((*(r.seq for r in records), *removed_numbers(storage).values()), default=0)


def note_removal(storage: Storage, records: Collection[Record], going: Collection[str]) -> None:
    """Note the numbers of backups before they are removed. Raises `DurabilityError`.

    ``records``: all that are there, of the VMs from which any is removed; ``going``: the ids of those that are. Nothing
    is written where each VM keeps a backup with a larger number. Call it with ``prune.lock`` held.
    """
    stay: dict[str, int] = {}
    gone: dict[str, int] = {}
    for record in records:
        side = gone if record.id in going else stay
        side[record.vm] = max(record.seq, side.get(record.vm, 0))
    known = removed_numbers(storage)
    new = {vm: number for vm, number in gone.items() if number > max(stay.get(vm, 0), known.get(vm, 0))}
    if not new:
        return
    old = list(_files(storage))
    storage.write(KIND, new_id(), digested(msgspec.json.encode(_File(VERSION, known | new))))
    with suppress(DurabilityError):  # one too many says the same
        storage.remove_all(KIND, old)


def forget(storage: Storage, records: Collection[Record], going: Collection[str], report: Reporter) -> None:
    """Remove the records of these backups, durably, once the numbers they had are noted: see `note_removal`.

    On a full disk they are removed all the same, and that is told. Raises `DurabilityError`.
    """
    try:
        note_removal(storage, records, going)
    except DurabilityError as e:
        report(Warned(f"a number may be given to a second backup, and a sync may ask what to do then: {e}"))
    storage.remove_all("backups", going)


def _read(storage: Storage, name: str) -> Mapping[str, int] | None:
    if not is_id(name):
        return None
    try:
        found = msgspec.json.decode(verified_body(storage.read(KIND, name, _LIMIT), f"removed {name}"), type=_File)
    except (DamagedError, OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    sound = found.version == VERSION and all(0 <= number < _LARGEST for number in found.numbers.values())
    return found.numbers if sound else None

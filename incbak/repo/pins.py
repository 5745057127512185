"""Pins: ``pins/ID`` says that the backup of that id is never pruned. A file is a pin whatever it holds.

Records are never changed, so a pin is a file of its own. It is set and looked at under ``pins.lock``: a prune that has
seen no pin removes the record before it lets go, so nobody is told that a backup is pinned which is then removed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from incbak.errors import UsageError
from incbak.repo.ids import is_id
from incbak.repo.storage.base import Storage

_WAIT = 30.0
"""Seconds; a prune holds the lock while it removes records."""


def read_pins(storage: Storage) -> frozenset[str]:
    """The ids of the pinned backups."""
    return frozenset(name for name in storage.list("pins") if is_id(name))


@contextmanager
def pins_held(storage: Storage) -> Iterator[frozenset[str]]:
    """The pins, which nobody changes meanwhile. Raises `LockedError`."""
    with storage.lock("pins.lock", exclusive=True, wait=_WAIT):
        yield read_pins(storage)


def pin(storage: Storage, backup: str) -> bool:
    """Pin a backup by its whole id, durably; false when it was pinned. Raises `UsageError`, `LockedError`."""
    with pins_held(storage) as pins:
        if backup not in storage.list("backups"):
            raise UsageError(f"backup {backup[:8]} is gone", hint="See: incbak list")
        if backup in pins:
            return False
        storage.write("pins", backup, b"")
        return True


def unpin(storage: Storage, backup: str) -> bool:
    """Take a pin away, durably; false when there was none. Raises `LockedError`."""
    with pins_held(storage) as pins:
        storage.remove("pins", backup)
        return backup in pins

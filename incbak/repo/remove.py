"""Removal of named backups: the records first, then the content that nothing else needs, as a prune does it.

A policy never removes the last good backup, a pinned one or one that cannot be read; an owner may, by name. Pins hold
here too: they are looked at under ``pins.lock`` before anything is removed, and one pinned backup among the chosen
means that none is removed. The records are removed under the locks of a prune, so no other prune or sync counts what a
backup needs while it goes.

Content is left to `prune`, with no rules and so with no more records to remove. It refuses where it cannot be known
what the remaining backups need; the chosen backups are gone then, and `Removal.trouble` says why their space is not
freed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from incbak import durable
from incbak.errors import DamagedError, IncbakError, UsageError
from incbak.events import Reporter, silent
from incbak.repo.ids import ids
from incbak.repo.numbers import forget
from incbak.repo.pins import pins_held
from incbak.repo.prune import PRUNE_LOCK, Options, prune
from incbak.repo.record import Record
from incbak.repo.repository import REPOSITORY_LOCK, Repository

durable.declare("remove.records-removed")

_SHORTEST = 4
"""Characters of an id: fewer are more likely a slip than a name."""


@dataclass(frozen=True)
class Chosen:
    """A backup to be removed; ``record`` is ``None`` where it cannot be read, and ``why`` says why."""

    id: str
    record: Record | None
    why: str = ""


@dataclass(frozen=True)
class Removal:
    """What was done: bytes ``freed`` now and ``waiting`` for the end of the grace period.

    ``trouble``: why the content of the removed backups could not be freed.
    """

    removed: tuple[str, ...]
    freed: int = 0
    waiting: int = 0
    trouble: IncbakError | None = None


def choose(repo: Repository, names: Sequence[str]) -> list[Chosen]:
    """Return the backups with these ids or unique prefixes of at least four characters, each once.

    A record that cannot be read can be chosen like any other. Raises `UsageError`.
    """
    there = ids(repo.storage.list("backups"))
    return [_chosen(repo, ident) for ident in dict.fromkeys(_match(name, there) for name in names)]


def choose_all(repo: Repository, vm: str) -> list[Chosen]:
    """Return every backup of a VM, oldest first; unreadable records are in `Repository.unreadable` then.

    Raises `UsageError` where there is none.
    """
    found = [Chosen(record.id, record) for record in repo.backups(vm)]
    if not found:
        raise UsageError(f"there is no backup of {vm} in the repository", hint="See: incbak list")
    return found


def _match(name: str, there: Iterable[str]) -> str:
    if not re.fullmatch("[0-9a-f]+", name):
        raise UsageError(f"not the id of a backup: {name[:64]!r}", hint="Name backups by id, see: incbak list")
    if len(name) < _SHORTEST:
        raise UsageError(
            f"too short to name a backup: {name!r}", hint=f"Give {_SHORTEST} characters of its id or more."
        )
    matches = [ident for ident in there if ident.startswith(name)]
    if len(matches) != 1:
        what = "several backups begin" if matches else "no backup begins"
        raise UsageError(f"{what} with {name[:64]!r}", hint="See: incbak list")
    return matches[0]


def _chosen(repo: Repository, ident: str) -> Chosen:
    try:
        return Chosen(ident, repo.record(ident))
    except DamagedError as e:
        return Chosen(ident, None, str(e))


def remove(repo: Repository, ids: Sequence[str], options: Options | None = None, report: Reporter = silent) -> Removal:
    """Remove these backups, given by whole ids, durably, and free what they alone needed after the grace period.

    One that is gone already counts as removed. Raises `UsageError` if one is pinned and `LockedError` beside a prune or
    a rebuild of the index: nothing was removed then.
    """
    options = options or Options()
    with ExitStack() as stack:
        for name, exclusive in ((PRUNE_LOCK, True), (REPOSITORY_LOCK, False)):
            stack.enter_context(repo.storage.lock(name, exclusive=exclusive, wait=options.lock_wait))
        pins = stack.enter_context(pins_held(repo.storage))
        if kept := [ident for ident in ids if ident in pins]:
            raise UsageError(
                f"pinned, so nothing was removed: {', '.join(ident[:8] for ident in kept)}",
                hint=f"Run first: incbak unpin {kept[0][:8]}",
            )
        forget(repo.storage, repo.backups(), ids, report)
    durable.crash_point("remove.records-removed")
    try:
        done = prune(repo, {}, None, options, report)
    except IncbakError as e:
        return Removal(tuple(ids), trouble=e)
    return Removal(tuple(ids), done.freed, done.waiting, done.trouble)

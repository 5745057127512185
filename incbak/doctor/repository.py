"""A repository: whether it opens, what is known to be wrong in it, and where it lies."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from incbak.doctor import places
from incbak.doctor.finding import Finding, fault, guarded, ok, warning
from incbak.errors import LockedError
from incbak.repo.damage import Damage
from incbak.repo.memory import Memory
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.units import counted, format_duration, format_size

_WHAT = "repository"
_LEAST_SHARE = 10
_AHEAD_SECONDS = 300.0
_OLD_SECONDS = 8 * 86400.0


def look_at_repository(path: Path, memory: Memory, opened: Callable[[], Repository]) -> list[Finding]:
    """All of it. Reads records and notes, not the data: that is what ``incbak check`` is for."""
    return guarded(_WHAT, lambda: _look(path, memory, opened()))


def _look(path: Path, memory: Memory, repo: Repository) -> list[Finding]:
    try:
        how = "encrypted" if repo.seal.encrypted else "not encrypted"
        found = [ok(_WHAT, f"{path}, id {repo.id[:8]}, clusters of {format_size(repo.cluster_size)}, {how}")]
        found += [
            fault(_WHAT, what, "See: incbak list. Ask who else can write there.") for what in memory.troubles(repo)
        ]
        found += guarded(_WHAT, lambda: _place(path))
        found += guarded("locks", lambda: _locks(repo))
        found += guarded("backups", lambda: _backups(repo))
        return found
    finally:
        repo.close()


def _place(path: Path) -> list[Finding]:
    if not os.access(path / "packs", os.W_OK | os.X_OK):
        return [warning(_WHAT, f"{path} cannot be written by this user", "Restores work; backups do not.")]
    found = places.works("storage", path / "packs")
    found += places.private("storage", path)
    found += places.lasting("storage", path, "the backups are lost")
    size = os.statvfs(path)
    return found + places.roomy("storage", path, size.f_blocks * size.f_frsize // _LEAST_SHARE)


def _locks(repo: Repository) -> list[Finding]:
    try:
        with repo.storage.lock("repository.lock", exclusive=False, wait=0):
            return [ok("locks", "backups can be made")]
    except LockedError as e:
        return [warning("locks", str(e), "It is let go of when that process ends.")]


def _backups(repo: Repository) -> list[Finding]:
    records = repo.backups()
    found = [
        fault("backups", f"the record of {name[:8]} cannot be read: {why}", "Run: incbak check")
        for name, why in repo.unreadable.items()
    ]
    damage = repo.damage()
    found += [fault("backups", why, "Run: incbak check --read-data") for why in damage.unknown.values()]
    if damage.digests or damage.backups:
        found.append(_damage(damage))
    newest = {r.vm: r for r in records}
    found += [_newest(record) for record in newest.values()]
    if not records:
        found.append(warning("backups", "there are none", "Make one with: incbak full SOURCE"))
    return found


def _damage(damage: Damage) -> Finding:
    """A backup stays noted until all was read, also where its content has been stored again."""
    backups = counted(len(damage.backups), "backup")
    if not damage.digests:
        text = f"a check found damage in {backups}; a later one found that content intact"
        return warning("backups", text, "Run: incbak check --read-data")
    text = f"a check found {counted(len(damage.digests), 'damaged blob')}, in {backups}"
    return fault("backups", text, "Make a backup, which stores anew what it reads; then: incbak check")


def _newest(record: Record) -> Finding:
    finished = datetime.fromisoformat(record.finished)
    age = (datetime.now(UTC) - finished).total_seconds()
    if age < -_AHEAD_SECONDS:
        text = f"the newest backup of {record.vm} is dated {record.finished}, which is yet to come"
        return warning("backups", text, "Look at the clocks of the hosts that make backups.")
    text = f"{record.vm}: newest is {record.id[:8]}, {format_duration(max(age, 0.0))} old, disks: {len(record.disks)}"
    if age > _OLD_SECONDS:
        return warning("backups", text, "Is the timer or cron job still running?")
    return ok("backups", text)

"""Which backups are to be copied: a pure function of what both repositories list."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from incbak.errors import SyncError, UsageError
from incbak.repo.record import Record


@dataclass
class Plan:
    """``copy``: records of the source by VM, oldest first. ``refused``: VMs of which nothing can be copied, and why.

    ``held``: how many backups of the source the target has already. ``missed``: ids of backups by VM that an earlier
    sync could not copy, though it copied later ones; those that can be read now are in ``copy`` again.
    """

    copy: dict[str, list[Record]] = field(default_factory=dict)
    missed: dict[str, frozenset[str]] = field(default_factory=dict)
    refused: dict[str, SyncError] = field(default_factory=dict)
    held: int = 0


def make_plan(
    source: Sequence[Record],
    target: Sequence[Record],
    repository: str,
    names: Collection[str],
    last: int | None,
    removed: Mapping[str, int] | None = None,
) -> Plan:
    """What the target lacks of the source, whose id is ``repository``; of the VMs ``names``, or of all.

    ``last``: at most so many of each VM, the newest. ``removed``: by VM, the largest number of a backup that was
    removed from the source. Raises `UsageError` for a VM that the source does not have.
    """
    have = {r.vm for r in source}
    if unknown := sorted(set(names) - have):
        listed = ", ".join(sorted(have)) or "none"
        raise UsageError(f"there is no backup of {unknown[0]!r}", hint=f"The VMs are: {listed}.")
    there = {r.id for r in target}
    plan = Plan(held=sum(r.id in there for r in source))
    for vm in sorted(set(names) or have):
        ours = [r for r in source if r.vm == vm]
        copied = [r for r in target if r.vm == vm and r.origin and r.origin.repository == repository]
        reached, missed = _reached(copied)
        plan.missed[vm] = missed
        if why := _diverged(ours, copied, (removed or {}).get(vm, 0)):
            plan.refused[vm] = SyncError(
                f"{vm}: {why}, so the source was put back to an older state since then",
                hint=f"Copy this VM to another repository, or remove it from the target: incbak remove --all-of {vm}",
            )
            continue
        wanted = [r for r in ours if (r.seq > reached or r.id in missed or _late(r, reached)) and r.id not in there]
        if last is not None:
            wanted = wanted[len(wanted) - min(last, len(wanted)) :]
        if wanted:
            plan.copy[vm] = wanted
    return plan


def _reached(copied: Sequence[Record]) -> tuple[int, frozenset[str]]:
    """The number in the source of the newest backup that was copied, and what was missed before it."""
    newest = max((r.origin for r in copied if r.origin), key=lambda o: o.seq, default=None)
    return (newest.seq, frozenset(newest.missed)) if newest else (0, frozenset())


def _late(record: Record, reached: int) -> bool:
    """Whether the source, a copy itself, has got it since: it shares the number of the one that was copied last."""
    return record.seq == reached and record.origin is not None


def _diverged(ours: Sequence[Record], copied: Sequence[Record], removed: int) -> str | None:
    """Return why what was copied cannot have come before what the source has now; ``None`` if it can."""
    if not ours or not copied:
        return None
    by_seq: dict[int, set[str]] = {}
    for record in ours:
        by_seq.setdefault(record.seq, set()).add(record.id)
    for record in copied:
        assert record.origin
        others = by_seq.get(record.origin.seq, {record.id})
        if record.id not in others:
            other = min(others)
            return f"backup {record.id[:8]} was copied as number {record.origin.seq}, which is {other[:8]} now"
    newest = max(copied, key=lambda r: r.origin.seq if r.origin else 0)
    assert newest.origin
    if max(removed, *by_seq) < newest.origin.seq:
        return f"backup {newest.id[:8]} was copied, and is newer than all that the source has"
    return None

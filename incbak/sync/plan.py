"""Which backups are to be copied: a pure function of what both repositories list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from incbak.errors import SyncError, UsageError
from incbak.repo.record import Record


@dataclass
class Plan:
    """``copy``: records of the source by VM, oldest first. ``refused``: VMs of which nothing can be copied, and why.

    ``held``: how many backups of the source the target has already.
    """

    copy: dict[str, list[Record]] = field(default_factory=dict)
    refused: dict[str, SyncError] = field(default_factory=dict)
    held: int = 0


def make_plan(
    source: Sequence[Record], target: Sequence[Record], repository: str, names: Collection[str], last: int | None
) -> Plan:
    """What the target lacks of the source, whose id is ``repository``; of the VMs ``names``, or of all.

    ``last``: at most so many of each VM, the newest. Raises `UsageError` for a VM that the source does not have.
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
        reached = max((r.origin.seq for r in copied if r.origin), default=0)
        if why := _diverged(ours, copied):
            plan.refused[vm] = SyncError(
                f"{vm}: {why}, so the source was put back to an older state since then",
                hint="Copy this VM to another repository, or prune what the target has of it.",
            )
            continue
        wanted = [r for r in ours if r.seq > reached and r.id not in there]
        if last is not None:
            wanted = wanted[len(wanted) - min(last, len(wanted)) :]
        if wanted:
            plan.copy[vm] = wanted
    return plan


def _diverged(ours: Sequence[Record], copied: Sequence[Record]) -> str | None:
    """Whether what was copied cannot have come before what the source has now, in words."""
    if not ours or not copied:
        return None
    by_seq = {r.seq: r.id for r in ours}
    for record in copied:
        assert record.origin
        other = by_seq.get(record.origin.seq)
        if other not in (None, record.id):
            return f"backup {record.id[:8]} was copied as number {record.origin.seq}, which is {other[:8]} now"
    newest = max(copied, key=lambda r: r.origin.seq if r.origin else 0)
    assert newest.origin
    if max(by_seq) < newest.origin.seq:
        return f"backup {newest.id[:8]} was copied, and is newer than all that the source has"
    return None

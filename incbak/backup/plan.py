"""What is to be done with each disk, and why: a pure function of what the engine has and what the repository has.

The base of a disk is the newest backup in the repository whose bitmap is on the disk and may be believed. Where there
is none everything is read, for that disk only, and the reason is the one that concerns the newest backup.

The newest backup decides: an older one is a base only where the bitmaps of all newer ones are on the disk too, believed
or not. Where one is missing, the newer backup was made elsewhere (on another host, or with a state directory that was
put back since), and what the disk's bitmaps here say of the time since then is not known. What ``incbak sync`` brought
back from a copy that this host itself has made is no such backup.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from incbak.backup.opened import is_another
from incbak.backup.sources import check_names, recorded, unproven
from incbak.bitmap.lost import Lost
from incbak.disk.stacking import Key
from incbak.engine.base import (
    DECRYPTED,
    Description,
    DiskPlan,
    EngineDisk,
    LeftOut,
    bitmap_name,
    repository_prefix,
    run_name,
    run_of,
)
from incbak.errors import FormatError, UsageError
from incbak.reasons import Reason
from incbak.repo.record import DiskRecord, Record

_TOLD = 16
"""Disks that a message names."""


@dataclass(frozen=True)
class Known:
    """What the repository knows of a VM. ``records`` are oldest first; ``damaged`` are ids that are no base."""

    repository: str
    cluster_size: int
    records: Sequence[Record]
    damaged: Collection[str] = frozenset()
    unreadable: Collection[str] = frozenset()
    host: str = ""
    backing: Mapping[str, list[Any]] = field(default_factory=dict)
    """The backing files of the disks as they are now: see `incbak.backup.sources`."""
    lost: Mapping[str, Lost] = field(default_factory=dict)
    """Per disk, why bitmaps that are not there are lost."""
    opened: Mapping[str, list[Any]] = field(default_factory=dict)
    held: Collection[Key] = frozenset()
    """What a running engine has open: see `incbak.backup.opened`."""
    data: Mapping[str, list[Any]] = field(default_factory=dict)
    trusted: Collection[str] = frozenset()
    """The disks' data files, and what is not looked at: see `incbak.backup.sources`."""
    sampling: bool = False
    """Whether a provisional bitmap may be planned with: see `incbak.backup.sample`."""

    def run(self, backup: str) -> str:
        """Return how the names of the bitmaps of the writes since ``backup`` begin."""
        return run_name(self.repository[:8], backup[:8])

    def bitmap(self, record: Record, disk: DiskRecord) -> str:
        """Return the name of the bitmap of the writes to ``disk`` since ``record``."""
        run = self.run(record.id)
        named = disk.bitmap or ""
        return named if run_of(named) == run else run

    @property
    def prefix(self) -> str:
        """How the names of all bitmaps of this repository begin."""
        return repository_prefix(self.repository[:8])

    def strays(self, description: Description, keep: Collection[str]) -> set[tuple[str, str]]:
        """(disk, bitmap) of the bitmaps of this repository that no backup stands for."""
        names = ((d.name, b.name) for d in description.disks for b in d.bitmaps)
        return {(disk, name) for disk, name in names if name.startswith(self.prefix) and run_of(name) not in keep}


@dataclass
class Planned:
    """One disk's part of a run.

    ``base``: the backup whose bitmap says what to read; ``None``: everything is read. ``before``: the disk in the base
    or else in the newest whole backup of that size; content that is at its place there is not stored again.
    ``audited`` and ``audit_turn`` are as in the record; ``detail`` is more of the reason.
    """

    plan: DiskPlan
    base: Record | None = None
    before: DiskRecord | None = None
    detail: str = ""
    audited: int = 0
    audit_turn: int | None = None

    @property
    def name(self) -> str:
        """The disk's name."""
        return self.plan.disk.name


@dataclass(frozen=True)
class Request:
    """``incremental`` or full; ``backup`` is the new backup's id; ``strays``: bitmaps that no backup stands for."""

    incremental: bool
    backup: str
    strays: Collection[tuple[str, str]] = field(default=frozenset())


def distrust(planned: Planned, detail: str, reason: Reason = Reason.AUDIT) -> None:
    """The bitmap was found wrong: the disk is read whole."""
    planned.base, planned.detail = None, detail
    planned.plan.base_bitmap, planned.plan.reason = None, reason


def choose(description: Description, include: Sequence[str], exclude: Sequence[str]) -> tuple[EngineDisk, ...]:
    """The disks asked for, by name, device or node. Raises `UsageError` for a name that nothing has, or no disk."""
    check_names(description)
    disks = description.disks

    def named(text: str) -> list[EngineDisk]:
        found = [d for d in disks if text in (d.name, d.device, d.node)]
        if not found:
            why = next((f": {x.why}" for x in description.left_out if x.name == text), "")
            have = ", ".join(d.name for d in disks) or "none"
            raise UsageError(f"there is no disk {text!r} to back up{why}", hint=f"The disks are: {have}.")
        return found

    wanted = [d for text in include for d in named(text)] or list(disks)
    unwanted = {d.name for text in exclude for d in named(text)}
    chosen = {d.name: d for d in wanted if d.name not in unwanted}
    if not chosen:
        raise UsageError(f"there is no disk to back up: {_why_none(description)}", hint="See: incbak doctor SOURCE")
    return tuple(chosen.values())


def missed(description: Description, include: Sequence[str], exclude: Sequence[str]) -> list[LeftOut]:
    """The disks that are left out though nobody said so, and that a user may believe to be in: each run names them."""
    wanted = (x for x in description.left_out if not include or x.name in include)
    return [x for x in wanted if not x.expected and x.name not in exclude]


def _why_none(description: Description) -> str:
    """The disks that are left out, with the reason of each."""
    reasons = [f"{disk.name} is excluded" for disk in description.disks]
    reasons += [f"{each.name}: {each.why}" for each in description.left_out]
    more = f", and {len(reasons) - _TOLD} more" if len(reasons) > _TOLD else ""
    return ("; ".join(reasons[:_TOLD]) or "the VM has none") + more


def make_plan(disks: Sequence[EngineDisk], known: Known, request: Request) -> list[Planned]:
    """One `Planned` per disk, in order."""
    return [_disk(disk, known, request) for disk in disks]


def decrypted(disks: Sequence[EngineDisk], encrypted: bool) -> list[str]:
    """Notes for disks whose engine has the key: what is stored is what the guest reads, not what the image holds."""
    text = "the content of disk {} is decrypted in the backup"
    text += ", which is encrypted itself" if encrypted else ", and the repository is not encrypted"
    return [text.format(disk.name) for disk in disks if disk.format.endswith(DECRYPTED)]


def _check_ciphertext(disk: EngineDisk, before: DiskRecord) -> None:
    """Ciphertext and what it says are two disks: a chain of both could not be told apart. Raises `FormatError`."""
    if before.format and before.format.endswith(DECRYPTED) != disk.format.endswith(DECRYPTED):
        hint = "Back one of them up under another name: --name, or --disk of an image that is off."
        text = f"disk {disk.name} is {disk.format}, and was {before.format} in its backups: one of them is ciphertext"
        raise FormatError(text, hint=hint)


def _disk(disk: EngineDisk, known: Known, request: Request) -> Planned:
    if newest := next((d for r in reversed(known.records) if (d := r.disk(disk.name))), None):
        _check_ciphertext(disk, newest)
    plan = DiskPlan(disk, bitmap_name(known.run(request.backup), disk.name), known.cluster_size)
    whole = [(r, d) for r in reversed(known.records) if (d := r.disk(disk.name)) and r.id not in known.damaged]
    if request.incremental:
        for record, before in _bases(disk, known):
            if _trouble(disk, before, record, known) is None:
                plan.base_bitmap = known.bitmap(record, before)
                return Planned(plan, record, before)
        plan.reason = _why_not(disk, known, request)
    same_size = next((d for _, d in whole if d.size == disk.size), None)
    return Planned(plan, None, same_size)


def _bases(disk: EngineDisk, known: Known) -> Iterator[tuple[Record, DiskRecord]]:
    """Yield the backups that may be the base of ``disk``, newest first.

    None is older than a backup of another size: a bitmap is cut where its disk is, and QEMU does not mark what the
    disk has got back since.
    """
    for record in reversed(known.records):
        if before := record.disk(disk.name):
            yield record, before
            copied = record.origin is not None and record.host == known.host
            missing = disk.bitmap(known.bitmap(record, before)) is None
            if before.size != disk.size or (missing and not copied):
                return


def _trouble(disk: EngineDisk, before: DiskRecord, record: Record, known: Known) -> Reason | None:
    """Why ``record`` cannot be the base of ``disk``."""
    if record.id in known.damaged:
        return Reason.BASE_DAMAGED
    if before.size != disk.size:
        return Reason.RESIZED
    name = known.bitmap(record, before)
    bitmap = disk.bitmap(name)
    if reason := unproven(disk, record, bitmap, known):
        return reason
    in_memory = bitmap is not None and not bitmap.persistent
    before_now = recorded(record, "opened", disk.name), known.opened.get(disk.name, [])
    if is_another(*before_now, known.held, in_memory=in_memory):
        return Reason.DISK_CHANGED
    if disk.was_cut(name):
        return Reason.RESIZED
    if bitmap:
        return bitmap.trouble(known.cluster_size, sampling=known.sampling)
    another = any(run_of(b.name) == known.run(record.id) for b in disk.bitmaps)
    return Reason.WRONG_DISK if another else Reason.BITMAP_MISSING


def _why_not(disk: EngineDisk, known: Known, request: Request) -> Reason:
    """Why no backup can be the base: what is wrong with the newest that has the disk."""
    newest = next(((r, d) for r in reversed(known.records) if (d := r.disk(disk.name))), None)
    unreadable = {known.run(ident) for ident in known.unreadable}
    if any(run_of(b.name) in unreadable for b in disk.bitmaps):
        return Reason.BASE_DAMAGED
    stray = any(name == disk.name for name, _bitmap in request.strays)
    if newest is None:
        if stray:
            return Reason.BASE_MISSING
        return Reason.NEW_DISK if known.records else Reason.NO_BASE
    reason = _trouble(disk, newest[1], newest[0], known)
    had = ((r, d) for r in known.records if (d := r.disk(disk.name)))
    bitmaps = [b for r, d in had if (b := disk.bitmap(known.bitmap(r, d)))]
    older = any(b.trouble(known.cluster_size, sampling=known.sampling) is None for b in bitmaps)
    assert reason
    if reason is not Reason.BITMAP_MISSING:
        return reason
    if stray or older:
        return Reason.BASE_MISSING if stray else Reason.SUPERSEDED
    return _why_lost(disk, *newest, known) or reason


def _why_lost(disk: EngineDisk, record: Record, before: DiskRecord, known: Known) -> Reason | None:
    lost, here = known.lost.get(disk.name), record.origin is None and record.host == known.host
    return lost.why(known.bitmap(record, before), record.finished, here=here) if lost else None

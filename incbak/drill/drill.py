"""One drill of one backup, from the data to the boot, and its entry in the repository."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from incbak.drill import contents, fsck
from incbak.drill.boot import Boot, boot
from incbak.drill.data import Proved, prove_sample, prove_whole
from incbak.errors import DamagedError, DrillError, DurabilityError, UsageError
from incbak.events import Reporter, silent
from incbak.repo.damage import add_note
from incbak.repo.drills import BootDrill, Drill, SystemDrill, add_drill
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository, host_name

_WORST = 50
"""Problems that are written down."""


@dataclass(frozen=True)
class Options:
    """``scratch``: where file systems and a guest's writes go; ``sample``: percent, 100 restores all of it."""

    scratch: Path
    sample: float = 100.0
    seed: int = 0
    fsck: bool = True
    boot: Boot | None = None
    disks: tuple[str, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether all clusters are restored; only then is there something to look at for a tool."""
        return self.sample >= 100


@dataclass
class _Found:
    proved: list[Proved] = field(default_factory=list)
    systems: list[SystemDrill] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    boot: BootDrill | None = None


class NotWrittenError(DurabilityError):
    """A drill has ended, and how it went cannot be written in the repository; it is in ``drill``."""

    def __init__(self, drill: Drill, cause: DurabilityError) -> None:
        what = f"how the drill of {drill.backup[:8]} of {drill.vm} went cannot be written down: {cause}"
        super().__init__(what, hint=cause.hint)
        self.drill = drill


def drill(
    repo: Repository,
    record: Record,
    options: Options,
    report: Reporter = silent,
    clock: Callable[[], float] = time.time,
) -> Drill:
    """Drill ``record`` and write down how it went, unless it is of some of its disks only.

    What is wrong is in the result and raises nothing. Raises `UsageError` for a disk that is not there; `DiskError` and
    `RestoreError` when ``options.scratch`` cannot be used, `NotWrittenError` when nothing can be written down.
    """
    disks = _chosen(record, options.disks)
    if options.boot:
        options.boot.check()
    began, found = time.monotonic(), _Found()
    found.problems += [f"the backup is not complete: {note}" for note in record.notes if record.incomplete]
    for disk in disks:
        _one_disk(repo, record, disk, options, found, report)
    damaged = {digest for each in found.proved for digest in each.damaged}
    spoilt = any(each.disk.wrong for each in found.proved)
    if options.boot and not any(each.problems for each in found.proved):
        found.boot = boot(repo, record, disks, options.boot, options.scratch)
        found.problems += [f"the guest did not boot: {found.boot.why}"] if found.boot.why else []
    made = Drill(
        vm=record.vm,
        backup=record.id,
        at=clock(),
        seconds=round(time.monotonic() - began, 3),
        sample=min(options.sample, 100.0),
        seed=options.seed,
        exit_code=DamagedError.exit_code if spoilt else DrillError.exit_code if found.problems else 0,
        disks=tuple(each.disk for each in found.proved),
        systems=tuple(found.systems),
        boot=found.boot,
        problems=tuple(found.problems[:_WORST]),
        host=host_name(),
    )
    try:
        if spoilt:
            add_note(repo.storage, damaged, {record.id})
        return made if options.disks else add_drill(repo.storage, made, clock)
    except DurabilityError as e:
        raise NotWrittenError(made, e) from e


def _chosen(record: Record, names: Sequence[str]) -> list[DiskRecord]:
    have = [d.name for d in record.disks]
    if unknown := [name for name in names if name not in have]:
        what = f"backup {record.id[:8]} has no disk {unknown[0]!r}"
        raise UsageError(what, hint=f"Its disks are: {', '.join(have)}.")
    return [d for d in record.disks if not names or d.name in names]


def _one_disk(
    repo: Repository, record: Record, disk: DiskRecord, options: Options, found: _Found, report: Reporter
) -> None:
    if not options.whole:
        proved = prove_sample(repo, record, disk, options.sample, options.seed, report)
        found.proved.append(proved)
        found.problems += proved.problems
        return
    with ExitStack() as stack:
        there: list[contents.Content] = []
        if options.fsck:
            there, problems = contents.contents(repo, record, disk, options.scratch, stack)
            found.problems += problems
        scratches = [each.scratch for each in there if each.scratch]
        proved = prove_whole(repo, record, disk, scratches, report)
        found.proved.append(proved)
        found.problems += proved.problems
        if proved.problems:
            return  # a file system with holes where damage was tells nothing
        rows = contents.judged(disk.name, there)
        found.systems += rows
        found.problems += [f"{place_of(row)}: {row.name}: {row.why}" for row in rows if row.state == fsck.BAD]


def place_of(row: SystemDrill) -> str:
    """``disk vda, partition 2``."""
    return f"disk {row.disk}" + (f", partition {row.partition}" if row.partition else "")


__all__ = ["Boot", "Options", "drill", "place_of"]

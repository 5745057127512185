"""One backup run, from the lock to the last bitmap that goes. The order, which is what makes it safe:

1. the VM's lock in the repository: no other run can be alive, so everything with our prefix is a dead run's;
2. leftovers go; what the engine and the repository have decides the plan;
3. the engine sets up the new bitmaps and the point in time, and copies into the sinks;
4. each sink has seen a flush and exactly the bytes that the job says it copied; the trees are finished;
5. the repository's commit: packs, index, locks looked at again, record. Now the backup exists;
6. only now the bitmaps that it replaces go.

Whatever fails before 5 is complete takes the new bitmaps out again; the base's have kept recording. Killed anywhere,
the next run finds its way from the names alone: either the record is there and so is its bitmap, or neither counts.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from incbak import __version__, durable
from incbak.backup.closer import look_by_audit, look_by_sample, provisional
from incbak.backup.pipeline import Pipeline
from incbak.backup.plan import Known, Planned, Request, choose, decrypted, make_plan, missed
from incbak.backup.sink import DiskSink
from incbak.backup.sources import Sources, contradictions, other_images, other_names
from incbak.backup.target import SinkServer, SinkTarget
from incbak.backup.uncancelled import to_the_end
from incbak.backup.vm import locked, vm_name
from incbak.bitmap.lost import lost_bitmaps
from incbak.engine.base import Description, DiskResult, Engine, RunResult
from incbak.errors import (
    BackupError,
    DamagedError,
    DurabilityError,
    FallbackRefusedError,
    IncbakError,
    UsageError,
)
from incbak.events import Fallback, Notice, Progress, Reporter, Warned, silent
from incbak.reasons import Reason
from incbak.repo.damage import add_note
from incbak.repo.fitting import fitted
from incbak.repo.memory import Memory
from incbak.repo.numbers import last_number
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository, host_name
from incbak.repo.writer import Writer

log = logging.getLogger(__name__)

durable.declare("runner.planned", "runner.copied", "runner.committed", "runner.done")


@dataclass(frozen=True)
class Options:
    """What a user asked for. ``lock_wait`` in seconds; ``fallback``: whether an incremental may read everything.

    ``strict``: whether a name that the source contradicts is refused.
    ``audit``: in how many runs all clean clusters are to be compared with the base, a slice in each; 0 for none.
    ``sampling``: whether the bitmap of a device that was set up again is sampled: see `incbak.backup.sample`.
    """

    incremental: bool
    name: str | None = None
    disks: Sequence[str] = ()
    exclude: Sequence[str] = ()
    fallback: bool = True
    lock_wait: float = 0.0
    dry_run: bool = False
    tags: Sequence[str] = ()
    level: int = 1
    audit: int = 0
    sampling: bool = False
    strict: bool = False
    attachments: Mapping[str, str] | None = None
    memory: Memory | None = None
    """What this host remembers of the repository, to be compared and brought up to date."""
    trusted: Sequence[str] = ()  # backing files that never change: see `Sources`
    ctime: bool = True  # whether it is compared of files below
    state_dir: Path | None = None  # where `incbak.bitmap.lost` finds why a bitmap is not there


@dataclass(frozen=True)
class Outcome:
    """``record``: the backup that was made (``None`` for a dry run). ``failed``: disks that are not in it, and why.

    ``left``: what of ours is still in the engine.
    """

    vm: str
    planned: Sequence[Planned]
    record: Record | None = None
    failed: Mapping[str, str] | None = None
    left: Sequence[str] = ()


async def run(repo: Repository, engine: Engine, options: Options, report: Reporter = silent) -> Outcome:
    """Make one backup. Raises `IncbakError`: then there is none, and the engine is as it was, as far as it answers."""
    vm = await vm_name(engine, options.name)
    async with nullcontext() if options.dry_run else locked(repo, vm, options.lock_wait) as still_locked:
        distrusted: set[str] = set()
        troubles = await asyncio.to_thread(options.memory.troubles, repo, vm) if options.memory else []
        for what in troubles:
            report(Warned(what))
        while True:
            attempt = _Attempt(repo, engine, options, report, vm, distrusted, troubles)
            try:
                outcome = await attempt.run(still_locked)
                await asyncio.to_thread(_remember, repo, outcome, options.memory, report)
                return outcome
            except DamagedError as e:
                bases = attempt.bases() - distrusted
                if not bases:
                    raise
                distrusted |= bases
                if not options.dry_run:
                    add_note(repo.storage, set(), bases)
                report(Warned(f"the base cannot be relied on, so the run begins again without it: {e}"))


def _remember(repo: Repository, outcome: Outcome, memory: Memory | None, report: Reporter) -> None:
    if memory and outcome.record:
        try:
            memory.remember(repo, outcome.record)
        except DurabilityError as e:
            report(Warned(f"the backup is made, but this host cannot remember it: {e}"))


class _Attempt:
    """One try at a run."""

    def __init__(
        self,
        repo: Repository,
        engine: Engine,
        options: Options,
        report: Reporter,
        vm: str,
        distrusted: set[str],
        troubles: Sequence[str],
    ) -> None:
        self._troubles, self._distrusted = troubles, distrusted
        self._repo, self._engine, self._options, self._report, self._vm = repo, engine, options, report, vm
        self._planned: list[Planned] = []
        self._sources: Sources
        self._contradicted: list[str] = []
        self._started = _now()
        self._id = repo.new_backup_id()

    def bases(self) -> set[str]:
        """The backups that this try reads from."""
        return {p.base.id for p in self._planned if p.base} | self._before

    @property
    def _before(self) -> set[str]:
        records = self._repo.backups(self._vm)
        used = {(p.name, p.before.root) for p in self._planned if p.before}
        return {r.id for r in records for d in r.disks if (d.name, d.root) in used}

    async def run(self, still_locked: Any) -> Outcome:
        description = await self._plan()
        if self._options.dry_run:
            return Outcome(self._vm, self._planned)
        self._tell_fallbacks()
        durable.crash_point("runner.planned")
        writer = await asyncio.to_thread(self._repo.writer, still_locked, self._options.level)
        pipeline = Pipeline(writer, self._repo.cluster_size)
        try:
            return await self._copy_and_commit(description, writer, pipeline)
        finally:
            await asyncio.to_thread(pipeline.close)
            await asyncio.to_thread(writer.abort)

    # -- before the copy ------------------------------------------------------------------------------------------

    async def _plan(self) -> Description:
        all_backups = await asyncio.to_thread(self._repo.backups)
        known = Known(
            self._repo.id,
            self._repo.cluster_size,
            [r for r in all_backups if r.vm == self._vm],
            frozenset(),
            tuple(self._repo.unreadable),
        )
        keep = {known.run(ident) for ident in (*(r.id for r in all_backups), *known.unreadable)}
        description = await self._engine.describe()
        self._contradicted = contradictions(self._vm, description, known.records)
        self._contradicted += other_names(self._vm, description, all_backups, host_name(), self._options.disks)
        if self._engine.kind == "image" and not self._options.disks:
            claimed = self._options.name is not None and not self._options.incremental
            self._contradicted += other_images(description, known.records, host_name(), claimed=claimed)
        for what in self._contradicted:
            if self._options.strict:
                raise UsageError(what, hint="Give the right name with --name, or run once without --strict.")
            self._report(Warned(what))
        strays = known.strays(description, keep)
        if not self._options.dry_run:
            for removed in await self._engine.cleanup(known.prefix, keep):
                self._report(Notice(f"removed what an earlier run left: {removed}"))
            description = await self._engine.describe()
        for each in missed(description, self._options.disks, self._options.exclude):
            self._report(Warned(f"disk {each.name} is left out: {each.why}"))
        disks = choose(description, self._options.disks, self._options.exclude)
        off, said = self._engine.kind == "image", self._options
        self._sources = await asyncio.to_thread(Sources, description, off=off, trusted=said.trusted, ctime=said.ctime)
        notes = (*description.notes, *decrypted(disks, bool(self._repo.key)), *self._sources.notes())
        for note in notes:
            self._report(Warned(note))
        damaged = await asyncio.to_thread(self._repo.unsound, known.records) | self._distrusted
        where, names = self._options.state_dir, [d.name for d in disks]
        lost = await asyncio.to_thread(lost_bitmaps, where, self._vm, names, in_qemu=self._engine.kind == "qemu")
        known = replace(known, damaged=damaged, host=host_name(), lost=lost, **self._sources.now())
        known = replace(known, sampling=self._options.sampling)
        self._planned = make_plan(disks, known, Request(self._options.incremental, self._id, frozenset(strays)))
        if not self._options.dry_run:
            notes = (*notes, *await self._look_closer())
        for planned in () if self._options.fallback else self._planned:
            if reason := planned.plan.reason:
                message = f"disk {planned.name} would have to be read whole: {reason.text} ({reason})"
                raise FallbackRefusedError(message, reason=reason, hint="Run without --no-fallback, or make a full.")
        return replace(description, notes=notes)

    async def _look_closer(self) -> list[str]:
        """Sample and audit bitmaps that the run would build on. Returns notes for the record."""
        notes = []
        for planned in self._planned:
            if provisional(planned):
                note, wrong = await asyncio.to_thread(look_by_sample, self._repo, planned, self._report)
                notes += [note] if note else []
                if wrong:
                    await self._engine.invalidate(planned.plan.disk, wrong, Reason.AUDIT)
            if self._options.audit:
                await asyncio.to_thread(look_by_audit, self._repo, planned, self._options.audit, self._report)
        return notes

    def _tell_fallbacks(self) -> None:
        for planned in self._planned:
            if planned.plan.reason:
                self._report(Fallback(planned.name, planned.plan.reason, planned.detail))

    # -- the copy -------------------------------------------------------------------------------------------------

    async def _copy_and_commit(self, description: Description, writer: Writer, pipeline: Pipeline) -> Outcome:
        plans = [p.plan for p in self._planned]
        committed = False
        try:
            sinks = {p.name: await asyncio.to_thread(self._sink, p, writer, pipeline) for p in self._planned}
            result = await self._copy(sinks, pipeline)
            durable.crash_point("runner.copied")
            roots, failed = await asyncio.to_thread(_finish, sinks, result, pipeline)
            if not roots:
                raise _cause(failed, pipeline)
            record, lost = fitted(self._record(description, sinks, roots, result, failed))
            for what in lost:
                self._report(Warned(what))
            await self._engine.confirm()
            await asyncio.to_thread(self._sources.confirm)
            await to_the_end(asyncio.to_thread(writer.commit, record))
            committed = True
        finally:
            if not committed:
                await to_the_end(self._roll_back(plans))
        durable.crash_point("runner.committed")
        await to_the_end(self._give_up_replaced(set(roots)))
        durable.crash_point("runner.done")
        return Outcome(self._vm, self._planned, record, failed, result.left)

    def _sink(self, planned: Planned, writer: Writer, pipeline: Pipeline) -> DiskSink:
        full = planned.base is None
        disk = planned.plan.disk
        return DiskSink(self._repo, writer, pipeline, disk.name, disk.size, planned.before, full)

    async def _copy(self, sinks: Mapping[str, DiskSink], pipeline: Pipeline) -> RunResult:
        with SinkServer(sinks) as server:
            targets = {name: SinkTarget(sink, server) for name, sink in sinks.items()}

            def progress(disk: str, done: int, total: int) -> None:
                self._report(Progress(disk, done, total))

            try:
                return await self._engine.run([p.plan for p in self._planned], targets, progress)
            except IncbakError as e:
                if pipeline.failure:
                    raise _root(pipeline.failure) from e
                raise

    async def _roll_back(self, plans: Sequence[Any]) -> None:
        try:
            await self._engine.rollback(plans)
        except IncbakError as e:
            log.warning("the new bitmaps stay until the next run: %s", e)

    async def _give_up_replaced(self, done: set[str]) -> None:
        """The backup exists, so trouble here is only worth a warning: a bitmap too many harms nothing."""
        try:
            await self._engine.rollback([p.plan for p in self._planned if p.name not in done])
            await self._engine.commit([p.plan for p in self._planned if p.name in done])
        except IncbakError as e:
            self._report(Warned(f"the backup is made, but not all bitmaps are up to date: {e}"))

    # -- the record -----------------------------------------------------------------------------------------------

    def _record(
        self,
        description: Description,
        sinks: Mapping[str, DiskSink],
        roots: Mapping[str, bytes],
        result: RunResult,
        failed: Mapping[str, str],
    ) -> Record:
        disks = tuple(_disk_record(p, sinks[p.name], roots[p.name]) for p in self._planned if p.name in roots)
        bases = [p.base for p in self._planned if p.base and p.name in roots]
        notes = [*self._troubles, *self._contradicted, *description.notes, *result.notes]
        notes += [f"disk {x.name} was left out: {x.why}" for x in description.left_out]
        notes += [f"disk {name} failed: {why}" for name, why in failed.items()]
        notes += [f"left in the engine: {what}" for what in result.left]
        if result.frozen is not None:
            notes.append("the guest's file systems were frozen" if result.frozen else "the guest was not frozen")
        return Record(
            id=self._id,
            seq=last_number(self._repo.storage, self._repo.backups()) + 1,
            vm=self._vm,
            kind="incremental" if bases else "full",
            base=max(bases, key=lambda r: r.seq).id if bases else None,
            started=self._started,
            finished=_now(),
            cluster_size=self._repo.cluster_size,
            disks=disks,
            engine=description.engine,
            host=host_name(),
            program=f"incbak {__version__}",
            tags=tuple(self._options.tags),
            config=dict(description.config) | self._sources.config(),
            attachments=dict(self._options.attachments or {}),
            notes=tuple(notes),
        )


def _disk_record(planned: Planned, sink: DiskSink, root: bytes) -> DiskRecord:
    return DiskRecord(
        name=planned.name,
        size=sink.size,
        kind="incremental" if planned.base else "full",
        base=planned.base.id if planned.base else None,
        reason=planned.plan.reason.value if planned.plan.reason else None,
        detail=planned.detail,
        read=sink.counts.received,
        changed=sink.changed,
        stored=sink.counts.stored,
        root=root.hex(),
        bitmap=planned.plan.new_bitmap,
        audited=planned.audited,
        audit_turn=planned.audit_turn,
        format=planned.plan.disk.format,
    )


def _finish(
    sinks: Mapping[str, DiskSink], result: RunResult, pipeline: Pipeline
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Roots of the disks whose copy is proven whole, and why the others are not."""
    roots: dict[str, bytes] = {}
    failed: dict[str, str] = {}
    for name, sink in sinks.items():
        copy = result.disks.get(name, DiskResult(error="the engine says nothing of it"))
        if copy.error:
            failed[name] = copy.error
        elif sink.counts.received != copy.copied:
            failed[name] = f"the job says it copied {copy.copied} bytes, {sink.counts.received} came"
        else:
            try:
                roots[name] = sink.finish()
            except DamagedError:
                raise
            except BackupError as e:
                failed[name] = str(e)
    if pipeline.failure:
        raise _root(pipeline.failure)
    return roots, failed


def _cause(failed: Mapping[str, str], pipeline: Pipeline) -> IncbakError:
    if pipeline.failure:
        return _root(pipeline.failure)
    why = "; ".join(f"disk {name}: {error}" for name, error in failed.items())
    return BackupError(f"no backup was made: {why}", hint="The next run goes on from the same base.")


def _root(failure: BaseException) -> IncbakError:
    """What stopped the pipeline: that is what the user has to mend, not the I/O errors that followed from it."""
    return failure if isinstance(failure, IncbakError) else BackupError(f"cannot store the backup: {failure}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

"""Copying the backups of a plan, one after the other."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec
import numpy as np
from numpy.typing import NDArray

from incbak import durable
from incbak.errors import BackupError, DamagedError, DurabilityError, IncbakError, LockedError, SyncError, UsageError
from incbak.events import Progress, Reporter, Warned, silent
from incbak.repo.blob import ZERO_DIGEST
from incbak.repo.fitting import proven
from incbak.repo.index import Digests
from incbak.repo.memory import Memory
from incbak.repo.numbers import last_number, removed_numbers
from incbak.repo.record import MAX_MISSED, DiskRecord, Origin, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import TreeReader, TreeUpdate, differing
from incbak.repo.writer import Writer
from incbak.sync.carry import Carry, carrier, same_names
from incbak.sync.plan import Plan, make_plan

_BATCH = 8 << 20
"""Bytes of clusters that one thread reads and stores at once."""

durable.declare("sync.backup-copied")

Run = tuple[NDArray[np.int64], Digests]
"""Numbers of clusters, and their digests in the source."""
_Pair = tuple[Record, Record]
"""A backup as it stands in the source, and in the target."""


@dataclass(frozen=True)
class Options:
    """``names``: of which VMs, all if there are none. ``last``: so many of each at most. ``lock_wait`` in seconds."""

    names: Sequence[str] = ()
    last: int | None = None
    lock_wait: float = 0.0
    level: int = 1
    memory: Memory | None = None
    """What this host remembers of repositories."""


@dataclass
class Outcome:
    """``copied``: records as they are in the target now. ``failed``: VMs, or backups by their id, and why.

    ``unreadable``: records that the source lists and that cannot be read.
    """

    copied: list[Record] = field(default_factory=list)
    failed: dict[str, IncbakError] = field(default_factory=dict)
    held: int = 0
    unreadable: dict[str, str] = field(default_factory=dict)


def plan(source: Repository, target: Repository, options: Options, report: Reporter = silent) -> Plan:
    """What `sync` would copy. Raises `UsageError`, `DamagedError`."""
    if source.id == target.id:
        raise UsageError("the two are the same repository, or one is a copy of the other's files",
                         hint="Make the other with: incbak init")  # fmt: skip
    if source.cluster_size != target.cluster_size:
        sizes = f"{source.cluster_size} and {target.cluster_size} bytes"
        raise UsageError(f"the repositories have clusters of {sizes}",
                         hint="Make the other with: incbak init --cluster-size")  # fmt: skip
    for repo in (source, target):
        for what in options.memory.troubles(repo) if options.memory else []:
            report(Warned(what))
    theirs, ours = target.backups(), source.backups()
    planned = make_plan(ours, theirs, source.id, options.names, options.last, removed_numbers(source.storage))
    for name, why in target.unreadable.items():
        what = f"the target's list of backups is not whole: {why}"
        hint = f"Run: incbak -r {target.storage.root} check"
        vm = next((r.vm for r in ours if r.id == name), None)  # a copy keeps its id
        if vm is None or len({r.vm for r in ours}) == 1:
            raise DamagedError(what, hint=hint)
        planned.copy.pop(vm, None)
        planned.refused[vm] = SyncError(f"{vm}: {what}", hint=hint)
    return planned


def sync(source: Repository, target: Repository, options: Options, report: Reporter = silent) -> Outcome:
    """Copy what the target lacks. A backup that cannot be copied does not stop the others; trouble in writing does.

    Raises `UsageError` and `DamagedError` before anything is done, `DurabilityError` when the target cannot be written.
    """
    planned = plan(source, target, options, report)
    done = Outcome(failed=dict(planned.refused), held=planned.held, unreadable=dict(source.unreadable))
    for vm, records in planned.copy.items():
        try:
            with target.vm_lock(vm, options.lock_wait) as still_locked:
                missed = planned.missed.get(vm, frozenset())
                _Copier(source, target, vm, still_locked, options, report, missed).copy(records, done)
        except LockedError as e:
            done.failed[vm] = e
    return done


class _Copier:
    """Of one VM, which is locked in the target."""

    def __init__(
        self,
        source: Repository,
        target: Repository,
        vm: str,
        still_locked: Callable[[], None],
        options: Options,
        report: Reporter,
        missed: frozenset[str] = frozenset(),
    ) -> None:
        self._source, self._target, self._still_locked = source, target, still_locked
        self._missed = set(missed)
        self._options, self._report = options, report
        everything = target.backups()
        self._seq = last_number(target.storage, everything)
        self._theirs = {r.id: r for r in everything if r.vm == vm}
        self._unsound = target.unsound(list(self._theirs.values()))
        self._ours = source.backups(vm)
        self._missed |= source.unreadable.keys()  # of any VM: nobody knows

    def copy(self, records: Sequence[Record], done: Outcome) -> None:
        """These, oldest first. Raises `DurabilityError`, `LockedError`."""
        for record in records:
            if record.id in self._theirs:
                continue  # another sync has copied it while this one waited
            try:
                made = self._one(record)
            except (DamagedError, SyncError) as e:
                if record.id in self._source.storage.list("backups"):  # else it was pruned meanwhile
                    done.failed[record.id] = type(e)(f"backup {record.id[:8]} of {record.vm}: {e}", hint=e.hint)
                    self._missed.add(record.id)
                continue
            self._theirs[made.id] = made
            done.copied.append(made)
            durable.crash_point("sync.backup-copied")
            if made.seq > self._seq:
                self._seq = made.seq
                self._remember(made)

    def _one(self, record: Record) -> Record:
        """The record in the target. Raises `IncbakError`: then it is not there."""
        sound = [r for r in self._ours if r.id in self._theirs and r.id not in self._unsound]
        bases = [(r, self._theirs[r.id]) for r in reversed(sound)]
        try:
            return self._once(record, bases)
        except DamagedError:
            if not bases:
                raise
        return self._once(record, [])  # perhaps it was the base in the target that cannot be read

    def _remember(self, made: Record) -> None:
        if self._options.memory:
            try:
                self._options.memory.remember(self._target, made)
            except DurabilityError as e:
                self._report(Warned(f"backup {made.id[:8]} is copied, but this host cannot remember it: {e}"))

    def _once(self, record: Record, bases: Sequence[_Pair]) -> Record:
        with (
            self._target.writer(self._still_locked, self._options.level) as writer,
            ThreadPoolExecutor(os.cpu_count() or 1, "sync") as threads,
        ):
            carry = carrier(self._source.reader(), self._source.seal, writer)
            disks = tuple(self._disk(record, disk, bases, writer, carry, threads) for disk in record.disks)
            origin = Origin(self._source.id, record.seq, self._missed_before(record))
            made = msgspec.structs.replace(record, seq=self._number(record), disks=disks, origin=origin)
            try:
                proven(made)
            except BackupError as e:
                raise SyncError(str(e), hint=e.hint) from e
            writer.commit(made)
        return made

    def _missed_before(self, record: Record) -> tuple[str, ...]:
        """What this copy overtakes: still in the source, as far as that can be read, and not in the target."""
        there = (self._source.storage.list("backups").keys() & self._missed) - self._theirs.keys() - {record.id}
        later = {r.id for r in self._ours if r.seq > record.seq}
        return tuple(sorted(there - later))[:MAX_MISSED]

    def _number(self, record: Record) -> int:
        """The next one; that of its successor, for one that comes late."""
        after = {r.id for r in self._ours if r.seq > record.seq}
        return min((r.seq for r in self._theirs.values() if r.id in after and r.origin), default=self._seq + 1)

    def _disk(
        self,
        record: Record,
        disk: DiskRecord,
        bases: Sequence[_Pair],
        writer: Writer,
        carry: Carry,
        threads: ThreadPoolExecutor,
    ) -> DiskRecord:
        before = writer.stored
        base, there = next(
            ((b, t) for x, y in bases if (b := x.disk(disk.name)) and (t := y.disk(disk.name)) and b.size == disk.size),
            (None, None),
        )
        tree = self._source.tree(disk)
        update = self._target.update(writer, there, disk.size)
        old = self._source.tree(base) if base else TreeReader(self._source.reader().read, ZERO_DIGEST, tree.clusters)
        what = f"{record.vm} {disk.name}, {record.id[:8]}"
        self._carried(self._runs(old, tree, disk, what), carry, update, threads)
        root = update.finish().hex()
        if same_names(self._source.seal, writer.seal) and root != disk.root:
            what = f"disk {disk.name} of backup {record.id[:8]} came out different; it was not copied"
            raise SyncError(what, hint="Run incbak check --read-data on both repositories.")
        return msgspec.structs.replace(disk, root=root, stored=writer.stored - before, bitmap=None)

    def _runs(self, old: TreeReader, tree: TreeReader, disk: DiskRecord, what: str) -> Iterator[Run]:
        """What differs, in batches."""
        size, most = self._source.cluster_size, max(_BATCH // self._source.cluster_size, 1)
        numbers, digests, waiting = list[NDArray[np.int64]](), list[Digests](), 0
        for first, count in differing(old, tree):
            for start in range(first, first + count, most):
                part = min(most, first + count - start)
                numbers.append(np.arange(start, start + part))
                digests.append(tree.digests(start, part))
                waiting += part
                if waiting >= most:
                    yield np.concatenate(numbers), np.concatenate(digests)
                    numbers, digests, waiting = [], [], 0
                    self._report(Progress(what, min((start + part) * size, disk.size), disk.size, "copying"))
        if waiting:
            yield np.concatenate(numbers), np.concatenate(digests)

    @staticmethod
    def _carried(runs: Iterator[Run], carry: Carry, update: TreeUpdate, threads: ThreadPoolExecutor) -> None:
        """Several batches at once; they come to ``update`` in their order."""
        flying: deque[tuple[NDArray[np.int64], Future[Digests]]] = deque()
        limit = 2 * (os.cpu_count() or 1)
        try:
            for numbers, digests in runs:
                if len(flying) >= limit:
                    waited, future = flying.popleft()
                    update.set(waited, future.result())
                flying.append((numbers, threads.submit(carry, digests)))
            while flying:
                waited, future = flying.popleft()
                update.set(waited, future.result())
        finally:
            for _, future in flying:
                future.cancel()

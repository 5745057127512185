"""A VM in memory behind an `Engine`, which notes what the runner asks for and fails where it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from incbak.backup.runner import Options, Outcome, run
from incbak.engine.base import (
    BitmapInfo,
    Description,
    DiskPlan,
    DiskResult,
    Engine,
    EngineDisk,
    LeftOut,
    ProgressCallback,
    RunResult,
    Target,
    run_of,
    superseded,
)
from incbak.events import Event
from incbak.repo import blob
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.unit.repo.scene import CLUSTER


@dataclass
class Disk:
    """Content, and the dirty clusters of each bitmap; ``info`` overrides what is told of a bitmap."""

    data: bytearray
    bitmaps: dict[str, set[int]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)

    def write(self, offset: int, data: bytes) -> None:
        """As a guest does: recorded in every bitmap."""
        self.data[offset : offset + len(data)] = data
        for dirty in self.bitmaps.values():
            dirty.update(range(offset // CLUSTER, (offset + len(data) - 1) // CLUSTER + 1))

    def described(self, name: str) -> EngineDisk:
        """What the engine says of it."""
        infos = [
            BitmapInfo(**{"name": b, "granularity": CLUSTER, "count": len(dirty) * CLUSTER, **self.info.get(b, {})})
            for b, dirty in self.bitmaps.items()
        ]
        return EngineDisk(name, len(self.data), name, bitmaps=tuple(infos))


class FakeEngine(Engine):
    """``steps``: the calls that change something. ``on(step)`` is called at the beginning of each, and may raise."""

    def __init__(self, disks: Mapping[str, Disk], vm: str | None = "vm") -> None:
        self.disks, self.vm = dict(disks), vm
        self.steps: list[str] = []
        self.on: Callable[[str], None] = lambda step: None
        self.results: dict[str, DiskResult] = {}
        """What is said of a disk's copy in place of the truth."""
        self.flush, self.forgets = True, False
        """Whether the targets are flushed; whether nothing is said of any disk in the end."""
        self.cut: tuple[int, int] | None = None
        """Of each dirty cluster only these bytes are sent (start, end): the sink has to complete it."""
        self.hold: asyncio.Event | None = None
        """Set it to let a copy that has begun go on."""
        self.copying = asyncio.Event()
        self.left_out: tuple[LeftOut, ...] = ()

    def _step(self, step: str) -> None:
        self.steps.append(step)
        self.on(step)

    async def describe(self) -> Description:
        disks = tuple(d.described(n) for n, d in self.disks.items())
        return Description(self.vm, disks, "fake", left_out=self.left_out)

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        self._step("cleanup")
        gone = [
            (d, b) for d in self.disks.values() for b in d.bitmaps if b.startswith(prefix) and run_of(b) not in keep
        ]
        for disk, bitmap in gone:
            del disk.bitmaps[bitmap]
        return [bitmap for _disk, bitmap in gone]

    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        self._step("run")
        for plan in plans:
            self.disks[plan.disk.name].bitmaps[plan.new_bitmap] = set()
        self.copying.set()
        if self.hold:
            await self.hold.wait()
        results = {}
        for plan in plans:
            name = plan.disk.name
            results[name] = await asyncio.to_thread(self._copy, self.disks[name], plan, targets[name])
        return RunResult({} if self.forgets else {**results, **self.results})

    def _copy(self, disk: Disk, plan: DiskPlan, target: Target) -> DiskResult:
        clusters = range(-(-len(disk.data) // CLUSTER))
        done = 0
        for number in sorted(disk.bitmaps[plan.base_bitmap]) if plan.base_bitmap else clusters:
            start, end = self.cut if self.cut and plan.base_bitmap else (0, CLUSTER)
            piece = memoryview(
                bytes(disk.data[number * CLUSTER + start : min((number * CLUSTER) + end, len(disk.data))])
            )
            target.write(number * CLUSTER + start, piece)
            done += len(piece)
        if self.flush:
            target.flush()
        return DiskResult(done)

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        self._step("commit")
        for plan in plans:
            for name in superseded(plan):
                self.disks[plan.disk.name].bitmaps.pop(name, None)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        if plans:
            self._step("rollback " + " ".join(p.disk.name for p in plans))
        for plan in plans:
            self.disks[plan.disk.name].bitmaps.pop(plan.new_bitmap, None)


def back_up(
    repo: Repository, engine: Engine, events: list[Event] | None = None, *, incremental: bool = True, **more: Any
) -> Outcome:
    """One run, to its end."""
    options = Options(incremental=incremental, **more)
    report = events.append if events is not None else lambda event: None
    return asyncio.run(run(repo, engine, options, report))


def made(outcome: Outcome) -> Record:
    """The record of a run that made one."""
    assert outcome.record
    return outcome.record


def differing(repo: Repository, record: Record, name: str, data: bytes | bytearray) -> list[int]:
    """The clusters in which a backup's disk is not ``data``; -1 for the size. Read anew, and verified."""
    fresh = Repository.open(repo.storage.root)
    disk = record.disk(name)
    assert disk
    if disk.size != len(data):
        return [-1]
    tree, reader, wrong = fresh.tree(disk), fresh.reader(), []
    for number in range(-(-disk.size // CLUSTER)):
        wanted = bytes(data[number * CLUSTER : (number + 1) * CLUSTER])
        digest = tree.digests(number, 1)[0].tobytes()
        found = bytes(len(wanted)) if digest == blob.ZERO_DIGEST else bytes(reader.read(digest))
        if found != wanted:
            wrong.append(number)
    return wrong

"""``incbak bitmap verify``: an audit without a backup."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from incbak.backup.audit import Findings, Slice, audit_disk
from incbak.backup.plan import Known, Planned, Request, choose, make_plan
from incbak.backup.sources import Sources
from incbak.backup.vm import locked, vm_name
from incbak.bitmap.lost import lost_bitmaps
from incbak.engine.base import Engine
from incbak.events import Reporter, silent
from incbak.reasons import Reason
from incbak.repo.repository import Repository, host_name


@dataclass(frozen=True)
class Wanted:
    """Which VM and disks, as the user said it, and which slice of the clean clusters. ``trusted``: see `Sources`."""

    name: str | None = None
    disks: Sequence[str] = ()
    exclude: Sequence[str] = ()
    lock_wait: float = 0.0
    part: Slice = field(default_factory=Slice)
    trusted: Collection[str] = ()
    state_dir: Path | None = None


@dataclass(frozen=True)
class Verified:
    """One disk: what its next incremental would build on, and what an audit of that found (``None``: no base)."""

    planned: Planned
    findings: Findings | None


async def verify(
    repo: Repository, engine: Engine, wanted: Wanted, report: Reporter = silent
) -> tuple[str, list[Verified]]:
    """Return the VM's name, and each disk.

    A bitmap that is found wrong becomes invalid and keeps that reason: the next incremental reads the disk whole.

    Raises `BitmapError` where the engine keeps its bitmaps to itself, `DamagedError` when the base cannot be read.
    """
    vm = await vm_name(engine, wanted.name)
    async with locked(repo, vm, wanted.lock_wait):
        records = [r for r in await asyncio.to_thread(repo.backups) if r.vm == vm]
        description = await engine.describe()
        off, trusted = engine.kind == "image", wanted.trusted  # what is read is compared, so less has to be proven
        found = await asyncio.to_thread(Sources, description, off=off, trusted=trusted, ctime=False)
        damaged, unreadable = repo.damage().of(r.id for r in records), tuple(repo.unreadable)
        lost = await asyncio.to_thread(
            lost_bitmaps, wanted.state_dir, vm, [d.name for d in description.disks], in_qemu=engine.kind == "qemu"
        )
        known = Known(repo.id, repo.cluster_size, records, damaged, unreadable, host_name(), lost=lost)
        known = replace(known, **found.now())
        disks = choose(description, wanted.disks, wanted.exclude)
        verified = []
        for planned in make_plan(disks, known, Request(incremental=True, backup="verify")):
            findings = await asyncio.to_thread(audit_disk, repo, planned, wanted.part, report)
            if findings and findings.wrong and (name := planned.plan.base_bitmap):
                await engine.invalidate(planned.plan.disk, name, Reason.AUDIT)
            verified.append(Verified(planned, findings))
        return vm, verified

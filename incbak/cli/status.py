"""``incbak status``."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from incbak.backup.plan import Planned
from incbak.backup.recorded import recorded_format
from incbak.backup.runner import Options, Outcome, run
from incbak.cli.backup import interruptible, open_waiting
from incbak.cli.configured import Configured, judge, run_all, source_of
from incbak.cli.given import VM_NAME
from incbak.cli.settings import Settings, common, one_line, settings
from incbak.engine.detect import Source
from incbak.errors import BackupError, DiskError, EngineError, UsageError
from incbak.fleet.config import SAMPLE
from incbak.repo.drills import drills_of, read_drills
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import dated_ahead
from incbak.repo.verified import Verified
from incbak.report.backups import table
from incbak.report.proof import coverage_json, drill_column, drills_json, verified_column
from incbak.report.rhythm import due_column, due_in
from incbak.units import format_duration, format_size, parse_duration


@click.command(cls=Configured, short_help="Show whether a VM is protected, and what its next incremental would read.")
@click.argument("source", metavar="SOURCE", required=False)
@click.option("--all", "all_vms", is_flag=True, help="Every VM of the configuration.")
@click.option("--jobs", type=click.IntRange(1, 64), default=2, help="With --all: so many at once.  [default: 2]")
@click.option("--max-age", metavar="TIME", help="Exit with 1 if a disk's last backup is older or dated ahead, or none.")
@click.option("--name", type=VM_NAME, help="What the VM is called.  [default: as the monitor or image says]")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; may be repeated.")
@click.option("--monitor-wait", metavar="TIME", default="20", help="Wait so long while another client has the monitor.")
@common
def status(
    source: str | None,
    all_vms: bool,
    jobs: int,
    max_age: str | None,
    name: str | None,
    disks: tuple[str, ...],
    monitor_wait: str,
) -> None:
    """Show for each disk of SOURCE its last backup, the one that the next incremental builds on, how much was written
    since, when the next backup is due if they go on as they came, when a drill last proved that it can be restored, and
    within which time all data was verified. Changes nothing.

    With --max-age it answers whether the disks are protected: also when the VM does not answer, from what is in the
    repository.

    \b
    Example:
      incbak -r /backup status qmp:/run/web1.qmp
      incbak status --all --max-age 26h
    """
    here = settings()
    limit = parse_duration(max_age) if max_age else None
    if all_vms:
        if source or name:
            raise UsageError("--all is for all VMs of the configuration, and one was named")
        order = {vm: at for at, vm in enumerate(here.configuration().vms)}
        results = sorted(run_all(here, "status", jobs, json=True), key=lambda done: order[done.vm])
        _print(here, [json.loads(line) for done in results for line in done.out.splitlines()], several=True)
        for done in results:
            done.say_errors()
        judge(results, "is well")
        return
    wait = max(parse_duration(monitor_wait), 0.5)
    form, allowed = here.vm.format if here.vm else "", [Path(p) for p in here.vm.allow_backing] if here.vm else ()
    wanted = Source(source_of(here, source), here.state_dir, name, disks, monitor_wait=wait, look=True)
    sampling = here.vm is not None and here.vm.trust_after_boot == SAMPLE
    wanted = replace(wanted, format=form, allow_backing=allowed, sampling=sampling)
    rows = _rows(here, wanted, _trust(here), tolerant=limit is not None)
    _print(here, rows, several=False)
    if limit is not None and (late := [r["disk"] for r in rows if r["age"] is None or r["age"] > limit]):
        text = f"disks without a backup of the last {format_duration(limit)}: {', '.join(late)}"
        raise BackupError(text, hint="See why the last run failed; make one with: incbak incremental")


def _trust(here: Settings) -> dict[str, Any]:
    """What the owner of a VM says of what is below its disks."""
    return {"trusted": here.vm.trust_backing, "ctime": not here.vm.ignore_ctime} if here.vm else {}


def _rows(here: Settings, wanted: Source, trust: Mapping[str, Any], *, tolerant: bool) -> list[dict[str, Any]]:
    """One object for each disk; if ``tolerant``, of an engine that does not answer what the repository knows."""
    try:
        outcome, last, proof = interruptible(_look(here.open(), wanted, trust))
    except (EngineError, DiskError) as e:
        if not (tolerant and wanted.name):
            raise
        click.echo(one_line(f"incbak: {wanted.name}: {e}"), err=True)
        return _recorded(here, wanted.name)
    return [_facts(outcome.vm, planned, last.get(planned.name)) | proof for planned in outcome.planned]


def _recorded(here: Settings, vm: str) -> list[dict[str, Any]]:
    """The disks of the VM's newest backup. Raises `BackupError` when it has none."""
    with closing(here.open()) as repo:
        backups, proof = repo.backups(vm), _proof(repo, vm)
    if not backups:
        raise BackupError(f"there is no backup of {vm}", hint="Make one with: incbak full")
    last = {d.name: record for record in backups for d in record.disks}
    return [
        {"vm": vm, "disk": d.name, "size": d.size, **_last(last[d.name]), "base": None, "bitmap": None,
         "persistent": None, "dirty": None, "reason": None, **proof}
        for d in backups[-1].disks
    ]  # fmt: skip


def _print(here: Settings, rows: Sequence[Mapping[str, Any]], *, several: bool) -> None:
    if here.json:
        for row in rows:
            here.tell(dict(row))
        return
    head = ["DISK", "SIZE", "LAST BACKUP", "AGE", "DUE", "BASE", "NEXT READS", "DRILL", "VERIFIED"]
    lines = [[row["vm"], *_texts(row)] if several else _texts(row) for row in rows]
    here.say(table([["VM", *head] if several else head, *lines]), lines=True)


async def _look(
    repo: Repository, source: Source, trust: Mapping[str, Any]
) -> tuple[Outcome, dict[str, Record], dict[str, Any]]:
    """The plan of an incremental, the newest backup of each disk, and what proves that the backups are good."""
    source = replace(source, recorded=await asyncio.to_thread(recorded_format, repo, source))
    engine = await open_waiting(source, 0)
    try:
        options = Options(
            incremental=True,
            name=source.name,
            disks=source.disks,
            dry_run=True,
            **trust,
            state_dir=source.state_dir,
            sampling=source.sampling,
        )
        outcome = await run(repo, engine, options)
        for each in await engine.leftovers():
            if not each.at_work:
                text = f"incbak: a run that was killed has left {each} in QEMU; remove them: incbak clean {source.text}"
                click.echo(one_line(text), err=True)
        last = {d.name: record for record in repo.backups(outcome.vm) for d in record.disks}
        return outcome, last, _proof(repo, outcome.vm)
    finally:
        await engine.close()
        repo.close()


def _proof(repo: Repository, vm: str) -> dict[str, Any]:
    drills = drills_json(drills_of(read_drills(repo.storage), vm), time.time())
    finished = [datetime.fromisoformat(record.finished).timestamp() for record in repo.backups(vm)]
    verified = coverage_json(Verified(repo.storage).coverage())
    return {"drill": drills, "verified": verified, "due": due_in(finished, time.time())}


def _facts(vm: str, planned: Planned, last: Record | None) -> dict[str, Any]:
    """Sizes in bytes, age in seconds; ``dirty`` is what the next incremental would read."""
    plan = planned.plan
    bitmap = plan.disk.bitmap(plan.base_bitmap) if plan.base_bitmap else None
    dirty = min(bitmap.count, plan.disk.size) if bitmap else plan.disk.size
    return {
        "vm": vm,
        "disk": planned.name,
        "size": plan.disk.size,
        **_last(last),
        "base": planned.base.id if planned.base else None,
        "bitmap": plan.base_bitmap,
        "persistent": bitmap.persistent if bitmap else None,
        "dirty": dirty,
        "reason": plan.reason,
        "sample": bitmap is not None and bitmap.provisional,
    }


def _last(record: Record | None) -> dict[str, Any]:
    if record is None:
        return {"last": None, "finished": None, "age": None}
    return {"last": record.id, "finished": record.finished, "age": _age(record.finished)}


def _age(finished: str) -> float | None:
    """Return seconds; ``None`` for a backup dated ahead, which must not look young until its time has come."""
    now = datetime.now(UTC)
    if dated_ahead(finished, now.timestamp()):
        return None
    return max((now - datetime.fromisoformat(finished)).total_seconds(), 0.0)


def _age_text(row: Mapping[str, Any]) -> str:
    if not row["last"]:
        return ""
    return "dated ahead" if row["age"] is None else format_duration(row["age"])


def _texts(row: Mapping[str, Any]) -> list[str]:
    why = f" [{row['reason']}]" if row["reason"] else " if a sample agrees" if row.get("sample") else ""
    return [
        row["disk"],
        format_size(row["size"]),
        row["last"][:8] if row["last"] else "none",
        _age_text(row),
        due_column(row["due"]),
        row["base"][:8] if row["base"] else "none",
        "no answer" if row["dirty"] is None else format_size(row["dirty"]) + why,
        drill_column(row["drill"]),
        verified_column(row["verified"]),
    ]

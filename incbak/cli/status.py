"""``incbak status``."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import click

from incbak.backup.plan import Planned
from incbak.backup.runner import Options, Outcome, run
from incbak.cli.backup import interruptible, open_waiting
from incbak.cli.settings import Settings, common, printable, settings
from incbak.engine.detect import Source
from incbak.repo.record import Record
from incbak.report.backups import table
from incbak.units import format_duration, format_size, parse_duration


@click.command(short_help="Show what the next incremental of a VM would read.")
@click.argument("source", metavar="SOURCE")
@click.option("--name", metavar="VM", help="What the VM is called.  [default: as the monitor or image says]")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; may be repeated.")
@click.option("--monitor-wait", metavar="TIME", default="20", help="Wait so long while another client has the monitor.")
@common
def status(source: str, name: str | None, disks: tuple[str, ...], monitor_wait: str) -> None:
    """Show for each disk of SOURCE its last backup, the one that the next incremental builds on, and how much was
    written since. Changes nothing.

    \b
    Example:
      incbak -r /backup status qmp:/run/web1.qmp
    """
    here = settings()
    wanted = Source(source, here.state_dir, name, disks, monitor_wait=max(parse_duration(monitor_wait), 0.5))
    outcome, last = interruptible(_look(here, wanted))
    rows = [_facts(outcome.vm, planned, last.get(planned.name)) for planned in outcome.planned]
    if here.json:
        for row in rows:
            here.tell(row)
    else:
        here.say(printable(table([["DISK", "SIZE", "LAST BACKUP", "AGE", "BASE", "NEXT READS"], *map(_texts, rows)])))


async def _look(here: Settings, source: Source) -> tuple[Outcome, dict[str, Record]]:
    """The plan of an incremental, and the newest backup of each disk."""
    repo = here.open()
    engine = await open_waiting(source, 0)
    try:
        options = Options(incremental=True, name=source.name, disks=source.disks, dry_run=True)
        outcome = await run(repo, engine, options)
        return outcome, {d.name: record for record in repo.backups(outcome.vm) for d in record.disks}
    finally:
        await engine.close()
        repo.close()


def _facts(vm: str, planned: Planned, last: Record | None) -> dict[str, Any]:
    """Sizes in bytes, age in seconds; ``dirty`` is what the next incremental would read."""
    plan = planned.plan
    bitmap = plan.disk.bitmap(plan.base_bitmap) if plan.base_bitmap else None
    dirty = min(bitmap.count, plan.disk.size) if bitmap else plan.disk.size
    return {
        "vm": vm,
        "disk": planned.name,
        "size": plan.disk.size,
        "last": last.id if last else None,
        "finished": last.finished if last else None,
        "age": _age(last.finished) if last else None,
        "base": planned.base.id if planned.base else None,
        "bitmap": plan.base_bitmap,
        "persistent": bitmap.persistent if bitmap else None,
        "dirty": dirty,
        "reason": plan.reason,
    }


def _age(finished: str) -> float:
    return max((datetime.now(UTC) - datetime.fromisoformat(finished)).total_seconds(), 0.0)


def _texts(row: Mapping[str, Any]) -> list[str]:
    why = f" [{row['reason']}]" if row["reason"] else ""
    return [
        row["disk"],
        format_size(row["size"]),
        row["last"][:8] if row["last"] else "none",
        format_duration(row["age"]) if row["last"] else "",
        row["base"][:8] if row["base"] else "none",
        format_size(row["dirty"]) + why,
    ]

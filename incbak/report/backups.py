"""Backups as text and as JSON."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from incbak.reasons import Reason
from incbak.repo.record import DiskRecord, Record
from incbak.repo.retention import Decision
from incbak.report.printable import one_line
from incbak.units import format_size


def as_json(record: Record) -> dict[str, Any]:
    """What ``--json list`` prints of one backup; sizes in bytes."""
    return {
        "id": record.id,
        "vm": record.vm,
        "kind": record.kind,
        "base": record.base,
        "started": record.started,
        "finished": record.finished,
        "engine": record.engine,
        "tags": list(record.tags),
        "notes": list(record.notes),
        "disks": [_disk_json(d) for d in record.disks],
    }


def _disk_json(disk: DiskRecord) -> dict[str, Any]:
    fields = (
        "name",
        "size",
        "kind",
        "base",
        "reason",
        "detail",
        "read",
        "changed",
        "stored",
        "root",
        "bitmap",
        "audited",
    )
    return {field: getattr(disk, field) for field in fields}


def disk_line(record: Record, disk: DiskRecord) -> str:
    """One line per disk, for cron's mail: what was done."""
    text = f"{record.vm} {disk.name}: {disk.kind} {record.id[:8]}"
    if disk.base:
        text += f" on {disk.base[:8]}"
    text += f", read {format_size(disk.read)} of {format_size(disk.size)}, stored {format_size(disk.stored)}"
    return one_line(f"{text} [{disk.reason}]" if disk.reason else text)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns, aligned left, two spaces apart; the first row is the head."""
    rows = [[one_line(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def listing(records: Sequence[Record], pins: Collection[str] = ()) -> str:
    """All backups, oldest first; with tags and pins where there are any."""
    rows = [["ID", "VM", "KIND", "FINISHED", "DISKS", "SIZE", "READ", "STORED"]]
    for r in records:
        sums = [format_size(sum(getattr(d, f) for d in r.disks)) for f in ("size", "read", "stored")]
        rows.append([r.id[:8], r.vm, r.kind, _minute(r.finished), ",".join(d.name for d in r.disks), *sums])
    notes = [",".join([*r.tags, *(["(pinned)"] if r.id in pins else [])]) for r in records]
    return table([[*row, note] for row, note in zip(rows, ["TAGS", *notes], strict=True)] if any(notes) else rows)


def pruning(decisions: Sequence[Decision]) -> str:
    """What a prune does with each backup, and why."""
    rows = [["ID", "VM", "FINISHED", "ACTION", "REASONS"]]
    for d in decisions:
        action = "keep" if d.keep else "remove"
        rows.append([d.record.id[:8], d.record.vm, _minute(d.record.finished), action, ", ".join(d.reasons)])
    return table(rows)


def _minute(time: str) -> str:
    return time[:19].replace("T", " ")


def details(record: Record, *, pinned: bool = False) -> str:
    """One backup in full."""
    lines = [
        f"backup    {record.id}",
        f"vm        {record.vm}",
        f"kind      {record.kind}" + (f" on {record.base[:8]}" if record.base else ""),
        f"started   {record.started}",
        f"finished  {record.finished}",
        f"engine    {record.engine} on {record.host}",
    ]
    if record.tags:
        lines.append(f"tags      {', '.join(record.tags)}")
    if record.origin:
        lines.append(
            f"copied    from repository {record.origin.repository[:8]}, where it is number {record.origin.seq}"
        )
    if pinned:
        lines.append("pinned    no prune removes it")
    for d in record.disks:
        lines.append(f"disk      {d.name}: {d.kind}" + (f" on {d.base[:8]}" if d.base else ""))
        lines.append(f"          size    {d.size} ({format_size(d.size)})")
        lines.append(f"          read    {d.read} ({format_size(d.read)})")
        lines.append(f"          stored  {d.stored} ({format_size(d.stored)})")
        lines.append(f"          root    {d.root}")
        if d.reason:
            text = Reason(d.reason).text if d.reason in set(Reason) else d.reason
            lines.append(f"          reason  {d.reason}: {text}{f': {d.detail}' if d.detail else ''}")
        if d.audited:
            lines.append(f"          audited {d.audited} ({format_size(d.audited)})")
    lines += [f"attached  {name} ({format_size(len(text.encode()))})" for name, text in record.attachments.items()]
    lines += [f"note      {note}" for note in record.notes]
    return "\n".join(one_line(line) for line in lines)


def chosen_table(chosen: Sequence[tuple[str, Record | None]]) -> str:
    """Return a table of backups by id; those whose record cannot be read say so."""
    rows = [["ID", "VM", "KIND", "FINISHED", "DISKS"]]
    for ident, r in chosen:
        facts = (
            [r.vm, r.kind, _minute(r.finished), ",".join(d.name for d in r.disks)] if r else ["unreadable", "", "", ""]
        )
        rows.append([ident[:8], *facts])
    return table(rows)

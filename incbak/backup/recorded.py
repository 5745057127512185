"""The format of a disk as the repository has it."""

from __future__ import annotations

from pathlib import Path

from incbak.disk.formats import Before
from incbak.engine.detect import Source
from incbak.engine.private_daemon import DEFAULT_DISK
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository


def recorded_format(repo: Repository, source: Source) -> Before:
    """What the newest backup says of the format of the image ``source``; nothing for a monitor."""
    if source.text.startswith("qmp:"):
        return Before()
    vm = source.name or Path(source.text).stem
    for record in reversed(repo.backups(vm)):
        name = source.disks[0] if source.disks else DEFAULT_DISK
        disk = record.disk(name) or (record.disks[0] if len(record.disks) == 1 and not source.disks else None)
        if disk and (form := _format(record, disk)):
            return Before(form, f"backup {record.id[:8]}", same=disk.name == name)
    return Before()


def _format(record: Record, disk: DiskRecord) -> str:
    """Records did not always say it: of an image that was off, the configuration did unless it was raw."""
    if disk.format:
        return disk.format
    offline = record.engine == "image" or "format" in record.config
    return str(record.config.get("format", "raw")) if offline else ""

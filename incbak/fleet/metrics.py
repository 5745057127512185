"""A VM's last run as a text file for Prometheus (node_exporter's textfile collector), replaced in one step.

What is known of the last backup stays in the file when a later run fails.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path

from incbak import durable
from incbak.repo.record import Record

_RUN = {
    "incbak_run_timestamp_seconds": "When the last run ended.",
    "incbak_run_exit_code": "How the last run ended: 0 done, 3 some disks only.",
}
_BACKUP = {
    "incbak_backup_timestamp_seconds": "When the last backup was finished.",
    "incbak_backup_duration_seconds": "How long it took.",
    "incbak_backup_disk_bytes": "Size of the disk.",
    "incbak_backup_read_bytes": "What was read of the disk.",
    "incbak_backup_stored_bytes": "What was new and is stored.",
    "incbak_backup_read_whole": "Whether the disk was read whole although an incremental was asked for.",
}
_LIMIT = 1 << 20


def write_metrics(path: Path, vm: str, exit_code: int, record: Record | None) -> None:
    """Raises `DurabilityError`. The file can be read by everybody, as node_exporter must."""
    samples: dict[str, list[str]] = {name: [] for name in (*_RUN, *_BACKUP)}
    samples["incbak_run_timestamp_seconds"].append(_sample({"vm": vm}, time.time()))
    samples["incbak_run_exit_code"].append(_sample({"vm": vm}, exit_code))
    if record:
        for name, sample in _of_backup(record):
            samples[name].append(sample)
    else:
        for name, sample in _kept(path):
            samples[name].append(sample)
    lines = []
    for name, text in (_RUN | _BACKUP).items():
        if samples[name]:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", *(name + sample for sample in samples[name])]
    durable.write_new(path, ["\n".join([*lines, ""]).encode()], replace=True, mode=0o644)


def _of_backup(record: Record) -> Iterator[tuple[str, str]]:
    finished = datetime.fromisoformat(record.finished).timestamp()
    started = datetime.fromisoformat(record.started).timestamp()
    yield "incbak_backup_timestamp_seconds", _sample({"vm": record.vm}, finished)
    yield "incbak_backup_duration_seconds", _sample({"vm": record.vm}, finished - started)
    for disk in record.disks:
        labels = {"vm": record.vm, "disk": disk.name}
        yield "incbak_backup_disk_bytes", _sample(labels, disk.size)
        yield "incbak_backup_read_bytes", _sample(labels, disk.read)
        yield "incbak_backup_stored_bytes", _sample(labels, disk.stored)
        why = {"reason": str(disk.reason)} if disk.reason else {}
        yield "incbak_backup_read_whole", _sample(labels | why, int(bool(disk.reason)))


def _kept(path: Path) -> Iterator[tuple[str, str]]:
    """The samples of the last backup in the file that is there."""
    try:
        text = path.read_text(encoding="utf-8")[:_LIMIT]
    except (OSError, UnicodeDecodeError):
        return
    for line in text.splitlines():
        name, brace, rest = line.partition("{")
        if brace and name in _BACKUP:
            yield name, brace + rest


def _sample(labels: Mapping[str, str], value: float) -> str:
    told = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{{{told}}} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

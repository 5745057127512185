"""A VM's last run as a text file for Prometheus (node_exporter's textfile collector), replaced in one step.

What is known of the last backup stays in the file when a later run fails; backups and drills leave each other's.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path

from incbak import durable
from incbak.errors import UsageError
from incbak.newfile import refuse_irreplaceable
from incbak.opening import open_text
from incbak.repo.drills import Drills
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
_DRILL = {
    "incbak_drill_timestamp_seconds": "When the last drill that was good ended.",
    "incbak_drill_run_timestamp_seconds": "When the last drill ended.",
    "incbak_drill_run_exit_code": "How the last drill ended: 0 good, 13 the repository is damaged.",
}
_LIMIT = 1 << 20
_MARK = b"# HELP incbak_"
_ANOTHER = "Remove it, or choose another name."


def write_metrics(path: Path, vm: str, exit_code: int, record: Record | None) -> None:
    """Write the file; everybody can read it, as node_exporter must.

    Raises `DurabilityError`, and `UsageError` when there is anything but metrics.
    """
    _refuse_another(path)
    samples = [
        ("incbak_run_timestamp_seconds", _sample({"vm": vm}, time.time())),
        ("incbak_run_exit_code", _sample({"vm": vm}, exit_code)),
    ]
    _write(path, [*samples, *(_of_backup(record) if record else _kept(path, _BACKUP)), *_kept(path, _DRILL)])


def write_drill_metrics(path: Path, vm: str, drills: Drills) -> None:
    """As `write_metrics`, of the drills."""
    _refuse_another(path)
    samples = []
    if good := drills.good:
        samples.append(("incbak_drill_timestamp_seconds", _sample({"vm": vm}, good.at)))
    if last := drills.last:
        samples.append(("incbak_drill_run_timestamp_seconds", _sample({"vm": vm}, last.at)))
        samples.append(("incbak_drill_run_exit_code", _sample({"vm": vm}, last.exit_code)))
    _write(path, [*_kept(path, _RUN | _BACKUP), *samples])


def _write(path: Path, samples: Iterable[tuple[str, str]]) -> None:
    by_name: dict[str, list[str]] = {}
    for name, sample in samples:
        by_name.setdefault(name, []).append(sample)
    lines = []
    for name, text in (_RUN | _BACKUP | _DRILL).items():
        if name in by_name:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} gauge", *(name + sample for sample in by_name[name])]
    durable.write_new(path, ["\n".join([*lines, ""]).encode()], replace=True, mode=0o644)


def _refuse_another(path: Path) -> None:
    """Raise `UsageError` when there is anything but metrics: a mistyped name may be that of an image."""
    refuse_irreplaceable(path)
    try:
        with open_text(path) as file:
            head = file.read(len(_MARK))
    except FileNotFoundError:
        return
    except OSError as e:
        raise UsageError(f"cannot write metrics to {path}: {e.strerror}", hint=_ANOTHER) from e
    if head and head != _MARK:
        raise UsageError(f"{path} is there and has no metrics; it is not replaced", hint=_ANOTHER)


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


def _kept(path: Path, names: Collection[str]) -> Iterator[tuple[str, str]]:
    """The samples of these names in the file that is there."""
    try:
        with open_text(path) as file:
            text = file.read(_LIMIT).decode()
    except (OSError, UnicodeDecodeError):
        return
    for line in text.split("\n"):  # and at no other end of a line that Unicode knows
        name, brace, rest = line.partition("{")
        if brace and name in names:
            yield name, brace + rest


def _sample(labels: Mapping[str, str], value: float) -> str:
    told = ",".join(f'{name}="{_escaped(text)}"' for name, text in labels.items())
    return f"{{{told}}} {value:.17g}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")

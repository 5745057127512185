"""A whole VM: every disk of a backup under safe names in one directory, and what was kept with them.

::

    DIR/NAME.raw          each disk (or .qcow2)
    DIR/attachments/NAME  the files that were attached
    DIR/vm.json           which disk is which file, and what the engine said of the VM: its block graph

Names come from a repository that a stranger may have written: each becomes one component, and no link is followed. A
disk has its name when it is whole and synced, and ``vm.json`` comes last, with what failed. One disk that fails does
not stop the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from incbak import durable
from incbak.bitmap.store import component
from incbak.errors import IncbakError, RestoreError
from incbak.repo.record import DiskRecord, Record

DESCRIPTION = "vm.json"
ATTACHMENTS = "attachments"

RestoreOne = Callable[[DiskRecord, str], None]
"""Restores a disk to a path; raises `IncbakError`."""


@dataclass
class Whole:
    """``files``: paths by disk; ``attachments``: by name; ``failed``: what could not be restored, and why."""

    files: dict[str, Path] = field(default_factory=dict)
    attachments: dict[str, Path] = field(default_factory=dict)
    failed: dict[str, IncbakError] = field(default_factory=dict)


def restore_vm(record: Record, directory: Path, form: str, restore: RestoreOne, *, force: bool = False) -> Whole:
    """Everything of ``record`` into ``directory``, which is made if it is missing.

    Raises `RestoreError` before anything is written when a name is taken and ``force`` is false, or is a link;
    `DurabilityError` for the directory itself. What fails later is `Whole.failed`.
    """
    done, plan = Whole(), list(_plan(record, directory, form))
    for _name, path in plan:
        _check(path, directory, force=force)
    _make(directory)
    wanted = {disk.name: disk for disk in record.disks}
    for name, path in plan[: len(record.disks)]:
        try:
            restore(wanted[name], str(path))
            done.files[name] = path
        except IncbakError as e:
            done.failed[f"disk {name}"] = e
    _attach(record, plan[len(record.disks) : -1], done, directory, force=force)
    description = msgspec.json.format(msgspec.json.encode(_described(record, done, directory)))
    durable.write_new(directory / DESCRIPTION, [description, b"\n"], replace=force)
    return done


def _plan(record: Record, directory: Path, form: str) -> Iterator[tuple[str, Path]]:
    """Disks, then attachments, then the description; with where each goes. Raises `RestoreError` for no name."""
    try:
        for disk in record.disks:
            yield disk.name, directory / f"{component(disk.name)}.{form}"
        for name in record.attachments:
            yield name, directory / ATTACHMENTS / component(name)
    except IncbakError as e:
        raise RestoreError(f"backup {record.id[:8]}: {e}", hint="Restore its disks one by one, with --disk.") from e
    yield DESCRIPTION, directory / DESCRIPTION


def _check(path: Path, directory: Path, *, force: bool) -> None:
    try:
        for part in {path, path.parent} - {directory}:
            if part.is_symlink():
                hint = "Links are not followed there. Choose another directory."
                raise RestoreError(f"{part} is a link", hint=hint)
        taken = path.exists()
    except OSError as e:
        raise RestoreError(f"cannot look at {path}: {e.strerror}", hint="Restore its disks one by one.") from e
    if taken and not force:
        raise RestoreError(f"{path} exists", hint="Choose another directory, or replace it with --force.")


def _make(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise RestoreError(f"{directory} is no directory")
    try:
        durable.make_dir(directory)
    except OSError as e:
        raise RestoreError(f"cannot make {directory}: {e.strerror}", hint="Check the path.") from e


def _attach(record: Record, plan: list[tuple[str, Path]], done: Whole, directory: Path, *, force: bool) -> None:
    for name, path in plan:
        try:
            _make(directory / ATTACHMENTS)
            durable.write_new(path, [record.attachments[name].encode()], replace=force)
            done.attachments[name] = path
        except FileExistsError:
            done.failed[f"attachment {name}"] = RestoreError(f"{path} appeared during the restore; it is left alone")
        except IncbakError as e:
            done.failed[f"attachment {name}"] = e


def _described(record: Record, done: Whole, directory: Path) -> dict[str, Any]:
    files = {name: str(path.relative_to(directory)) for name, path in done.files.items()}
    return {
        "vm": record.vm,
        "backup": record.id,
        "finished": record.finished,
        "engine": record.engine,
        "disks": [{"name": d.name, "size": d.size, "root": d.root, "file": files.get(d.name)} for d in record.disks],
        "attachments": {name: str(path.relative_to(directory)) for name, path in done.attachments.items()},
        "failed": {name: str(error) for name, error in done.failed.items()},
        "config": record.config,
    }


__all__ = ["ATTACHMENTS", "DESCRIPTION", "Whole", "restore_vm"]

"""A backup whose record says what a stranger's might."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.unit.backup.scene import Disk, FakeEngine, back_up
from tests.unit.repo.scene import new

DISKS = {"vda": b"first" * 5000, "vdb": b"second" * 9000}


def forged(path: Path, disks: Mapping[str, bytes], **more: Any) -> tuple[Repository, Record]:
    """A repository with one backup; ``more``: fields of its record."""
    repo = new(path)
    engine = FakeEngine({name: Disk(bytearray(data)) for name, data in disks.items()})
    made = back_up(repo, engine, incremental=False).record
    assert made
    record = msgspec.structs.replace(made, **more)
    repo.storage.remove("backups", made.id)
    with repo.vm_lock("vm") as still_locked, repo.writer(still_locked) as writer:
        writer.commit(record)
    return repo, record

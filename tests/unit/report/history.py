"""Repositories with a past: many backups, hostile words, disks whose changes are known."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.unit.repo.scene import CLUSTER, cluster, new, record_of, store

NOW = datetime(2026, 11, 24, 12, 0, tzinfo=UTC)
HOSTILE = "</title><script>alert(1)</script>'\"&\x1b[31m\u202e<img src=//evil.example onerror=x>"


def back_up(repo: Repository, vm: str, disk: str, content: Sequence[int], when: datetime, **more: Any) -> Record:
    """One backup of one disk; ``more``: fields of the record, those of the disk behind ``disk_``."""
    with repo.vm_lock(vm) as still_locked, repo.writer(still_locked) as writer:
        update = repo.update(writer, None, len(content) * CLUSTER)
        digests = np.frombuffer(b"".join(store(writer, cluster(n)) for n in content), dtype=np.uint8).reshape(-1, 32)
        update.set(np.arange(len(content)), digests)
        made = record_of(repo, {disk: (len(content) * CLUSTER, update.finish())}, vm=vm)
        of_disk = {k.removeprefix("disk_"): v for k, v in more.items() if k.startswith("disk_")}
        rest = {k: v for k, v in more.items() if not k.startswith("disk_")}
        disks = tuple(msgspec.structs.replace(d, **of_disk) for d in made.disks)
        times = {"started": when.isoformat(), "finished": (when + timedelta(minutes=1)).isoformat()}
        made = msgspec.structs.replace(made, disks=disks, **{**times, **rest})
        writer.commit(made)
    return made


def eventful(path: Path, count: int = 100, vm: str = "web1", disk: str = "vda") -> Repository:
    """``count`` nightly backups of which the i-th changes cluster 0 and, each third, one more."""
    repo, rng, content = new(path), random.Random(1), [1] * 64
    for n in range(count):
        when = NOW - timedelta(days=count - n, hours=9)
        content[0] = 10 + n
        if n % 3 == 0:
            content[rng.choice((1, 31, 32, 63))] = 1000 + n
        more: dict[str, Any] = {"kind": "incremental", "disk_kind": "incremental",
                                "disk_read": rng.randrange(1 << 20, 1 << 24),
                                "disk_stored": rng.randrange(1 << 16, 1 << 22)}  # fmt: skip
        if n % 30 == 0:
            more |= {"kind": "full", "disk_kind": "full", "disk_read": 8 << 30, "disk_stored": 1 << 30}
        if n % 41 == 40:
            more |= {"disk_reason": "disk-changed", "disk_read": 8 << 30}
        if n == count - 5:
            more |= {"notes": (f"disk {disk} failed: no luck",)}
        back_up(repo, vm, disk, content, when, **more)
    return repo

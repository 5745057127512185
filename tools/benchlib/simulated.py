"""A repository of a disk that no machine here has: index, tables and tree are real, the packs' content is a hole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from incbak.repo import pack
from incbak.repo.ids import new_id
from incbak.repo.index import encode
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository

CLUSTER = 65536
_STORED = 21 << 10
_IN_PACK = pack.TARGET // _STORED
_IN_INDEX = 1 << 18
_STEP = 1 << 18


def simulate(path: Path, size: int, changed: int) -> int:
    """Two backups of a disk of ``size`` bytes without a hole, the second with ``changed`` other clusters.

    Returns the number of clusters. All digests are random, so no cluster can be read.
    """
    repo = Repository.init(path, CLUSTER)
    clusters, rng = size // CLUSTER, np.random.default_rng(1)
    first = _back_up(repo, None, clusters, _runs(rng, np.arange(clusters)))
    _back_up(repo, first, clusters, _runs(rng, np.sort(rng.choice(clusters, changed, replace=False))))
    repo.close()
    return clusters


def _runs(rng: np.random.Generator, numbers: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], bytes]]:
    for start in range(0, len(numbers), _STEP):
        part = numbers[start : start + _STEP]
        yield part, rng.bytes(32 * len(part))


def _back_up(
    repo: Repository, base: Record | None, clusters: int, runs: Iterator[tuple[NDArray[np.int64], bytes]]
) -> Record:
    packs: list[tuple[str, int]] = []
    tables: list[pack.Entries] = []

    def flush() -> None:
        if packs:
            numbers = np.repeat(np.arange(len(tables), dtype=np.uint32), [len(t) for t in tables])
            repo.storage.write("index", new_id(), encode(packs, numbers, np.concatenate(tables)))
            packs.clear()
            tables.clear()

    with repo.vm_lock("large") as still_locked, repo.writer(still_locked) as writer:
        update = repo.update(writer, base.disks[0] if base else None, clusters * CLUSTER)
        for numbers, digests in runs:
            update.set(numbers, np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
            for start in range(0, len(numbers), _IN_PACK):
                made, entries = _hollow(repo, digests[32 * start : 32 * (start + _IN_PACK)])
                packs.append(made)
                tables.append(entries)
            if sum(map(len, tables)) >= _IN_INDEX:
                flush()
        flush()
        disk = DiskRecord(name="vda", size=clusters * CLUSTER, kind="full", base=None, reason=None,
                          read=clusters * CLUSTER, stored=0, root=update.finish().hex())  # fmt: skip
        seq = 1 + (base.seq if base else 0)
        when = f"2026-01-0{seq}T00:00:00Z"
        record = Record(id=repo.new_backup_id(), seq=seq, vm="large", kind="full", base=None, started=when,
                        finished=when, cluster_size=CLUSTER, disks=(disk,), engine="simulated")  # fmt: skip
        writer.commit(record)
    return msgspec.structs.replace(record)


def _hollow(repo: Repository, digests: bytes) -> tuple[tuple[str, int], pack.Entries]:
    """A pack with a table and nothing in it."""
    count = len(digests) // 32
    entries = np.zeros(count, dtype=pack.ENTRY)
    entries["digest"] = np.frombuffer(digests, dtype="V32")
    entries["offset"] = pack.HEAD.size + np.arange(count, dtype=np.uint64) * _STORED
    entries["stored"], entries["raw"], entries["codec"] = _STORED, CLUSTER, 1
    end = pack.HEAD.size + count * _STORED
    table, name = pack.tail(entries, end)
    with (repo.storage.root / "packs" / name).open("xb") as f:
        f.write(pack.head())
        f.seek(end)
        f.write(table)
    return (name, end + len(table)), entries

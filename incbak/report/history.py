"""What a repository tells about the past: backups by VM, growth, and which parts of disks change. Bounded work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.repo.drills import Drills, drills_of, read_drills
from incbak.repo.pins import read_pins
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import TreeReader, clusters_in, differing
from incbak.repo.verified import Verified
from incbak.report.proof import drills_text, last_check_text

CELLS = 256
"""Parts of a disk in its map."""
PAGES = 20_000
"""Pages of trees that are read for all maps together, at most: 640 MiB before compression, a second or two."""
_FEWEST, _PAIRS = 64, 100


@dataclass(frozen=True)
class DiskMap:
    """How many of ``pairs`` of successive backups differ in each part of a disk. Shape of ``times``: (parts,)."""

    disk: str
    size: int
    times: NDArray[np.int64]
    pairs: int
    note: str = ""


@dataclass(frozen=True)
class VmHistory:
    """Records oldest first, never empty. ``drill``: the last one in words."""

    name: str
    records: tuple[Record, ...]
    maps: tuple[DiskMap, ...]
    drill: str
    drill_failed: bool


@dataclass(frozen=True)
class History:
    """All of a repository; sizes in bytes. ``records``: of all VMs, in the order in which they were made."""

    repository: str
    where: str
    now: datetime
    vms: tuple[VmHistory, ...]
    records: tuple[Record, ...]
    packs: int
    packs_size: int
    check: str
    pins: frozenset[str] = frozenset()
    unreadable: tuple[str, ...] = field(default=())


class _EnoughError(Exception):
    """The budget is used up."""


def collect(repo: Repository, where: str, now: datetime, pages: int = PAGES) -> History:
    """Read what a report needs; trees as far as ``pages`` reach. Damage is noted and stops nothing."""
    records = repo.backups()
    unreadable = tuple(repo.unreadable.values())
    by_vm: dict[str, list[Record]] = {}
    for record in records:
        by_vm.setdefault(record.vm, []).append(record)
    disks = sum(len(of_one[-1].disks) for of_one in by_vm.values())
    share = max(pages // max(disks, 1), _FEWEST)
    packs = repo.storage.list("packs")
    drills = read_drills(repo.storage, now.timestamp)
    return History(
        repository=repo.id,
        where=where,
        now=now.astimezone(UTC),
        vms=tuple(_vm(repo, of_one, share, drills_of(drills, name), now) for name, of_one in sorted(by_vm.items())),
        records=tuple(records),
        packs=len(packs),
        packs_size=sum(packs.values()),
        check=last_check_text(Verified(repo.storage, now.timestamp).coverage()),
        pins=frozenset(read_pins(repo.storage)),
        unreadable=unreadable,
    )


def _vm(repo: Repository, records: list[Record], pages: int, drills: Drills, now: datetime) -> VmHistory:
    maps = tuple(disk_map(repo, records, disk.name, pages) for disk in records[-1].disks)
    failed = drills.last is not None and not drills.last.good
    return VmHistory(records[-1].vm, tuple(records), maps, drills_text(drills, now.timestamp()), failed)


def disk_map(repo: Repository, records: Sequence[Record], name: str, pages: int) -> DiskMap:
    """From the newest pair of backups back, until ``pages`` are read. Pairs of other sizes count for nothing."""
    with_it = [(r.cluster_size, d) for r in records if (d := r.disk(name))]
    step, last = with_it[-1]
    clusters = clusters_in(last.size, step)
    times = np.zeros(max(min(CELLS, clusters), 1), dtype=np.int64)
    read, pairs, note = _counted(repo.reader().read, pages), 0, ""
    for (step_a, a), (step_b, b) in zip(reversed(with_it[:-1]), reversed(with_it[1:]), strict=True):
        if pairs == _PAIRS:
            break
        if (a.size, b.size, step_a, step_b) != (last.size, last.size, step, step):
            continue
        try:
            times += _changed(_tree(read, a, clusters), _tree(read, b, clusters), clusters, len(times))
        except _EnoughError:
            note = "older backups were not compared, to keep this quick"
            break
        except DamagedError as e:
            note = f"older backups were not compared: {e}"
            break
        pairs += 1
    return DiskMap(name, last.size, times, pairs, note)


def _tree(read: Callable[[bytes], bytes | memoryview], disk: DiskRecord, clusters: int) -> TreeReader:
    return TreeReader(read, bytes.fromhex(disk.root), clusters)


def _changed(a: TreeReader, b: TreeReader, clusters: int, cells: int) -> NDArray[np.bool_]:
    found = np.zeros(cells, dtype=bool)
    for first, count in differing(a, b):
        found[first * cells // clusters : (first + count - 1) * cells // clusters + 1] = True
    return found


def _counted(read: Callable[[bytes], bytes | memoryview], pages: int) -> Callable[[bytes], bytes | memoryview]:
    left = pages

    def counted(digest: bytes) -> bytes | memoryview:
        nonlocal left
        left -= 1
        if left < 0:
            raise _EnoughError
        return read(digest)

    return counted

"""Backups and prunes of one VM: what is built on stays, and a base that was pruned is missed, not believed."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from incbak.backup.runner import Options, run
from incbak.engine.base import DiskResult
from incbak.errors import LockedError
from incbak.repo import prune as pruning
from incbak.repo.prune import Outcome, prune
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.unit.backup.scene import Disk, FakeEngine, back_up, differing, made
from tests.unit.repo.scene import CLUSTER, new

SIZE = 9 * CLUSTER + 300


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return new(tmp_path / "repo")


def _prune(repo: Repository, policy: Policy) -> Outcome:
    """By another process, as it were; content goes at once."""
    return prune(Repository.open(repo.storage.root), policy, None, pruning.Options(grace=0.0, repack_below=1.0))


def _random() -> bytearray:
    return bytearray(os.urandom(SIZE))


def test_a_disk_whose_base_was_pruned_is_read_whole(repo: Repository) -> None:
    """faults row 54: the bitmap counts from a backup that is gone. It goes, and the new backup has one of its own."""
    engine = FakeEngine({"vda": Disk(_random()), "vdb": Disk(_random())})
    back_up(repo, engine, incremental=False)
    back_up(repo, engine, disks=("vda",))
    assert _prune(repo, Policy(last=1)).trouble is None
    assert len(repo.backups()) == 1
    engine.disks["vdb"].write(0, b"new")
    record = made(back_up(repo, engine))
    assert [(d.kind, d.reason) for d in record.disks] == [("incremental", None), ("full", "base-missing")]
    for (name, disk), made_of in zip(engine.disks.items(), record.disks, strict=True):
        assert differing(repo, record, name, disk.data) == []
        assert list(disk.bitmaps) == [made_of.bitmap]


def test_the_base_and_the_content_of_a_run_that_is_under_way_may_be_pruned_from_the_list(repo: Repository) -> None:
    """faults rows 49, L23: it goes on, is complete, and the next prune leaves what it needs."""
    engine = FakeEngine({"vda": Disk(_random())})
    other = FakeEngine({"vda": Disk(_random())}, vm="other")
    base = made(back_up(repo, engine, incremental=False))
    made(back_up(repo, other, incremental=False))
    engine.disks["vda"].write(5 * CLUSTER, b"new")

    async def beside() -> Record:
        engine.hold = asyncio.Event()
        engine.copying.clear()
        task = asyncio.create_task(run(repo, engine, Options(incremental=True)))
        await engine.copying.wait()
        repo.storage.remove("backups", base.id)
        done = await asyncio.to_thread(_prune, repo, Policy(last=1))
        assert isinstance(done.trouble, LockedError)
        engine.hold.set()
        return made(await task)

    record = asyncio.run(beside())
    assert record.disks[0].base == base.id
    assert _prune(repo, Policy(last=1)).trouble is None
    assert differing(repo, record, "vda", engine.disks["vda"].data) == []
    engine.hold = None
    engine.disks["vda"].write(7 * CLUSTER, b"newer")
    after = made(back_up(repo, engine))
    assert after.disks[0].reason is None
    assert differing(repo, after, "vda", engine.disks["vda"].data) == []


def test_what_a_run_finds_there_stays_until_it_has_committed(repo: Repository) -> None:
    """The disk has gone back to what an old backup held: nothing is stored, and that backup is being pruned."""
    engine = FakeEngine({"vda": Disk(_random())})
    old = bytes(engine.disks["vda"].data)
    back_up(repo, engine, incremental=False)
    engine.disks["vda"].write(0, os.urandom(SIZE))
    back_up(repo, engine)
    engine.disks["vda"].write(0, old)

    async def beside() -> Record:
        engine.hold = asyncio.Event()
        engine.copying.clear()
        task = asyncio.create_task(run(repo, engine, Options(incremental=True)))
        await engine.copying.wait()
        done = await asyncio.to_thread(_prune, repo, Policy(last=1))
        assert isinstance(done.trouble, LockedError)
        assert done.trouble.exit_code == 11
        engine.hold.set()
        return made(await task)

    record = asyncio.run(beside())
    assert record.disks[0].stored == 0
    assert _prune(repo, Policy(last=1)).trouble is None
    assert [r.id for r in repo.backups()] == [record.id]
    assert differing(repo, record, "vda", old) == []


def test_a_run_that_begins_after_the_prune_stores_what_it_needs(repo: Repository) -> None:
    """What is condemned is there until its grace is over, and is not built on."""
    engine = FakeEngine({"vda": Disk(_random())})
    old = bytes(engine.disks["vda"].data)
    back_up(repo, engine, incremental=False)
    engine.disks["vda"].write(0, os.urandom(SIZE))
    back_up(repo, engine)
    options = pruning.Options(grace=1000.0)
    assert prune(Repository.open(repo.storage.root), Policy(last=1), None, options).condemned > 0
    engine.disks["vda"].write(0, old)
    record = made(back_up(repo, engine))
    assert record.disks[0].stored > 0
    assert record.disks[0].reason is None
    assert _prune(repo, Policy(last=1)).freed > 0
    assert differing(repo, record, "vda", old) == []


def test_a_backup_in_which_a_disk_failed_is_known_as_incomplete(repo: Repository) -> None:
    """The last one with all disks stays, too."""
    engine = FakeEngine({"vda": Disk(_random()), "vdb": Disk(_random())})
    whole = made(back_up(repo, engine, incremental=False))
    engine.results["vdb"] = DiskResult(error="Input/output error")
    partial = made(back_up(repo, engine))
    assert (whole.incomplete, partial.incomplete) == (False, True)
    assert [d.reasons for d in _prune(repo, Policy(last=1)).decisions] == [("last good",), ("last", "last good")]

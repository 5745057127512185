"""The runner's order: a backup exists before anything is given up for it, and whatever fails leaves the base whole."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak import durable
from incbak.backup.runner import Options, Outcome, run
from incbak.engine.base import DiskResult, LeftOut, bitmap_name, run_name
from incbak.errors import (
    BackupError,
    DurabilityError,
    EngineError,
    FallbackRefusedError,
    ImageChangedError,
    IncbakError,
    LockedError,
    RunStateError,
    UsageError,
)
from incbak.events import Event, Fallback, Notice, Warned
from incbak.reasons import Reason
from incbak.repo.repository import Repository
from tests.unit.backup.scene import Disk, FakeEngine, back_up, differing, made
from tests.unit.repo.scene import CLUSTER, new

CLUSTERS = 9
SIZE = CLUSTERS * CLUSTER + 300
WAIT = 20


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    durable.arm()


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return new(tmp_path / "repo")


@pytest.fixture
def engine() -> FakeEngine:
    """One disk of random content."""
    return FakeEngine({"vda": Disk(bytearray(os.urandom(SIZE)))})


def _two() -> FakeEngine:
    return FakeEngine({name: Disk(bytearray(os.urandom(SIZE))) for name in ("vda", "vdb")})


def _spoil(repo: Repository, digest: bytes) -> None:
    """Flip a byte in the middle of a stored blob."""
    index = Repository.open(repo.storage.root).index
    (place,) = index.places(digest)
    with (repo.storage.root / "packs" / place.pack).open("r+b") as f:
        f.seek(place.offset + place.stored // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 1]))


# -- the order ---------------------------------------------------------------------------------------------------------


def test_the_backup_is_listed_before_its_base_is_given_up(repo: Repository, engine: FakeEngine) -> None:
    """I6: at `commit` another process sees the record, and every bitmap is still there."""
    disk = engine.disks["vda"]
    seen: list[tuple[str, int, int]] = []
    engine.on = lambda step: seen.append((step, len(Repository.open(repo.storage.root).backups()), len(disk.bitmaps)))
    first = made(back_up(repo, engine, incremental=False))
    disk.write(CLUSTER, b"new")
    second = made(back_up(repo, engine))
    assert seen == [
        ("cleanup", 0, 0),
        ("run", 0, 0),
        ("commit", 1, 1),
        ("cleanup", 1, 1),
        ("run", 1, 1),
        ("commit", 2, 2),
    ]
    assert list(disk.bitmaps) == [second.disks[0].bitmap]
    assert differing(repo, second, "vda", disk.data) == []
    assert differing(repo, first, "vda", disk.data) == [1]


def test_what_the_record_says(repo: Repository, engine: FakeEngine) -> None:
    disk = engine.disks["vda"]
    first = made(back_up(repo, engine, incremental=False, tags=["weekly"]))
    disk.write(0, b"new")
    disk.write(5 * CLUSTER, bytes(disk.data[5 * CLUSTER : 5 * CLUSTER + 4]))
    second = made(back_up(repo, engine))
    (a,), (b,) = first.disks, second.disks
    assert (first.kind, first.base, first.seq, first.vm, first.tags) == ("full", None, 1, "vm", ("weekly",))
    assert (a.kind, a.base, a.reason, a.read, a.changed) == ("full", None, None, SIZE, SIZE)
    assert a.bitmap == bitmap_name(run_name(repo.id[:8], first.id[:8]), a.name)
    assert (second.kind, second.base, second.seq) == ("incremental", first.id, 2)
    assert (b.kind, b.base, b.reason, b.read, b.changed) == ("incremental", first.id, None, 2 * CLUSTER, CLUSTER)
    assert 0 < b.stored < a.stored


def test_a_disk_that_is_left_out_is_told(repo: Repository, engine: FakeEngine) -> None:
    """At each run, and not only in the record."""
    engine.left_out = (LeftOut("data", "it is removable"), LeftOut("cd0", "it is read-only", expected=True))
    events: list[Event] = []
    record = made(back_up(repo, engine, events, incremental=False))
    assert [e.text for e in events if isinstance(e, Warned)] == ["disk data is left out: it is removable"]
    assert "disk cd0 was left out: it is read-only" in record.notes


def test_only_bitmaps_of_this_repository_are_replaced(repo: Repository, engine: FakeEngine) -> None:
    """faults row 57; also older ones than the base: a run that was killed after its commit left them. Others' stay."""
    disk = engine.disks["vda"]
    first = made(back_up(repo, engine, incremental=False))
    disk.bitmaps |= {"incbak-00000000-11111111": set(), "mine": set()}
    engine.on = lambda step: _refuse(step, "commit")
    events: list[Event] = []
    back_up(repo, engine, events)
    assert any(isinstance(e, Warned) and "not all bitmaps are up to date" in e.text for e in events)
    assert len(disk.bitmaps) == 4
    engine.on = lambda step: None
    last = made(back_up(repo, engine))
    assert last.disks[0].base != first.id
    assert set(disk.bitmaps) == {"incbak-00000000-11111111", "mine", last.disks[0].bitmap}


def _refuse(step: str, which: str) -> None:
    if step.startswith(which):
        raise EngineError(f"{which} is refused")


# -- what is not proven whole is no backup -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("fewer", "the job says it copied"),
        ("more", "the job says it copied"),
        ("error", "Input/output error"),
        ("unflushed", "without a flush"),
        ("vanished", "the engine says nothing of it"),
    ],
)
def test_a_copy_that_is_not_proven_whole_is_no_backup(
    repo: Repository, engine: FakeEngine, how: str, says: str
) -> None:
    """I1, I6: the new bitmap goes, the base's has kept recording, and the next run goes on from there."""
    disk = engine.disks["vda"]
    first = made(back_up(repo, engine, incremental=False))
    disk.write(0, b"new")
    results = {"fewer": CLUSTER - 1, "more": 2 * CLUSTER}
    if how in results:
        engine.results = {"vda": DiskResult(results[how])}
    if how == "error":
        engine.results = {"vda": DiskResult(CLUSTER, "Input/output error")}
    engine.forgets, engine.flush = how == "vanished", how != "unflushed"
    with pytest.raises(BackupError, match=says):
        back_up(repo, engine)
    assert engine.steps[-1] == "rollback vda"
    assert list(disk.bitmaps) == [first.disks[0].bitmap]
    assert len(repo.backups()) == 1
    engine.results, engine.forgets, engine.flush = {}, False, True
    second = made(back_up(repo, engine))
    assert second.base == first.id
    assert differing(repo, second, "vda", disk.data) == []


def test_one_disk_that_fails_is_left_out_and_goes_on_later(repo: Repository) -> None:
    """I6: the backup has the other disk; the failed one's base still holds everything."""
    engine = _two()
    first = made(back_up(repo, engine, incremental=False))
    for disk in engine.disks.values():
        disk.write(CLUSTER, b"new")
    engine.results = {"vdb": DiskResult(0, "Input/output error")}
    outcome = back_up(repo, engine)
    second = made(outcome)
    assert outcome.failed == {"vdb": "Input/output error"}
    assert [d.name for d in second.disks] == ["vda"]
    assert engine.steps[-2:] == ["rollback vdb", "commit"]
    assert list(engine.disks["vdb"].bitmaps) == [first.disks[1].bitmap]
    engine.results = {}
    third = made(back_up(repo, engine))
    assert {d.name: d.base for d in third.disks} == {"vda": second.id, "vdb": first.id}
    assert all(differing(repo, third, name, disk.data) == [] for name, disk in engine.disks.items())


@pytest.mark.parametrize("where", ["run", "cleanup"])
def test_an_engine_that_fails_makes_no_backup(repo: Repository, engine: FakeEngine, where: str) -> None:
    engine.on = lambda step: _refuse(step, where)
    with pytest.raises(EngineError, match="refused"):
        back_up(repo, engine)
    assert engine.steps == {"run": ["cleanup", "run", "rollback vda"], "cleanup": ["cleanup"]}[where]
    assert repo.backups() == []


@pytest.mark.parametrize(
    "error", [RunStateError("it has moved away"), ImageChangedError("another program wrote to it")]
)
def test_the_engine_looks_again_before_the_commit(
    repo: Repository, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch, error: IncbakError
) -> None:
    """What it sees then is the last word: there is no backup, and the new bitmap is gone."""

    async def confirm() -> None:
        raise error

    monkeypatch.setattr(engine, "confirm", confirm)
    with pytest.raises(type(error)):
        back_up(repo, engine)
    assert repo.backups() == []
    assert all(not disk.bitmaps for disk in engine.disks.values())


@pytest.mark.parametrize("point", ["repo.append", "repo.packs-durable", "repo.index-durable", "repo.locks-checked"])
def test_a_commit_that_fails_gives_up_nothing(repo: Repository, engine: FakeEngine, point: str) -> None:
    """faults rows 28, 31: whatever step of the commit fails, the base's bitmap stays and still holds everything."""
    disk = engine.disks["vda"]
    first = made(back_up(repo, engine, incremental=False))
    disk.write(0, os.urandom(10))
    durable.arm(fault_at=f"{point}:1:ENOSPC")
    with pytest.raises((IncbakError, OSError), match="No space left"):
        back_up(repo, engine)
    durable.arm()
    assert engine.steps[-1] == "rollback vda"
    assert list(disk.bitmaps) == [first.disks[0].bitmap]
    second = made(back_up(repo, engine))
    assert second.base == first.id
    assert differing(repo, second, "vda", disk.data) == []


def test_what_stopped_the_pipeline_is_what_the_user_hears(repo: Repository, engine: FakeEngine) -> None:
    """The engine sees an I/O error only; the cause is the full repository."""

    def job_fails(*_: object) -> DiskResult:
        try:
            return copy(*_)  # type: ignore[arg-type]
        except IncbakError as e:
            raise EngineError("the job ended with an I/O error") from e

    copy, engine._copy = engine._copy, job_fails  # type: ignore[method-assign]
    durable.arm(fault_at="repo.append:1+:ENOSPC")
    with pytest.raises(DurabilityError, match="No space left"):
        back_up(repo, engine)


def test_a_roll_back_that_fails_hides_nothing(repo: Repository, engine: FakeEngine) -> None:
    """The new bitmap stays; nothing stands for it, so the next run removes it."""
    disk = engine.disks["vda"]
    engine.results = {"vda": DiskResult(0, "the cause")}
    engine.on = lambda step: _refuse(step, "rollback")
    with pytest.raises(BackupError, match="the cause"):
        back_up(repo, engine)
    (left,) = disk.bitmaps
    engine.on, engine.results = lambda step: None, {}
    events: list[Event] = []
    made(back_up(repo, engine, events))
    assert Notice(f"removed what an earlier run left: {left}") in events
    assert Fallback("vda", Reason.BASE_MISSING) in events
    assert left not in disk.bitmaps


# -- interrupted -------------------------------------------------------------------------------------------------------


def test_an_interrupt_during_the_copy_takes_the_new_bitmap_with_it(repo: Repository, engine: FakeEngine) -> None:
    first = made(back_up(repo, engine, incremental=False))

    async def interrupted() -> None:
        engine.hold = asyncio.Event()
        engine.copying.clear()
        task = asyncio.create_task(run(repo, engine, Options(incremental=True)))
        async with asyncio.timeout(WAIT):
            await engine.copying.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(interrupted())
    assert engine.steps[-1] == "rollback vda"
    assert list(engine.disks["vda"].bitmaps) == [first.disks[0].bitmap]
    assert len(repo.backups()) == 1
    engine.hold = None
    assert made(back_up(repo, engine)).base == first.id


def test_an_interrupt_during_the_commit_comes_too_late(
    repo: Repository, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backup is made, so its bitmap stays and the run ends as one that was not interrupted."""

    async def interrupted() -> Outcome:
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(run(repo, engine, Options(incremental=False)))

        def strike(name: str) -> None:
            if name == "repo.locks-checked":
                asyncio.run_coroutine_threadsafe(_cancel(task), loop).result(WAIT)

        monkeypatch.setattr(durable, "crash_point", strike)
        return await task

    outcome = asyncio.run(interrupted())
    assert [r.id for r in repo.backups()] == [made(outcome).id]
    assert list(engine.disks["vda"].bitmaps) == [made(outcome).disks[0].bitmap]
    assert engine.steps == ["cleanup", "run", "commit"]


async def _cancel(task: asyncio.Task[Outcome]) -> None:
    task.cancel()
    await asyncio.sleep(0.05)


# -- the lock ----------------------------------------------------------------------------------------------------------


def test_a_second_run_of_the_vm_touches_nothing(repo: Repository, engine: FakeEngine) -> None:
    """faults row 47: what has our prefix may be a living run's."""
    with repo.vm_lock("vm"):
        with pytest.raises(LockedError):
            back_up(repo, engine)
        assert engine.steps == []
    engine.vm = "other"
    with repo.vm_lock("vm"):
        assert made(back_up(repo, engine)).vm == "other"


def test_a_run_that_waits_gets_its_turn(repo: Repository, engine: FakeEngine) -> None:
    async def wait() -> Outcome:
        with repo.vm_lock("vm"):
            task = asyncio.create_task(run(repo, engine, Options(incremental=False, lock_wait=WAIT)))
            await asyncio.sleep(0.3)
            assert engine.steps == []
        return await task

    assert made(asyncio.run(wait())).vm == "vm"


# -- the base ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["page", "cluster"])
def test_a_base_that_turns_out_damaged_is_given_up_and_the_run_begins_again(
    repo: Repository, engine: FakeEngine, part: str
) -> None:
    """faults rows 24, L26: found only while it is read. The disk is read whole, what was damaged is stored anew."""
    disk = engine.disks["vda"]
    first = made(back_up(repo, engine, incremental=False))
    root = bytes.fromhex(first.disks[0].root)
    _spoil(repo, root if part == "page" else repo.tree(first.disks[0]).digests(3, 1)[0].tobytes())
    disk.write(3 * CLUSTER, b"new")
    engine.cut = (0, 100)
    engine.steps.clear()
    events: list[Event] = []
    fresh = Repository.open(repo.storage.root)
    second = made(back_up(fresh, engine, events))
    assert (second.base, second.disks[0].reason, second.disks[0].read) == (None, "base-damaged", SIZE)
    assert any(isinstance(e, Warned) and "cannot be relied on" in e.text for e in events)
    assert Fallback("vda", Reason.BASE_DAMAGED) in events
    assert differing(repo, second, "vda", disk.data) == []
    assert list(disk.bitmaps) == [second.disks[0].bitmap]
    assert first.id in fresh.damage().backups
    engine.cut = None
    disk.write(0, b"more")
    third = made(back_up(Repository.open(repo.storage.root), engine))
    assert third.base == second.id
    assert differing(repo, third, "vda", disk.data) == []


@pytest.mark.parametrize("how", ["lost", "cut", "noted"])
def test_a_base_that_is_known_to_be_damaged_is_none(repo: Repository, engine: FakeEngine, how: str) -> None:
    """faults rows 24, 25, 55: a pack that is gone or short, and a backup that a check has noted."""
    disk = engine.disks["vda"]
    first = made(back_up(repo, engine, incremental=False))
    (pack,) = (repo.storage.root / "packs").iterdir()
    if how == "lost":
        pack.unlink()
    elif how == "cut":
        os.truncate(pack, pack.stat().st_size - 1)
    else:
        repo.storage.write("damaged", "0" * 32, b'{"digests":[],"backups":["%s"]}' % first.id.encode())
    disk.write(0, b"new")
    second = made(back_up(Repository.open(repo.storage.root), engine))
    assert (second.base, second.disks[0].reason) == (None, "base-damaged")
    assert differing(repo, second, "vda", disk.data) == []


@pytest.mark.parametrize("how", ["lost", "cut"])
def test_a_base_whose_pages_are_whole_and_whose_clusters_are_lost_is_none(
    repo: Repository, engine: FakeEngine, how: str
) -> None:
    """I3: an incremental reads none of these clusters, so it would be made, and could not be restored."""
    disk = engine.disks["vda"]
    made(back_up(repo, engine, incremental=False))
    (pack,) = (repo.storage.root / "packs").iterdir()
    disk.write(0, b"new")
    second = made(back_up(repo, engine))
    assert second.base
    if how == "lost":
        pack.unlink()
    else:
        os.truncate(pack, pack.stat().st_size - 1)
    disk.write(CLUSTER, b"new")
    third = made(back_up(Repository.open(repo.storage.root), engine))
    assert (third.base, third.disks[0].reason) == (None, "base-damaged")
    assert differing(repo, third, "vda", disk.data) == []


@pytest.mark.parametrize("bitmap", ["goes", "stays"])
def test_an_older_backup_that_is_damaged_too_is_no_base_either(
    repo: Repository, engine: FakeEngine, bitmap: str
) -> None:
    """I3: its bitmap is still there when the last run was killed right after its commit; without one its tree is what
    clusters are compared with, and those that are equal are not stored.
    """
    disk = engine.disks["vda"]
    made(back_up(repo, engine, incremental=False))
    (pack,) = (repo.storage.root / "packs").iterdir()
    disk.write(0, b"new")
    made(back_up(repo, engine))
    disk.write(0, b"newer")
    engine.on = lambda step: _refuse(step, "commit" if bitmap == "stays" else "never")
    made(back_up(repo, engine))
    engine.on = lambda step: None
    assert len(disk.bitmaps) == {"goes": 1, "stays": 2}[bitmap]
    pack.unlink()
    last = made(back_up(Repository.open(repo.storage.root), engine))
    assert (last.base, last.disks[0].reason) == (None, "base-damaged")
    assert differing(repo, last, "vda", disk.data) == []


def test_a_lost_pack_of_another_disk_does_not_cost_a_whole_read(repo: Repository, engine: FakeEngine) -> None:
    """Only the backups that need it are no base."""
    other = FakeEngine({"vda": Disk(bytearray(os.urandom(SIZE)))}, vm="other")
    made(back_up(repo, other, incremental=False))
    (pack,) = (repo.storage.root / "packs").iterdir()
    first = made(back_up(repo, engine, incremental=False))
    pack.unlink()
    assert made(back_up(Repository.open(repo.storage.root), engine)).base == first.id


def test_a_base_whose_record_cannot_be_read_is_called_damaged(repo: Repository, engine: FakeEngine) -> None:
    """Its bitmap is not taken for that of a backup that is gone; it goes when the next backup is made."""
    disk = engine.disks["vda"]
    made(back_up(repo, engine, incremental=False))
    (record,) = (repo.storage.root / "backups").iterdir()
    record.write_bytes(record.read_bytes()[:-5])
    second = made(back_up(Repository.open(repo.storage.root), engine))
    assert (second.base, second.disks[0].reason) == (None, "base-damaged")
    assert list(disk.bitmaps) == [second.disks[0].bitmap]


def test_a_failed_run_under_another_name_costs_nothing(repo: Repository, engine: FakeEngine) -> None:
    """A bitmap that some backup in the repository stands for is no leftover, whatever the VM is called in it."""
    first = made(back_up(repo, engine, incremental=False))
    engine.results = {"vda": DiskResult(0, "no")}
    with pytest.raises(BackupError):
        back_up(repo, engine, name="other")
    engine.results = {}
    assert made(back_up(repo, engine)).base == first.id


# -- asking ------------------------------------------------------------------------------------------------------------


def test_a_dry_run_changes_nothing(repo: Repository, engine: FakeEngine) -> None:
    made(back_up(repo, engine, incremental=False))
    engine.steps.clear()
    outcome = back_up(repo, engine, dry_run=True)
    assert outcome.record is None
    assert outcome.planned[0].base
    assert engine.steps == []
    assert len(repo.backups()) == 1


def test_a_dry_run_needs_no_lock(repo: Repository, engine: FakeEngine) -> None:
    """Monitoring beside a long backup."""
    made(back_up(repo, engine))
    with repo.vm_lock("vm"):
        outcome = back_up(repo, engine, incremental=True, dry_run=True)
    assert outcome.record is None
    assert [p.name for p in outcome.planned] == list(engine.disks)


def test_a_fallback_can_be_refused(repo: Repository) -> None:
    """For one disk of two; then neither is backed up."""
    engine = _two()
    made(back_up(repo, engine, incremental=False))
    engine.disks["vdb"].bitmaps.clear()
    with pytest.raises(FallbackRefusedError) as refused:
        back_up(repo, engine, fallback=False)
    assert refused.value.reason is Reason.BITMAP_MISSING
    assert "run" not in engine.steps[3:]
    assert len(repo.backups()) == 1


@pytest.mark.parametrize(("vm", "name"), [(None, None), ("vm", "x" * 129), ("x" * 129, None)])
def test_a_vm_needs_a_name_that_a_file_can_have(
    repo: Repository, engine: FakeEngine, vm: str | None, name: str | None
) -> None:
    engine.vm = vm
    with pytest.raises(UsageError, match=r"does not say|longer"):
        back_up(repo, engine, name=name)
    assert engine.steps == []

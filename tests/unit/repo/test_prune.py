"""Pruning: what is listed restores, whatever happens; what nobody needs goes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from incbak import durable
from incbak.errors import DamagedError, LockedError, UsageError
from incbak.events import Event, Warned
from incbak.repo import blob, pack, pins
from incbak.repo.check import check, rebuild_index
from incbak.repo.condemned import condemn, read_condemned
from incbak.repo.index import Index
from incbak.repo.prune import Options, Outcome, dry_run, prune
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.unit.repo.scene import CLUSTER, cluster, new, record_of, restore, store, writing

NOW = 4_000_000_000.0
GRACE = 100.0
LAST = Policy(last=1)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A repository."""
    new(tmp_path / "repo")
    return tmp_path / "repo"


def made(path: Path, content: Sequence[int], **more: Any) -> Record:
    """One more backup, by a process of its own, as it were."""
    repo = Repository.open(path)
    with writing(repo) as writer:
        update = repo.update(writer, None, len(content) * CLUSTER)
        digests = b"".join(store(writer, cluster(n)) for n in content)
        update.set(np.arange(len(content)), np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
        record = record_of(repo, {"vda": (len(content) * CLUSTER, update.finish())}, **more)
        writer.commit(record)
    return record


def pruned(
    path: Path, policy: Policy = LAST, *, at: float = NOW, events: list[Event] | None = None, **more: Any
) -> Outcome:
    """A prune at the time ``at``, with a grace of `GRACE` unless it is said otherwise."""
    options = Options(**{"grace": GRACE, "clock": lambda: at, **more})
    return prune(Repository.open(path), policy, None, options, events.append if events is not None else lambda e: None)


def settled(done: Outcome) -> Outcome:
    """Of a prune that could do all that it wanted."""
    assert done.trouble is None
    return done


def files(path: Path) -> dict[str, bytes]:
    """All that is in a repository but the locks."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file() and "locks" not in p.parts}


def count(path: Path, kind: str) -> int:
    return len(Repository.open(path).storage.list(kind))


def right(path: Path, *wanted: tuple[Record, Sequence[int]]) -> None:
    """Exactly these backups are listed, hold this, and the repository is sound."""
    repo = Repository.open(path)
    assert [r.id for r in repo.backups()] == [r.id for r, _ in wanted]
    for record, content in wanted:
        assert restore(repo, record) == [cluster(n) for n in content]
    assert check(Repository.open(path), read_data=True).problems == []


# -- what goes ----------------------------------------------------------------------------------------------------


def test_content_goes_when_its_grace_is_over(path: Path) -> None:
    """Until then who reads a backup that was removed can go on; afterwards it fails, loudly."""
    old, kept = made(path, [1, 2, 3]), made(path, [3, 4, 5])
    reading = Repository.open(path)
    done = settled(pruned(path, repack_below=0.0))
    assert [(d.record.id, d.keep) for d in done.decisions] == [(old.id, False), (kept.id, True)]
    assert (done.freed, done.condemned) == (0, 0), "the old pack holds a cluster of the kept backup"
    done = settled(pruned(path, repack_below=1.0))
    assert (done.repacked, done.freed) == (1, 0)
    assert done.condemned == done.waiting > 0
    for at in (NOW, NOW + GRACE - 1):
        assert settled(pruned(path, at=at)).freed == 0
        assert restore(Repository.open(path), old) == [cluster(n) for n in (1, 2, 3)]
        right(path, (kept, [3, 4, 5]))
    assert settled(pruned(path, at=NOW + GRACE)).freed > 0
    assert count(path, "condemned") == 0
    right(path, (kept, [3, 4, 5]))
    assert restore(reading, kept) == [cluster(n) for n in (3, 4, 5)]
    with pytest.raises(DamagedError):
        restore(reading, old)


def test_all_that_only_removed_backups_had_is_gone(path: Path) -> None:
    """What remains is what a new repository with the kept backup would have."""
    for turn in range(4):
        made(path, [10 * turn + 1, 10 * turn + 2, 10 * turn + 3])
    kept = made(path, [91, 92, 93])
    fresh = path.parent / "fresh"
    new(fresh)
    made(fresh, [91, 92, 93])
    settled(pruned(path, grace=0))
    right(path, (kept, [91, 92, 93]))
    for kind in ("packs", "index", "backups"):
        sizes = [sorted(Repository.open(p).storage.list(kind).values()) for p in (path, fresh)]
        assert kind == "backups" or sizes[0] == sizes[1]


def test_each_vm_has_its_own(path: Path) -> None:
    one, two = made(path, [1], vm="one"), made(path, [2], vm="two")
    last = made(path, [3], vm="one")
    options = Options(grace=0.0)
    assert [d.keep for d in prune(Repository.open(path), LAST, "two", options).decisions] == [True]
    assert count(path, "backups") == 3
    settled(prune(Repository.open(path), LAST, None, options))
    right(path, (two, [2]), (last, [3]))
    with pytest.raises(UsageError, match="no backup of three"):
        prune(Repository.open(path), LAST, "three")
    with pytest.raises(UsageError, match="no rule"):
        pruned(path, Policy())
    assert one.id not in Repository.open(path).storage.list("backups")


def test_a_dry_run_changes_nothing(path: Path) -> None:
    for n in range(3):
        made(path, [n + 1])
    before = files(path)
    assert [d.keep for d in dry_run(Repository.open(path), LAST, None).decisions] == [False, False, True]
    assert files(path) == before


def test_what_a_killed_run_left_goes_too(path: Path) -> None:
    """Packs that no index names, and packs of a backup that has no record."""
    kept = made(path, [1])
    repo = Repository.open(path)
    for indexed in (True, False):
        with writing(repo) as writer:
            store(writer, cluster(70 + indexed))
            writer.finish()
    repo.storage.remove("index", _naming(repo, 70))
    assert count(path, "packs") == 3
    settled(pruned(path, grace=0))
    assert count(path, "packs") == 1
    right(path, (kept, [1]))


def _naming(repo: Repository, number: int) -> str:
    """The index file that has that cluster."""
    wanted = np.frombuffer(blob.digest_of(cluster(number)), dtype=np.uint8).reshape(1, 32)
    index = Index(repo.storage)
    return next(
        f.name for f in index.files if f.find(wanted, wanted[:, :8].copy().view(">u8").ravel().astype("u8")) >= 0
    )


def test_a_stray_pack_with_a_copy_of_what_is_damaged_stays(path: Path) -> None:
    """It may be the only whole one."""
    kept = made(path, [1])
    repo = Repository.open(path)
    repo.storage.write(
        "damaged", "0" * 32, b'{"digests":["%s"],"backups":[]}' % blob.digest_of(cluster(1)).hex().encode()
    )
    repo = Repository.open(path)
    with writing(repo) as writer:
        store(writer, cluster(1))
        writer.finish()
    new_index = sorted(repo.storage.list("index"), key=lambda n: (path / "index" / n).stat().st_mtime_ns)[-1]
    repo.storage.remove("index", new_index)
    settled(pruned(path, grace=0))
    assert count(path, "packs") == 2
    assert [r.id for r in Repository.open(path).backups()] == [kept.id]


def test_a_pack_that_is_lost_and_not_needed_is_not_missed_any_more(path: Path) -> None:
    made(path, [1, 2])
    (lost,) = Repository.open(path).storage.list("packs")
    kept = made(path, [7])
    settled(pruned(path))
    (path / "packs" / lost).unlink()
    settled(pruned(path, grace=0))
    right(path, (kept, [7]))


# -- what stays ---------------------------------------------------------------------------------------------------


def test_nothing_is_built_on_what_is_condemned(path: Path) -> None:
    """A backup that needs the same content again stores it again."""
    made(path, [1, 2])
    kept = made(path, [5])
    settled(pruned(path))
    assert read_condemned(Repository.open(path).storage).packs
    again = made(path, [1, 2])
    settled(pruned(path, Policy(last=9), at=NOW + GRACE))
    assert read_condemned(Repository.open(path).storage).packs == frozenset()
    right(path, (kept, [5]), (again, [1, 2]))


def test_beside_a_backup_nothing_is_condemned(path: Path) -> None:
    """It may have found content there already. Backups are removed, and the next prune does the rest."""
    old = made(path, [1, 2])
    kept = made(path, [5])
    repo = Repository.open(path)
    with writing(repo) as writer:
        update = repo.update(writer, None, 2 * CLUSTER)
        digests = b"".join(store(writer, cluster(n)) for n in (1, 2))
        assert writer.blobs == 0, "it is built on what is there"
        done = pruned(path, grace=0)
        assert isinstance(done.trouble, LockedError)
        assert old.id not in repo.storage.list("backups")
        update.set(np.arange(2), np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
        record = record_of(repo, {"vda": (2 * CLUSTER, update.finish())})
        writer.commit(record)
    settled(pruned(path, Policy(last=2), grace=0))
    right(path, (kept, [5]), (record, [1, 2]))


def test_a_backup_waits_for_the_moment_in_which_packs_are_condemned(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And does not fail because of it."""
    repo = Repository.open(path)
    held = repo.storage.lock("content.lock", exclusive=True, wait=0)
    held.__enter__()
    slept: list[float] = []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        if len(slept) == 3:
            held.__exit__(None, None, None)

    monkeypatch.setattr("time.sleep", sleep)
    record = made(path, [1])
    assert len(slept) == 3
    monkeypatch.undo()
    right(path, (record, [1]))


@pytest.mark.parametrize("point", ["prune.counted", "prune.records-removed", "prune.repacked"])
def test_a_backup_that_is_made_meanwhile_keeps_what_it_uses(
    path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """faults row 49: content of the backups that go, used again by one that begins after the counting."""
    made(path, [1, 2, 3, 4, 5])
    kept = made(path, [5, 6])
    came: list[Record] = []

    def hook(name: str) -> None:
        if name == point and not came:
            monkeypatch.undo()
            came.append(made(path, [1, 2, 7]))

    monkeypatch.setattr(durable, "crash_point", hook)
    settled(pruned(path, grace=0, repack_below=1.0))
    assert len(came) == 1
    right(path, (kept, [5, 6]), (came[0], [1, 2, 7]))
    settled(pruned(path, Policy(last=2), grace=0, repack_below=1.0))
    right(path, (kept, [5, 6]), (came[0], [1, 2, 7]))


def test_a_lock_file_that_goes_stops_the_backup(path: Path) -> None:
    """Else a prune could condemn what it uses."""
    repo = Repository.open(path)
    with writing(repo) as writer:
        (path / "locks" / "content.lock").unlink()
        with pytest.raises(LockedError, match=r"content\.lock was removed"):
            writer.commit(record_of(repo, {"vda": (0, bytes(32))}))


def test_pinned_backups_stay(path: Path) -> None:
    pinned = made(path, [1])
    made(path, [2])
    kept = made(path, [3])
    assert pins.pin(Repository.open(path).storage, pinned.id)
    assert not pins.pin(Repository.open(path).storage, pinned.id)
    done = settled(pruned(path, grace=0))
    assert [d.reasons for d in done.decisions] == [("pinned",), (), ("last", "last good")]
    right(path, (pinned, [1]), (kept, [3]))
    assert pins.unpin(Repository.open(path).storage, pinned.id)
    assert not pins.unpin(Repository.open(path).storage, pinned.id)
    settled(pruned(path, grace=0))
    right(path, (kept, [3]))
    with pytest.raises(UsageError, match="is gone"):
        pins.pin(Repository.open(path).storage, pinned.id)


def test_a_backup_that_is_pinned_at_the_last_moment_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned, kept = made(path, [1]), made(path, [3])

    def hook(name: str) -> None:
        if name == "prune.counted":
            pins.pin(Repository.open(path).storage, pinned.id)

    monkeypatch.setattr(durable, "crash_point", hook)
    done = settled(pruned(path, grace=0))
    assert [d.reasons for d in done.decisions] == [("pinned",), ("last", "last good")]
    right(path, (pinned, [1]), (kept, [3]))


def test_a_pin_and_a_prune_do_not_cross(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is told that a backup is pinned can rely on it: a prune holds the lock while it removes records."""
    monkeypatch.setattr(pins, "_WAIT", 0.0)
    old, kept = made(path, [1]), made(path, [2])
    storage = Repository.open(path).storage
    with storage.lock("pins.lock", exclusive=True, wait=0):
        with pytest.raises(LockedError):
            pins.pin(storage, old.id)
        with pytest.raises(LockedError):
            pruned(path, grace=0)
    right(path, (old, [1]), (kept, [2]))


@pytest.mark.parametrize("noted", [True, False])
def test_the_last_good_backup_stays(path: Path, noted: bool) -> None:
    """A newer one that is damaged does not count: noted by a check, or its clusters are in no pack."""
    good = made(path, [1, 2])
    before = set(Repository.open(path).storage.list("packs"))
    bad = made(path, [3, 4])
    if noted:
        Repository.open(path).storage.write("damaged", "0" * 32, b'{"digests":[],"backups":["%s"]}' % bad.id.encode())
    else:
        (fresh,) = set(Repository.open(path).storage.list("packs")) - before
        (path / "packs" / fresh).unlink()
    decisions = dry_run(Repository.open(path), LAST, None).decisions
    assert [d.reasons for d in decisions] == [("last good",), ("last",)]
    done = dry_run(Repository.open(path), Policy(tags=("none",)), None)
    assert [d.keep for d in done.decisions] == [True, False]
    if not noted:
        with pytest.raises(DamagedError, match="nothing was removed"):
            pruned(path, grace=0)
        settled(pruned(path, Policy(tags=("none",)), grace=0))
        right(path, (good, [1, 2]))


def test_the_last_backup_with_all_disks_stays(path: Path) -> None:
    whole = made(path, [1])
    partial = made(path, [2], notes=("disk vdb failed: Input/output error",))
    done = settled(pruned(path, grace=0))
    assert [d.reasons for d in done.decisions] == [("last good",), ("last", "last good")]
    right(path, (whole, [1]), (partial, [2]))


def test_without_a_good_backup_nothing_goes(path: Path) -> None:
    for n in (1, 2):
        made(path, [n])
    for name in Repository.open(path).storage.list("packs"):
        (path / "packs" / name).unlink()
    before = files(path)
    with pytest.raises(DamagedError, match="nothing was removed"):
        pruned(path, Policy(tags=("none",)), grace=0)
    assert files(path) == before


# -- damage: nothing is removed ---------------------------------------------------------------------------------------


def _flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def _index_files(path: Path) -> list[Path]:
    return list((path / "index").iterdir())


def _age(path: Path) -> int:
    return path.stat().st_mtime_ns


def _newest_index(path: Path) -> Path:
    return max(_index_files(path), key=_age)


def _pack_of(path: Path, record: Record) -> Path:
    return path / "packs" / next(Repository.open(path).index.places(bytes.fromhex(record.disks[0].root))).pack


def _spoil_page(path: Path, record: Record) -> None:
    place = next(Repository.open(path).index.places(bytes.fromhex(record.disks[0].root)))
    _flip(path / "packs" / place.pack, place.offset + place.stored // 2)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path, Record], None]] = {
    "a record": lambda path, r: _flip(path / "backups" / r.id, 80),
    "a page": _spoil_page,
    "an index file": lambda path, r: _flip(_newest_index(path), 200),
    "an index file is gone": lambda path, r: _newest_index(path).unlink(),
    "an index file of what goes": lambda path, r: _flip(min(_index_files(path), key=_age), 200),
    "a pack is gone": lambda path, r: _pack_of(path, r).unlink(),
    "a pack is cut": lambda path, r: _cut(_pack_of(path, r)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_where_anything_is_damaged_nothing_is_removed(path: Path, what: str) -> None:
    """faults row 24, L19: it cannot be known what the backups that stay need."""
    made(path, [1, 2])
    made(path, [3, 4])
    kept = made(path, [5, 6])
    DAMAGE[what](path, kept)
    before = files(path)
    with pytest.raises(DamagedError) as refused:
        pruned(path, Policy(last=1), grace=0, repack_below=1.0)
    assert "nothing was removed" in str(refused.value)
    assert refused.value.hint
    assert files(path) == before


def test_where_clusters_of_a_kept_backup_are_lost_nothing_is_removed(path: Path) -> None:
    """All its pages can be read, but they name what is in no pack. The index can be made anew, perhaps."""
    lost = _pack_of(path, made(path, [1, 2]))
    made(path, [3])
    made(path, [1, 2, 9])
    lost.unlink()
    before = files(path)
    for policy in (LAST, Policy(last=2)):
        with pytest.raises(DamagedError, match="2 of its clusters are in no pack"):
            pruned(path, policy, grace=0)
    assert files(path) == before


def test_where_a_listed_backup_needs_what_is_condemned_nothing_is_removed(path: Path) -> None:
    """It cannot be. But if it is, something has gone wrong that must not become a loss."""
    made(path, [1, 2])
    kept = made(path, [3, 4])
    storage = Repository.open(path).storage
    condemn(storage, [_pack_of(path, kept).name], 0.0)
    before = files(path)
    for policy in (LAST, Policy(last=2)):
        with pytest.raises(DamagedError, match="nothing was removed"):
            pruned(path, policy, grace=0)
    assert files(path) == before


def test_an_older_kept_backup_that_is_damaged_stops_it_too(path: Path) -> None:
    kept = made(path, [1, 2])
    made(path, [3, 4])
    made(path, [5, 6])
    _spoil_page(path, kept)
    pins.pin(Repository.open(path).storage, kept.id)
    before = files(path)
    with pytest.raises(DamagedError, match="nothing was removed"):
        pruned(path, grace=0)
    assert files(path) == before


def test_the_whole_copy_of_what_is_rotten_stays(path: Path) -> None:
    """Stored again after a check: the first copy is rotten, and an index that was made anew has both in one file."""
    first = made(path, [1, 2])
    place = next(Repository.open(path).index.places(blob.digest_of(cluster(1))))
    _flip(path / "packs" / place.pack, place.offset + place.stored // 2)
    assert check(Repository.open(path), read_data=True).problems
    second = made(path, [1, 3])
    rebuild_index(Repository.open(path))
    assert count(path, "index") == 1
    for below in (0.0, 1.0):
        settled(pruned(path, Policy(last=2), grace=0, repack_below=below))
        repo = Repository.open(path)
        assert restore(repo, first) == [cluster(n) for n in (1, 2)]
        assert restore(repo, second) == [cluster(n) for n in (1, 3)]


def test_a_pack_that_has_nothing_but_spare_copies_stays(tmp_path: Path) -> None:
    """Whichever of the two the index names first, which is a matter of chance: the first copy is the rotten one."""
    for turn in range(6):
        path = tmp_path / f"turn{turn}"
        new(path)
        made(path, [1, 2])
        place = next(Repository.open(path).index.places(blob.digest_of(cluster(1))))
        _flip(path / "packs" / place.pack, place.offset + place.stored // 2)
        assert check(Repository.open(path), read_data=True).problems
        kept = made(path, [1, 2])
        rebuild_index(Repository.open(path))
        settled(pruned(path, grace=0, repack_below=0.0))
        assert restore(Repository.open(path), kept) == [cluster(1), cluster(2)]


# -- repacking ---------------------------------------------------------------------------------------------------------


def test_mostly_garbage_is_repacked_and_readers_find_it(path: Path) -> None:
    """Also who had read the index before; and it is copied as it was stored."""
    made(path, list(range(1, 9)))
    kept = made(path, [8, 9])
    reading = Repository.open(path)
    assert restore(reading, kept)
    reading.storage.close()
    before = sum(Repository.open(path).storage.list("packs").values())
    done = settled(pruned(path, grace=0))
    assert done.repacked == 1
    assert sum(Repository.open(path).storage.list("packs").values()) < before / 2
    assert restore(reading, kept) == [cluster(8), cluster(9)]
    right(path, (kept, [8, 9]))
    assert settled(pruned(path, grace=0)).repacked == 0


def test_a_pack_of_which_something_needed_is_rotten_stays(path: Path) -> None:
    """It says so; the rest of it can still be read."""
    made(path, list(range(1, 9)))
    kept = made(path, [7, 8])
    place = next(Repository.open(path).index.places(blob.digest_of(cluster(8))))
    _flip(path / "packs" / place.pack, place.offset + place.stored // 2)
    events: list[Event] = []
    done = pruned(path, grace=0, events=events)
    assert isinstance(done.trouble, DamagedError)
    assert [e for e in events if isinstance(e, Warned) and place.pack in e.text]
    assert (path / "packs" / place.pack).exists()
    assert (done.freed, count(path, "condemned")) == (0, 0)
    digests = Repository.open(path).tree(kept.disks[0]).digests(0, 2)
    assert Repository.open(path).reader().read(digests[0].tobytes()) == cluster(7)


@pytest.mark.parametrize("anew", [True, False])
def test_what_was_copied_by_a_prune_that_was_killed_is_not_copied_again(path: Path, anew: bool) -> None:
    """Nor does it stay twice, whichever copy the index names first."""
    made(path, list(range(1, 9)))
    kept = made(path, [8, 9])
    durable.arm(fault_at="prune.repacked:1:EIO")
    with pytest.raises(OSError):
        pruned(path, grace=0)
    durable.arm()
    assert count(path, "packs") == 3
    if anew:
        rebuild_index(Repository.open(path))
    for _ in range(2):
        settled(pruned(path, grace=0))
    assert count(path, "packs") == 2
    right(path, (kept, [8, 9]))


def test_a_copy_that_is_rotten_is_made_again(path: Path) -> None:
    """What lies in another pack too is read there before the first copy goes."""
    made(path, list(range(1, 9)))
    kept = made(path, [8, 9])
    old = set(Repository.open(path).storage.list("packs"))
    durable.arm(fault_at="prune.repacked:1:EIO")
    with pytest.raises(OSError):
        pruned(path, grace=0)
    durable.arm()
    (copied,) = set(Repository.open(path).storage.list("packs")) - old
    place = next(p for p in Repository.open(path).index.places(blob.digest_of(cluster(8))) if p.pack == copied)
    _flip(path / "packs" / copied, place.offset + place.stored // 2)
    settled(pruned(path, grace=0))
    assert restore(Repository.open(path), kept) == [cluster(8), cluster(9)]


# -- beside others -----------------------------------------------------------------------------------------------------


def test_beside_another_prune_and_a_rebuild_of_the_index_it_is_refused(path: Path) -> None:
    made(path, [1])
    storage = Repository.open(path).storage
    for lock, exclusive in (("prune.lock", False), ("repository.lock", True)):
        with storage.lock(lock, exclusive=exclusive, wait=0), pytest.raises(LockedError):
            pruned(path)
    with storage.lock("repository.lock", exclusive=False, wait=0):
        settled(pruned(path))


def test_a_rebuild_of_the_index_brings_back_nothing_that_is_condemned(path: Path) -> None:
    made(path, [1, 2])
    kept = made(path, [5])
    settled(pruned(path))
    rebuild_index(Repository.open(path))
    again = made(path, [1, 2])
    settled(pruned(path, Policy(last=9), at=NOW + GRACE))
    right(path, (kept, [5]), (again, [1, 2]))


@pytest.mark.parametrize("point", ["prune.packs-removed", "prune.index-written", "prune.index-done", "prune.expired"])
def test_a_check_sees_no_loss_where_a_prune_is_under_way(
    path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Nor does the index look incomplete to a backup, which would then read all trees."""
    made(path, [1, 2])
    kept = made(path, [5])
    looked: list[int] = []

    def hook(name: str) -> None:
        if name == point:
            looked.append(len(check(Repository.open(path), read_data=True).problems))
            looked.append(not Index(Repository.open(path).storage).complete)

    monkeypatch.setattr(durable, "crash_point", hook)
    settled(pruned(path, grace=0))
    assert looked == [0, 0]
    right(path, (kept, [5]))


def test_an_index_read_while_a_prune_goes_by_is_complete(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packs are looked at when they are gone, the condemnation when it is gone, too."""
    made(path, [1, 2])
    kept = made(path, [5])
    storage = Repository.open(path).storage
    real, listed = storage.list, []

    def overtaken(kind: str) -> dict[str, int]:
        listed.append(kind)
        if listed.count("packs") == 1 and kind == "packs":
            settled(pruned(path, grace=0))
        return real(kind)

    monkeypatch.setattr(storage, "list", overtaken)
    assert Index(storage).complete
    assert listed.count("packs") == 2
    right(path, (kept, [5]))


def test_what_goes_is_gone_before_what_tells_of_it(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults rows 17 to 19: the folder is synced behind each step: records, packs, index, condemnation."""
    made(path, [1, 2])
    made(path, [3, 4])
    steps: list[str] = []
    for name in ("fsync", "unlink"):
        real = getattr(os, name)

        def spy(what: Any, _name: str = name, _real: Any = real) -> None:
            where = Path(os.readlink(f"/proc/self/fd/{what}") if _name == "fsync" else what)
            if _name == "unlink" and not where.name.startswith("."):
                steps.append(f"remove {where.parent.name}")
            elif _name == "fsync" and where.is_dir():
                steps.append(f"sync {where.name}")
            _real(what)

        monkeypatch.setattr(os, name, spy)
    settled(pruned(path, grace=0))
    assert steps == [
        *("remove backups", "sync backups"),
        "sync condemned",
        *("remove packs", "sync packs", "remove index", "sync index", "remove condemned", "sync condemned"),
        "sync needs",
    ]


def test_a_check_that_is_overtaken_by_a_prune_sees_no_loss(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Backups and packs that it had listed are gone when it looks at them."""
    for n in (1, 4, 7):
        made(path, [n, n + 1, n + 2])
    kept = made(path, [5, 50])
    real = pack.read_table
    looked: list[str] = []

    def overtaken(storage: Any, name: str, size: int) -> Any:
        looked.append(name)
        if len(looked) == 2:
            settled(pruned(path, grace=0, repack_below=1.0))
        return real(storage, name, size)

    monkeypatch.setattr(pack, "read_table", overtaken)
    found = check(Repository.open(path), read_data=True)
    assert (found.problems, found.damaged) == ([], set())
    assert count(path, "damaged") == 0
    right(path, (kept, [5, 50]))


def test_index_files_are_not_merged_while_a_prune_replaces_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incbak.repo.merge.FILES", 1)
    for n in (1, 2, 3):
        made(path, [n])
    before = count(path, "index")
    with Repository.open(path).storage.lock("index.lock", exclusive=True, wait=0):
        made(path, [4])
        assert count(path, "index") == before + 1
    made(path, [5])
    assert count(path, "index") == 2


# -- condemnations that cannot be read, and repositories without any --------------------------------------------------


def test_a_condemnation_that_cannot_be_read_makes_backups_rely_on_nothing(path: Path) -> None:
    """It may say that what they would build on is about to go. The next prune judges anew."""
    made(path, [1, 2])
    kept = made(path, [5])
    settled(pruned(path))
    (name,) = (path / "condemned").iterdir()
    _flip(name, 70)
    assert any(name.name in p.what for p in check(Repository.open(path), read_data=True).problems)
    repo = Repository.open(path)
    assert not repo.is_whole(kept, set())
    with writing(repo) as writer:
        assert not writer.trusts_bases
        store(writer, cluster(5))
        assert writer.blobs == 1
    events: list[Event] = []
    settled(pruned(path, events=events, at=NOW + GRACE))
    assert [e for e in events if isinstance(e, Warned) and name.name in e.text]
    assert not name.exists()
    right(path, (kept, [5]))


@pytest.mark.parametrize("body", [b"{}", b'{"version":1,"at":0,"packs":["../x"]}', b"[" * 5000])
def test_a_condemnation_says_nothing_impossible(path: Path, body: bytes) -> None:
    from blake3 import blake3

    storage = Repository.open(path).storage
    storage.write("condemned", "a" * 32, blake3(body).hexdigest().encode() + b"\n" + body)
    assert list(read_condemned(storage).unknown) == ["a" * 32]


def test_a_repository_from_before_there_were_pins_and_prunes(path: Path) -> None:
    first, kept = made(path, [1]), made(path, [2])
    for kind in ("pins", "condemned"):
        (path / kind).rmdir()
    assert pins.read_pins(Repository.open(path).storage) == frozenset()
    made(path, [3], vm="other")
    pins.pin(Repository.open(path).storage, first.id)
    settled(pruned(path))
    pins.unpin(Repository.open(path).storage, first.id)
    settled(pruned(path, grace=0))
    assert [r.id for r in Repository.open(path).backups("vm")] == [kept.id]


def test_a_clock_that_was_wrong_does_not_keep_garbage_for_ever(path: Path) -> None:
    made(path, [1])
    kept = made(path, [2])
    settled(pruned(path, at=NOW + 1e9))
    assert settled(pruned(path)).freed > 0
    right(path, (kept, [2]))


def test_a_record_with_a_forged_time_costs_no_newer_backup(path: Path) -> None:
    made(path, [1], started="2020-01-01T00:00:00Z")
    made(path, [2], started="2199-01-01T00:00:00Z")
    kept = [made(path, [n], started=f"2026-01-{n:02}T00:00:00Z") for n in range(3, 9)]
    decisions = settled(pruned(path, Policy(daily=6, within=6 * 86400.0))).decisions
    assert {d.record.id for d in decisions if d.keep} >= {r.id for r in kept}


def test_tags_are_in_records_and_older_records_have_none() -> None:
    fields = json.loads(msgspec.json.encode(Record(
        id="0" * 32, seq=1, vm="vm", kind="full", base=None, started="", finished="", cluster_size=4096, disks=(),
        engine="", tags=("a", "b"),
    )))  # fmt: skip
    assert fields["tags"] == ["a", "b"]
    del fields["tags"]
    assert msgspec.convert(fields, Record).tags == ()


def test_damage_that_a_backup_which_stays_needs_is_told(path: Path) -> None:
    """Of a pack from which the needed part should be copied: nothing is lost by it, and the outcome says so."""
    kept = made(path, [1, 3])
    made(path, [1, 3], vm="other")
    for damage in (False, True):
        digest = blob.digest_of(cluster(1))
        (place,) = Repository.open(path).index.places(digest)
        victim = path / "packs" / place.pack
        if damage:
            data = bytearray(victim.read_bytes())
            data[place.offset + 5] ^= 1
            victim.write_bytes(data)
            assert check(Repository.open(path), read_data=True).damaged == {digest}
        events: list[Event] = []
        done = pruned(path, events=events)
        assert isinstance(done.trouble, DamagedError) == damage
        assert [place.pack in e.text and "stays" in e.text for e in events if isinstance(e, Warned)] == [True] * damage
    assert victim.exists()
    assert kept.id in {r.id for r in Repository.open(path).backups()}


def test_where_the_index_is_lost_the_hint_brings_it_back(path: Path) -> None:
    record = made(path, [1, 2])
    made(path, [3])
    for file in (path / "index").iterdir():
        file.unlink()
    with pytest.raises(DamagedError) as refused:
        pruned(path, grace=0.0)
    assert "check --rebuild-index" in refused.value.hint
    rebuild_index(Repository.open(path))
    settled(pruned(path, Policy(last=9), grace=0.0))
    assert restore(Repository.open(path), record) == [cluster(1), cluster(2)]

"""Copies between repositories of every kind; what they read, and what they do when something is wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from incbak import durable
from incbak.errors import BackupError, DamagedError, DurabilityError, LockedError, SyncError, UsageError
from incbak.repo.check import check
from incbak.repo.memory import Memory
from incbak.repo.prune import Options as PruneOptions
from incbak.repo.prune import prune
from incbak.repo.reader import BlobReader
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from incbak.sync import carry as carry_module
from incbak.sync.copy import Options, plan, sync
from tests.unit.repo.scene import CLUSTER, PASSPHRASE, back_up, cluster, new, record_of, restore, store, writing

KINDS = [(False, False), (False, True), (True, False), (True, True)]


def pair(path: Path, source: bool = False, target: bool = False) -> tuple[Repository, Repository]:
    """Two empty ones, encrypted or not."""
    return new(path / "source", encrypted=source), new(path / "target", encrypted=target)


def again(repo: Repository) -> Repository:
    """Opened anew."""
    return Repository.open(repo.storage.root, lambda: PASSPHRASE)


def copied(source: Repository, target: Repository, **options: object) -> list[str]:
    """The ids that a sync copies; none may fail."""
    done = sync(again(source), again(target), Options(**options))  # type: ignore[arg-type]
    assert not done.failed
    return [r.id for r in done.copied]


def same(source: Repository, target: Repository, ident: str) -> bool:
    """Whether a backup restores to the same from both."""
    one, two = again(source), again(target)
    return restore(one, one.record(ident)) == restore(two, two.record(ident))


@pytest.mark.parametrize(("encrypted", "target_encrypted"), KINDS)
def test_every_backup_restores_from_the_copy(tmp_path: Path, encrypted: bool, target_encrypted: bool) -> None:
    source, target = pair(tmp_path, encrypted, target_encrypted)
    contents = [[1, 2, 3, 0, 5], [1, 2, 9, 0, 5], [0, 0, 9, 7, 5]]
    first = back_up(source, contents[0])
    assert copied(source, target) == [first.id]
    rest = [back_up(source, content) for content in contents[1:]]
    assert copied(source, target) == [r.id for r in rest]
    assert copied(source, target) == []
    target = again(target)
    for record, content in zip((first, *rest), contents, strict=True):
        assert restore(target, target.record(record.id)) == [cluster(n) for n in content]
    assert [r.id for r in target.backups()] == [first.id, *(r.id for r in rest)]
    assert not check(target, read_data=True).problems


def test_a_copy_says_what_it_is(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    back_up(source, [1])
    with writing(source) as writer:
        update = source.update(writer, None, CLUSTER)
        update.set(np.arange(1), np.frombuffer(store(writer, cluster(2)), dtype=np.uint8).reshape(1, 32))
        plain = record_of(source, {"vda": (CLUSTER, update.finish())})
        disks = tuple(msgspec.structs.replace(disk, bitmap="incbak-source-2") for disk in plain.disks)
        record = msgspec.structs.replace(plain, disks=disks)
        writer.commit(record)
    back_up(target, [7])
    copied(source, target, last=1)
    found = again(target).record(record.id)
    assert found.origin
    assert (found.origin.repository, found.origin.seq, found.seq) == (source.id, 2, 2)
    assert found.disks[0].bitmap is None
    assert found.disks[0].stored > 0


def spied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many blobs each read for the copy asked for."""
    asked = list[int]()
    for name in ("read_many", "stored_many"):
        original = getattr(BlobReader, name)

        def spy(self: BlobReader, digests: np.ndarray, original: Callable[..., object] = original) -> object:
            asked.append(len(digests))
            return original(self, digests)

        monkeypatch.setattr(BlobReader, name, spy)
    return asked


@pytest.mark.parametrize(("encrypted", "target_encrypted"), KINDS)
def test_only_what_changed_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encrypted: bool, target_encrypted: bool
) -> None:
    source, target = pair(tmp_path, encrypted, target_encrypted)
    content = list(range(1, 400))
    back_up(source, content)
    copied(source, target)
    content[7], content[300], content[301] = 1001, 1002, 1003
    record = back_up(source, content)
    asked = spied(monkeypatch)
    copied(source, target)
    assert sum(asked) == 3
    assert same(source, target, record.id)


def test_what_the_target_has_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever backup it is; and what stands in a backup twice is read once."""
    source, target = pair(tmp_path)
    back_up(target, [1, 2, 3])
    back_up(source, [1, 2, 3, 4, 4, 4])
    asked = spied(monkeypatch)
    copied(source, target)
    assert sum(asked) == 1


def test_a_disk_that_grew_is_copied_whole(tmp_path: Path) -> None:
    """Its tree may have one more level."""
    source, target = pair(tmp_path, target=True)
    back_up(source, [1, 2] * 510)
    record = back_up(source, [1, 2] * 510 + [3, 4, 5] * 3)
    assert len(copied(source, target)) == 2
    assert same(source, target, record.id)


def test_a_short_last_cluster(tmp_path: Path) -> None:
    for encrypted in (False, True):
        source, target = pair(tmp_path / str(encrypted), target=encrypted)
        with writing(source) as writer:
            update = source.update(writer, None, CLUSTER + 700)
            digests = [store(writer, cluster(1)), store(writer, cluster(3)[:700])]
            update.set(np.arange(2), np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32))
            made = record_of(source, {"vda": (CLUSTER + 700, update.finish())})
            writer.commit(made)
        assert copied(source, target) == [made.id]
        target = again(target)
        disk = target.record(made.id).disks[0]
        (last,) = target.tree(disk).digests(1, 1)
        assert target.reader().read(last.tobytes()) == cluster(3)[:700]


def test_pruned_from_the_target_or_from_the_source(tmp_path: Path) -> None:
    source, target = pair(tmp_path, target=True)
    made = [back_up(source, [n, 2, 3]) for n in range(1, 5)]
    copied(source, target)
    target = again(target)
    prune(target, Policy(last=1), None, PruneOptions(grace=0))
    source = again(source)
    prune(source, Policy(last=2), None, PruneOptions(grace=0))
    made.append(back_up(source, [9, 2, 3]))
    assert copied(source, target) == [made[-1].id]
    assert [r.id for r in again(target).backups()] == [made[-2].id, made[-1].id]
    assert same(source, target, made[-1].id)


# -- what is wrong ----------------------------------------------------------------------------------------------------


def spoil(repo: Repository, number: int) -> None:
    """One cluster's blob is not what it was."""
    repo = again(repo)
    place = next(repo.index.places(repo.seal.digest(cluster(number))))
    path = repo.storage.root / "packs" / place.pack
    data = bytearray(path.read_bytes())
    data[place.offset + place.stored // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)


@pytest.mark.parametrize(("encrypted", "target_encrypted"), KINDS)
def test_what_is_damaged_in_the_source_is_passed_over(tmp_path: Path, encrypted: bool, target_encrypted: bool) -> None:
    source, target = pair(tmp_path, encrypted, target_encrypted)
    whole, bad, later = back_up(source, [1, 2]), back_up(source, [1, 5]), back_up(source, [1, 6])
    spoil(source, 5)
    done = sync(again(source), again(target), Options())
    assert [r.id for r in done.copied] == [whole.id, later.id]
    assert isinstance(done.failed[bad.id], DamagedError)
    assert same(source, target, later.id)
    assert not check(again(target), read_data=True).problems


@pytest.mark.parametrize(("encrypted", "target_encrypted"), KINDS)
@pytest.mark.parametrize("pages", ["whole", "lost"])
def test_a_base_that_is_damaged_in_the_target(
    tmp_path: Path, encrypted: bool, target_encrypted: bool, pages: str
) -> None:
    """What is lost there is brought again, though it did not change."""
    source, target = pair(tmp_path, encrypted, target_encrypted)
    if pages == "whole":
        back_up(target, [3, 2, 1])
    back_up(source, [1, 2, 3])
    before = again(target).storage.list("packs").keys()
    copied(source, target)
    for pack in before or again(target).storage.list("packs"):
        os.unlink(target.storage.root / "packs" / pack)
    record = back_up(source, [1, 2, 4])
    assert copied(source, target) == [record.id]
    assert same(source, target, record.id)


def test_a_base_whose_page_has_rotted_in_the_target(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    back_up(source, [1, 2, 3])
    copied(source, target)
    target = again(target)
    root = bytes.fromhex(target.backups()[0].disks[0].root)
    place = next(target.index.places(root))
    path = target.storage.root / "packs" / place.pack
    data = bytearray(path.read_bytes())
    data[place.offset + place.stored // 2] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    record = back_up(source, [1, 2, 4])
    assert copied(source, target) == [record.id]
    assert same(source, target, record.id)


def test_a_record_that_cannot_be_read_in_the_target(tmp_path: Path) -> None:
    """It may be the last that was copied."""
    source, target = pair(tmp_path)
    back_up(source, [1])
    (ident,) = copied(source, target)
    path = target.storage.root / "backups" / ident
    path.chmod(0o600)
    path.write_bytes(b"")
    with pytest.raises(DamagedError, match="target's list"):
        plan(again(source), again(target), Options())


def test_a_record_that_cannot_be_read_in_the_source_is_told(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    bad, good = back_up(source, [1]), back_up(source, [2])
    path = source.storage.root / "backups" / bad.id
    path.chmod(0o600)
    path.write_bytes(b"")
    done = sync(again(source), again(target), Options())
    assert [r.id for r in done.copied] == [good.id]
    assert list(done.unreadable) == [bad.id]


def test_a_copy_that_came_out_different_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = pair(tmp_path)
    record = back_up(source, [1, 2])
    monkeypatch.setattr(carry_module._AsStored, "__call__", lambda self, digests: np.flip(digests, axis=0))
    done = sync(again(source), again(target), Options())
    assert isinstance(done.failed[record.id], SyncError)
    assert again(target).backups() == []


def test_content_that_comes_out_wrong_under_the_new_key_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair(tmp_path, target=True)
    back_up(source, [1, 2])
    source, target = again(source), again(target)
    encode = target.seal.encode

    def faulty(digest: bytes, data: bytes | memoryview, level: int = 1) -> tuple[int, bytes | memoryview]:
        return encode(digest, bytes([data[0] ^ 1]) + bytes(data[1:]), level)

    monkeypatch.setattr(target.seal, "encode", faulty)
    with pytest.raises(BackupError, match="came out wrong"):
        sync(source, target, Options())
    assert again(target).backups() == []


def test_two_that_are_one(tmp_path: Path) -> None:
    source = new(tmp_path / "source")
    with pytest.raises(UsageError, match="same repository"):
        sync(source, again(source), Options())


def test_other_clusters(tmp_path: Path) -> None:
    source, target = new(tmp_path / "source"), Repository.init(tmp_path / "target", 2 * CLUSTER)
    with pytest.raises(UsageError, match="4096 and 8192"):
        sync(source, target, Options())


def test_a_run_on_the_vm_in_the_target_stops_that_vm_only(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    back_up(source, [1])
    other = back_up(source, [2])
    with again(target).vm_lock("vm"):
        done = sync(again(source), again(target), Options())
    assert isinstance(done.failed["vm"], LockedError)
    assert done.copied == []
    assert len(copied(source, target)) == 2
    assert same(source, target, other.id)


def test_what_another_sync_copied_meanwhile_is_not_copied_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair(tmp_path)
    record = back_up(source, [1])
    from incbak.sync import copy as module

    original = module.plan

    def late(*args: object) -> object:
        planned = original(*args)  # type: ignore[arg-type]
        monkeypatch.setattr(module, "plan", original)
        assert copied(source, target) == [record.id]
        return planned

    monkeypatch.setattr(module, "plan", late)
    done = sync(again(source), again(target), Options())
    assert (done.copied, done.failed) == ([], {})


def test_the_host_remembers_the_copy(tmp_path: Path) -> None:
    """So a target that is put back is noticed."""
    source, target = pair(tmp_path)
    memory = Memory(tmp_path / "state")
    record = back_up(source, [1])
    copied(source, target, memory=memory)
    assert memory.troubles(target) == []
    os.unlink(target.storage.root / "backups" / record.id)
    assert "is gone" in memory.troubles(target)[0]


# -- killed -----------------------------------------------------------------------------------------------------------


def syncing(source: Repository, target: Repository, arm: Callable[[], None]) -> tuple[int, str]:
    """A sync in a process of its own: its exit status (negative: a signal), and the error's name."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if not pid:
        said = ""
        try:
            arm()
            done = sync(again(source), again(target), Options())
            said = ",".join(type(e).__name__ for e in done.failed.values())
        except Exception as e:  # noqa: BLE001 - told to the test
            said = type(e).__name__
        finally:
            os.write(theirs, f"{durable.passed()} {said}".encode())
            os._exit(bool(said))
    os.close(theirs)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with os.fdopen(ours) as told:
        return status, told.read()


def fresh(path: Path, name: str, target_encrypted: bool) -> Repository:
    return new(path / name, encrypted=target_encrypted)


@pytest.mark.parametrize("target_encrypted", [False, True])
@pytest.mark.parametrize("how", ["kill", "ENOSPC", "EIO"])
def test_hurt_at_every_step(tmp_path: Path, target_encrypted: bool, how: str) -> None:
    """What is listed then is whole, and the next sync ends the work."""
    source = new(tmp_path / "source")
    made = [back_up(source, content) for content in ([1, 2, 3], [1, 5, 3], [7, 5, 0])]
    status, told = syncing(source, fresh(tmp_path, "count", target_encrypted), lambda: durable.arm(f"{durable.ANY}:0"))
    assert status == 0
    steps = int(told.split()[0])
    assert steps > 15
    hurt = 0
    for step in range(1, steps + 1):
        target = fresh(tmp_path, f"t{step}", target_encrypted)
        armed = (f"{durable.ANY}:{step}", None) if how == "kill" else (None, f"{durable.ANY}:{step}:{how}")
        status, told = syncing(source, target, lambda armed=armed: durable.arm(*armed))  # type: ignore[misc]
        if how == "kill":
            assert status == -signal.SIGKILL
        hurt += status != 0
        listed = [r.id for r in again(target).backups()]
        assert listed == [r.id for r in made[: len(listed)]]
        assert all(same(source, target, ident) for ident in listed)
        assert copied(source, target) == [r.id for r in made[len(listed) :]]
        assert not check(again(target), read_data=True).problems
    assert hurt > steps // 2


def test_a_target_that_is_full_stops_it(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    back_up(source, [1])
    status, told = syncing(source, target, lambda: durable.arm(None, "durable.written:1:ENOSPC"))
    assert (status, told.split()[-1]) == (1, DurabilityError.__name__)


# -- in any order -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_backups_prunes_and_syncs_in_any_order(tmp_path: Path, seed: int) -> None:
    """What the target lists always restores to what it was, and it goes on with what is new."""
    rng = np.random.default_rng(seed)
    source, target = pair(tmp_path, bool(seed & 1), bool(seed & 2))
    content = [int(n) for n in rng.integers(0, 9, 40)]
    known: dict[str, list[bytes]] = {}
    newest: Record | None = None
    for _ in range(14):
        what = rng.choice(["back up", "back up", "sync", "prune source", "prune target"])
        if what == "back up":
            for at in rng.integers(0, len(content), 4):
                content[at] = int(rng.integers(0, 200))
            newest = back_up(again(source), content)
            known[newest.id] = [cluster(n) for n in content]
        elif what == "sync":
            sync(again(source), again(target), Options())
            if newest:
                assert again(target).backups()[-1].id == newest.id
        else:
            repo = again(source if what == "prune source" else target)
            if repo.backups():
                prune(repo, Policy(last=int(rng.integers(1, 4))), None, PruneOptions(grace=0))
        repo = again(target)
        for record in repo.backups():
            assert restore(repo, record) == known[record.id]
        assert not check(repo, read_data=True).problems


def test_several_disks(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    with writing(source) as writer:
        roots = {}
        for name, numbers in (("vda", [1, 2]), ("vdb", [3, 0, 4])):
            update = source.update(writer, None, len(numbers) * CLUSTER)
            digests = b"".join(store(writer, cluster(n)) for n in numbers)
            update.set(np.arange(len(numbers)), np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
            roots[name] = len(numbers) * CLUSTER, update.finish()
        made = msgspec.structs.replace(record_of(source, roots), tags=("weekly",))
        writer.commit(made)
    assert copied(source, target) == [made.id]
    target = again(target)
    found = target.record(made.id)
    assert [bytes(b) for b in restore(target, found, "vdb")] == [cluster(n) for n in (3, 0, 4)]
    assert found.tags == ("weekly",)


def ids(repo: Repository) -> list[str]:
    return [r.id for r in again(repo).backups()]


def away(repo: Repository, record: Record) -> Callable[[], None]:
    """Its record's file cannot be read for now."""
    file = repo.storage.root / "backups" / record.id
    kept = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(b"x")

    def back() -> None:
        file.write_bytes(kept)

    return back


@pytest.mark.parametrize("target_encrypted", [False, True])
def test_what_was_missed_is_copied_when_it_can_be_read(tmp_path: Path, target_encrypted: bool) -> None:
    """And it comes where it belongs: not as the latest."""
    source, target = pair(tmp_path, False, target_encrypted)
    first = back_up(source, [1])
    packs = set(source.storage.list("packs"))
    second = back_up(source, [2])
    (pack,) = set(source.storage.list("packs")) - packs
    third = back_up(source, [3])
    file = source.storage.root / "packs" / pack
    file.rename(tmp_path / "away")
    done = sync(again(source), again(target), Options())
    assert ([r.id for r in done.copied], list(done.failed)) == ([first.id, third.id], [second.id])
    fourth = back_up(source, [4])
    done = sync(again(source), again(target), Options())
    assert ([r.id for r in done.copied], list(done.failed)) == ([fourth.id], [second.id])
    (tmp_path / "away").rename(file)
    assert copied(source, target) == [second.id]
    assert same(source, target, second.id)
    assert ids(target) == ids(source) == [first.id, second.id, third.id, fourth.id]
    assert again(target).find("latest").id == fourth.id
    assert copied(source, target) == []


def test_a_record_that_could_not_be_read_is_copied_later(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    first, second = back_up(source, [1]), back_up(source, [2])
    back = away(source, first)
    assert copied(source, target) == [second.id]
    back()
    assert copied(source, target) == [first.id]
    assert ids(target) == [first.id, second.id]


def test_what_came_late_does_not_come_back_when_it_was_pruned_and_a_third_place_gets_it(tmp_path: Path) -> None:
    source, target = pair(tmp_path)
    third_place = new(tmp_path / "third")
    first, second = back_up(source, [1]), back_up(source, [2])
    back = away(source, first)
    copied(source, target)
    assert copied(target, third_place) == [second.id]
    back()
    copied(source, target)
    assert copied(target, third_place) == [first.id]
    assert set(ids(third_place)) == {first.id, second.id}
    newer = back_up(source, [3])
    copied(source, target)
    again(target).storage.remove("backups", first.id)
    assert copied(source, target) == []
    assert ids(target) == [second.id, newer.id]

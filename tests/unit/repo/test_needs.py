"""What is needed, kept from prune to prune: the same as counted anew, or not believed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import msgspec
import numpy as np
import pytest

from incbak.errors import DamagedError, DurabilityError, StorageError
from incbak.events import Event, Warned
from incbak.repo import blob, columns, counts, mapping, needs_file, pins, spool, tree
from incbak.repo import needs as module
from incbak.repo.check import check, rebuild_index
from incbak.repo.condemned import condemn
from incbak.repo.counts import MOST, Counts, Tally
from incbak.repo.needs import Needs
from incbak.repo.prune import Options, Outcome, prune
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.unit.repo.scene import CLUSTER, back_up, cluster, new, opened, record_of, restore, store, writing

LAST = Policy(last=1)
ALL = Policy(last=99)


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pages make deep trees."""
    monkeypatch.setattr(tree, "FANOUT", 4)
    monkeypatch.setattr(tree, "PAGE", 4 * 32)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A repository."""
    new(tmp_path / "repo")
    return tmp_path / "repo"


def made(path: Path, content: Sequence[int]) -> Record:
    return back_up(Repository.open(path), list(content))


def pruned(path: Path, policy: Policy = LAST, below: float = 1.0, *, damaged: bool = False) -> Outcome:
    done = prune(Repository.open(path), policy, None, Options(grace=0.0, repack_below=below))
    assert isinstance(done.trouble, DamagedError) if damaged else done.trouble is None
    return done


def state(needs: Needs) -> tuple[list[int], list[int]]:
    """All keys and counts."""
    parts = list(needs.all())
    return [k for keys, _ in parts for k in keys.tolist()], [c for _, found in parts for c in found.tolist()]


def same_as_anew(path: Path) -> None:
    """What was kept says what counting anew says."""
    repo = Repository.open(path)
    kept, anew = Needs(repo), Needs(repo, anew=True)
    for needs in (kept, anew):
        needs.count(repo.backups())
    assert state(kept) == state(anew)
    assert kept.weights() == anew.weights()


def saved(path: Path) -> Path:
    (found,) = (path / "needs").iterdir()
    return found


def reads(path: Path, work: Callable[[], object]) -> int:
    """Pages that ``work`` reads."""
    real, seen = tree.TreeReader.page, list[bytes]()

    def page(self: tree.TreeReader, digest: bytes) -> tree.Page:
        if digest != blob.ZERO_DIGEST and digest not in self._pages:
            seen.append(digest)
        return real(self, digest)

    with mock.patch.object(tree.TreeReader, "page", page):
        work()
    return len(seen)


def _all_in_files(monkeypatch: pytest.MonkeyPatch) -> None:
    for where, name, value in ((counts, "_RUN", 7), (counts, "RANGE", 5), (spool, "_IN_MEMORY", 100)):
        monkeypatch.setattr(where, name, value)
    monkeypatch.setattr(mapping, "IN_MEMORY", 0)


@pytest.mark.parametrize("where", ["temporary file", "needs "])
def test_a_sector_that_fails_later_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """And not a signal."""
    _all_in_files(monkeypatch)
    made(path, list(range(40)))
    needs = Needs(Repository.open(path), anew=True)
    needs.count(Repository.open(path).backups())
    if where == "needs ":
        needs.save()
        needs = Needs(Repository.open(path))

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(columns.os, "preadv", failing)
    with pytest.raises(StorageError, match=f"{where}.*cannot be read: Input/output error"):
        list(needs.all())


@pytest.mark.parametrize("large", [False, True])
def test_kept_over_many_prunes(path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """With two disks that share content; when ``large``, as if nothing went into memory at once."""
    if large:
        _all_in_files(monkeypatch)
    rng = Random(5)
    contents = {"vda": [rng.randrange(30) for _ in range(40)], "vdb": [rng.randrange(30) for _ in range(17)]}
    held: dict[str, dict[str, list[int]]] = {}
    repacked = 0
    for turn in range(12):
        for name in contents:
            numbers = list(contents[name])
            for _ in range(rng.choice((0, 1, 5))):
                numbers[rng.randrange(len(numbers))] = rng.randrange(60)
            contents[name] = numbers
        repo, disks = Repository.open(path), {}
        with writing(repo) as writer:
            for name, numbers in contents.items():
                update = repo.update(writer, None, len(numbers) * CLUSTER)
                digests = b"".join(store(writer, cluster(n)) for n in numbers)
                update.set(np.arange(len(numbers)), np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
                disks[name] = len(numbers) * CLUSTER, update.finish()
            record = record_of(repo, disks)
            writer.commit(record)
        held[record.id] = dict(contents)
        if rng.random() < 0.3:
            pins.pin(repo.storage, record.id)
        done = pruned(path, Policy(last=rng.choice((1, 2, 4))), (0.0, 1.0, 0.8)[turn % 3])
        repacked += done.repacked
        same_as_anew(path)
    repo = Repository.open(path)
    assert len(repo.backups()) > 2
    assert repacked > 5
    for record in repo.backups():
        for name, numbers in held[record.id].items():
            assert restore(repo, record, name) == [cluster(n) for n in numbers]
    assert check(Repository.open(path), read_data=True).problems == []
    for pinned in pins.read_pins(repo.storage):
        pins.unpin(repo.storage, pinned)
    pruned(path)
    needs = Needs(Repository.open(path), anew=True)
    needs.count(Repository.open(path).backups())
    assert sum(needs.weights().values()) == sum(map(_table_size, (path / "packs").iterdir()))


def _table_size(pack: Path) -> int:
    """What a pack takes but for its frame."""
    from incbak.repo.pack import FOOT, HEAD

    return pack.stat().st_size - HEAD.size - FOOT.size


def test_work_follows_what_goes_and_comes(path: Path) -> None:
    """Of 40 backups of a disk of 85 pages: with one more and one less, those are read that make the difference."""
    numbers = list(range(1, 257))
    for turn in range(40):
        numbers[turn % 3] = 300 + turn
        made(path, numbers)
    assert reads(path, lambda: pruned(path, ALL)) > 200
    numbers[7] = 1000
    made(path, numbers)
    assert reads(path, lambda: pruned(path, Policy(last=40))) < 30
    assert reads(path, lambda: pruned(path, Policy(last=40))) == 0
    same_as_anew(path)


SPOILT: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[:-1],
    "cut at the front": lambda data: data[12:],
    "a key": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "the manifest": lambda data: data[:-40] + bytes([data[-40] ^ 1]) + data[-39:],
    "its length": lambda data: data[:-16] + b"\xff" * 8 + data[-8:],
    "zeroes": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("how", SPOILT)
def test_what_does_not_verify_is_not_believed(path: Path, how: str) -> None:
    """And goes, with the next that is kept."""
    made(path, [1, 2, 3])
    kept = made(path, [3, 4])
    pruned(path, ALL)
    file = saved(path)
    data = SPOILT[how](file.read_bytes())
    file.chmod(0o600)
    file.write_bytes(data)
    assert needs_file.load(Repository.open(path).storage) is None
    same_as_anew(path)
    pruned(path)
    assert saved(path) != file
    assert restore(Repository.open(path), kept) == [cluster(3), cluster(4)]


def test_another_version_is_not_believed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made(path, [1])
    monkeypatch.setattr(needs_file, "VERSION", 2)
    pruned(path)
    monkeypatch.undo()
    assert needs_file.load(Repository.open(path).storage) is None


def _without_a_pack(path: Path, record: Record) -> None:
    _pack_of(path, record).unlink()


def _pack_of(path: Path, record: Record) -> Path:
    return path / "packs" / next(Repository.open(path).index.places(bytes.fromhex(record.disks[0].root))).pack


def _without_an_index_file(path: Path, record: Record) -> None:
    pack = _pack_of(path, record).name
    repo = Repository.open(path)
    (file,) = (f for f in repo.index.files if pack in f.names)
    repo.storage.remove("index", file.name)


def _indexed_without_a_pack(path: Path, record: Record) -> None:
    _without_a_pack(path, record)
    rebuild_index(Repository.open(path))


def _condemned(path: Path, record: Record) -> None:
    condemn(Repository.open(path).storage, [_pack_of(path, record).name], 0.0)


def _cut(path: Path, record: Record) -> None:
    pack = _pack_of(path, record)
    pack.write_bytes(pack.read_bytes()[:-1])


DAMAGE = [_without_a_pack, _without_an_index_file, _indexed_without_a_pack, _condemned, _cut]


@pytest.mark.parametrize("which", ["newest", "beside what goes", "apart"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_lost_since_is_missed(path: Path, damage: Callable[[Path, Record], None], which: str) -> None:
    """faults row 24: also of a backup that was counted long ago, and nothing is removed."""
    made(path, [1, 2, 3])
    older = [made(path, [n, 6, 7]) for n in (5, 8, 9)]
    for n in (10, 20, 30):
        made(path, [n, 6, 7])
    newest = made(path, [40, 41, 42])
    for record in older:
        pins.pin(Repository.open(path).storage, record.id)
    pruned(path, ALL)
    made(path, [50])
    damage(path, {"newest": newest, "beside what goes": older[0], "apart": older[1]}[which])
    before = {p: p.read_bytes() for kind in ("packs", "backups") for p in (path / kind).iterdir()}
    with pytest.raises(DamagedError, match="nothing was removed"):
        pruned(path, Policy(last=2))
    assert {p: p.read_bytes() for kind in ("packs", "backups") for p in (path / kind).iterdir()} == before


def test_clusters_that_are_in_no_pack_stop_it(path: Path) -> None:
    """Also where no backup goes, so that none is looked at beside those."""
    lost = _pack_of(path, made(path, [1, 2]))
    made(path, [1, 2, 9])
    pruned(path, below=0.0)
    made(path, [1, 2, 8])
    lost.unlink()
    for _ in range(2):
        with pytest.raises(DamagedError, match=r"nothing was removed.*: 2 of its clusters or pages are in no pack"):
            pruned(path, ALL)
        for file in (path / "needs").iterdir():
            file.unlink()


def test_the_last_good_backup_has_all_its_clusters(path: Path) -> None:
    """One whose pages can be read, but name what is in no pack, is none."""
    lost = _pack_of(path, made(path, [9]))
    good = made(path, [1, 2])
    made(path, [9, 3])
    lost.unlink()
    done = pruned(path, Policy(tags=("none",)))
    assert [d.record.id for d in done.decisions if d.keep] == [good.id]
    assert restore(Repository.open(path), good) == [cluster(1), cluster(2)]


def _rot(path: Path, digest: bytes) -> None:
    place = next(Repository.open(path).index.places(digest))
    file = path / "packs" / place.pack
    data = bytearray(file.read_bytes())
    data[place.offset + place.stored // 2] ^= 0x10
    file.write_bytes(data)


def test_a_page_that_has_rotted_since_is_missed(path: Path) -> None:
    """Beside what goes: the newest, which may be all that is left, or the next older or newer one that stays."""
    for number, policy in enumerate((LAST, Policy(last=2))):
        own = path.with_name(f"repo{number}")
        new(own)
        made(own, [*range(1, 17)])
        stays = made(own, [100, *range(2, 17)])
        pruned(own, ALL)
        if policy is not LAST:
            made(own, [200, 201, *range(3, 17)])
        root = Repository.open(own).tree(stays.disks[0])
        _rot(own, root.leaf_digest(0))
        with pytest.raises(DamagedError, match="nothing was removed"):
            pruned(own, policy)
        assert len(Repository.open(own).backups()) == number + 2


def test_what_all_have_rotten_holds_up_nothing(path: Path) -> None:
    """A page that those that go have too is not better kept by keeping them; no check has found it yet."""
    old, kept = made(path, [*range(1, 17)]), made(path, [*range(1, 16), 99])
    pruned(path, ALL)
    shared = Repository.open(path).tree(kept.disks[0]).leaf_digest(0)
    assert Repository.open(path).tree(old.disks[0]).leaf_digest(0) == shared
    _rot(path, shared)
    assert [d.keep for d in pruned(path, damaged=True).decisions] == [False, True]
    assert [r.id for r in Repository.open(path).backups()] == [kept.id]


def test_what_goes_need_not_be_readable(path: Path) -> None:
    """All is counted anew then."""
    old = made(path, [1, 2, 3])
    kept = made(path, [4, 5, 6])
    pruned(path, ALL)
    _rot(path, bytes.fromhex(old.disks[0].root))
    pruned(path)
    same_as_anew(path)
    repo = Repository.open(path)
    assert [r.id for r in repo.backups()] == [kept.id]
    assert restore(repo, kept) == [cluster(n) for n in (4, 5, 6)]


def test_an_older_file_is_as_true(path: Path) -> None:
    """Put back, or left by a prune that was killed: the content of what went since may be gone already."""
    made(path, [1, 2, 3])
    made(path, [3, 4])
    pruned(path, ALL)
    old = saved(path)
    data = old.read_bytes()
    made(path, [4, 5])
    pruned(path)
    made(path, [1, 9])
    saved(path).unlink()
    old.write_bytes(data)
    same_as_anew(path)
    pruned(path, Policy(last=2))
    same_as_anew(path)
    assert check(Repository.open(path), read_data=True).problems == []


def test_of_two_files_the_later_counts(path: Path) -> None:
    made(path, [1, 2])
    pruned(path)
    old = saved(path)
    data = old.read_bytes()
    made(path, [3])
    pruned(path, ALL)
    old.write_bytes(data)
    kept = needs_file.load(Repository.open(path).storage)
    assert kept
    assert kept[0].serial == 2
    pruned(path, LAST)
    assert len(list((path / "needs").iterdir())) == 1


def test_a_disk_without_room_costs_the_next_prune_time_only(path: Path) -> None:
    made(path, [1, 2])
    made(path, [3])
    events: list[Event] = []

    failure: Exception = DurabilityError("cannot write: No space left on device")

    def full(*_args: Any) -> None:
        raise failure

    with mock.patch.object(needs_file, "save", full):
        done = prune(Repository.open(path), LAST, None, Options(grace=0.0), events.append)
        failure = OSError(errno.ENOSPC, "No space left on device")
        prune(Repository.open(path), LAST, None, Options(grace=0.0))
    assert done.trouble is None
    assert done.freed > 0
    assert any(isinstance(e, Warned) and "No space left" in e.text for e in events)
    pruned(path)
    same_as_anew(path)


def test_no_room_for_what_is_too_much_for_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told what to do, and nothing was removed."""
    made(path, [1, 2])
    made(path, [3])
    monkeypatch.setattr(spool, "_IN_MEMORY", 0)
    with Path("/dev/full").open("r+b", buffering=0) as full:
        monkeypatch.setattr(spool, "spool_file", lambda: full)
        with pytest.raises(DurabilityError, match="temporary file: No space left") as error:
            pruned(path)
    assert "TMPDIR" in error.value.hint
    assert len(Repository.open(path).backups()) == 2


def test_no_name_is_told_in_an_encrypted_repository(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    repo = new(path, encrypted=True)
    record = back_up(repo, [1, 2])
    for policy in (ALL, LAST):
        assert prune(opened(path), policy).trouble is None
    data = saved(path).read_bytes()
    assert len(data) > 100
    for told in (b"vda", record.id.encode(), record.disks[0].root.encode()):
        assert told not in data
    assert saved(path).stat().st_mode & 0o777 == 0o600
    plain = needs_file.load(opened(path).storage)
    assert plain
    assert plain[0].chains[0].disk == "vda"
    data = data[:-60] + bytes([data[-60] ^ 1]) + data[-59:]
    os.chmod(saved(path), 0o600)
    saved(path).write_bytes(data)
    assert needs_file.load(opened(path).storage) is None


def test_nothing_new_is_not_written_again(path: Path) -> None:
    made(path, [1, 2])
    pruned(path)
    before = saved(path)
    pruned(path)
    assert saved(path) == before


def test_a_stray_pack_with_something_needed_stays(path: Path) -> None:
    """No index names it, and what was kept is believed: it cannot be, but the last look is at the pack itself."""
    made(path, [1, 2])
    kept = made(path, [3, 4])
    pruned(path, ALL)
    _without_an_index_file(path, kept)
    with mock.patch.object(Needs, "_doubt"):
        prune(Repository.open(path), Policy(last=2), None, Options(grace=0.0))
    rebuild_index(Repository.open(path))
    assert restore(Repository.open(path), kept) == [cluster(3), cluster(4)]


def _kept_with(path: Path, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    """Keep other counts than those that are right, in a file that verifies."""
    storage = Repository.open(path).storage
    kept = needs_file.load(storage)
    assert kept
    needs = Needs(Repository.open(path))
    needs.count(Repository.open(path).backups())
    needs_file.save(storage, kept[0], [(keys, change(found)) for keys, found in needs.all()])


def test_a_count_below_nothing_is_not_believed(path: Path) -> None:
    """It must not be: then what else is kept is wrong, too."""
    made(path, [1, 2, 3])
    kept = made(path, [3, 4, 5])
    pruned(path, ALL)
    _kept_with(path, np.zeros_like)
    pruned(path)
    same_as_anew(path)
    assert restore(Repository.open(path), kept) == [cluster(n) for n in (3, 4, 5)]


def test_what_was_too_much_to_count_stays_needed(path: Path) -> None:
    """Until all is counted anew."""
    old = made(path, [1, 2, 3])
    made(path, [4])
    with mock.patch.object(module, "MOST", 1):
        pruned(path, ALL)
        assert pruned(path).freed == 0
    assert _pack_of(path, old).exists()
    saved(path).unlink()
    assert pruned(path).freed > 0


def test_what_is_kept_of_packs_decides_nothing(path: Path) -> None:
    """Whatever it says, a pack with something needed stays until that was copied."""
    made(path, [1, 2, 3])
    kept = made(path, [3, 4, 5])
    pruned(path, ALL)
    storage = Repository.open(path).storage
    found = needs_file.load(storage)
    assert found
    needs = Needs(Repository.open(path))
    wrong = msgspec.structs.replace(found[0], packs=dict.fromkeys(found[0].packs, 0))
    needs_file.save(storage, wrong, list(needs.all()))
    for below in (0.0, 1.0):
        pruned(path, Policy(last=2), below)
        assert restore(Repository.open(path), kept) == [cluster(n) for n in (3, 4, 5)]
        assert check(Repository.open(path), read_data=True).problems == []


# -- the arrays --------------------------------------------------------------------------------------------------------


def digests_of(keys: Sequence[int]) -> np.ndarray[Any, Any]:
    found = np.zeros((len(keys), 32), dtype=np.uint8)
    found[:, :8] = np.array(keys, dtype=">u8").view(np.uint8).reshape(-1, 8)
    return found


def test_too_many_to_count_are_never_none() -> None:
    """A count that has reached its limit stays there."""
    tally, needs = Tally(), Counts()
    tally.add(digests_of([7]), 1 << 40)
    ((keys, sums),) = [part for part in tally.sums() if len(part[0])]
    needs.append(keys, np.minimum(sums, MOST))
    assert needs.of(np.array([6, 7, 8], dtype=np.uint64)).tolist() == [-1, MOST, -1]


def test_keys_at_both_ends() -> None:
    """The first and the last key that there can be, in any number of stretches."""
    with mock.patch.object(counts, "RANGE", 1):
        tally = Tally()
        ends = [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1]
        tally.add(digests_of(ends * 2), 1)
        tally.add(digests_of(ends[1:2]), -2)
        found = [(k, s) for keys, sums in tally.sums() for k, s in zip(keys.tolist(), sums.tolist(), strict=True)]
        assert found == [(key, 2) for key in ends if key != 1]


def test_the_manifest_is_strict(path: Path) -> None:
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(b'{"version":1,"serial":1,"more":2}', type=needs_file.Manifest)

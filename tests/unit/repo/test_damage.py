"""Damage of every kind, of every kind of file: found, named, never restored in silence, and healed by a backup."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from incbak import durable
from incbak.errors import DamagedError, DurabilityError, FormatTooNewError, NoRepositoryError, UsageError
from incbak.repo import blob, pack
from incbak.repo.check import check, rebuild_index
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.unit.repo.scene import CLUSTER, back_up, cluster, new, restore

CONTENT = [1, 2, 3, 0, 6]
WANTED = [cluster(n) for n in CONTENT]


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def _cut(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def _zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _remove(path: Path) -> None:
    path.unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "flip": _flip,
    "cut": _cut,
    "zero": _zero,
    "empty": _empty,
    "remove": _remove,
}
damaged_by = pytest.mark.parametrize("how", DAMAGE)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Record]:
    path = tmp_path / "repo"
    return path, back_up(new(path), CONTENT)


def _only(path: Path, kind: str) -> Path:
    (found,) = [p for p in (path / kind).iterdir() if not p.name.startswith(".")]
    return found


@damaged_by
def test_a_damaged_config_opens_nothing(made: tuple[Path, Record], how: str) -> None:
    path, _ = made
    DAMAGE[how](path / "config")
    with pytest.raises(NoRepositoryError if how == "remove" else DamagedError) as refused:
        Repository.open(path)
    assert str(path) in str(refused.value)


def test_every_single_flipped_bit_of_the_config_is_found(made: tuple[Path, Record]) -> None:
    """Also one that makes another valid id, and one that makes no text."""
    path, _ = made
    good = (path / "config").read_bytes()
    for at in range(len(good)):
        for bit in range(8):
            bad = bytearray(good)
            bad[at] ^= 1 << bit
            (path / "config").write_bytes(bad)
            with pytest.raises(DamagedError):
                Repository.open(path)


@damaged_by
def test_a_damaged_pack_is_found_named_and_healed(made: tuple[Path, Record], how: str) -> None:
    """faults rows 24, 25, 77: check names it and the backup; no wrong byte is read; the next backup heals."""
    path, record = made
    victim = _only(path, "packs")
    DAMAGE[how](victim)
    repo = Repository.open(path)
    with pytest.raises(DamagedError):
        assert restore(repo, record) == WANTED
    report = check(Repository.open(path), read_data=True)
    assert any(victim.name in p.what for p in report.problems)
    assert any(record.id in p.backups for p in report.problems)
    assert record.id in repo.damage().backups
    again = back_up(Repository.open(path), CONTENT)
    fresh = Repository.open(path)
    assert restore(fresh, again) == WANTED
    assert restore(fresh, record) == WANTED, "content is stored under its digest: the old backup is whole again too"
    check(fresh, read_data=True)
    assert fresh.damage().backups == frozenset()
    assert fresh.damage().digests == frozenset()


@damaged_by
def test_a_plain_check_finds_a_pack_that_holds_nothing_any_more(made: tuple[Path, Record], how: str) -> None:
    """Without reading all data; a flipped bit of a cluster is the one thing that it may miss."""
    path, record = made
    victim = _only(path, "packs")
    DAMAGE[how](victim)
    report = check(Repository.open(path))
    if how == "flip" and not report.problems:
        return
    assert any(record.id in p.backups for p in report.problems)
    again = back_up(Repository.open(path), CONTENT)
    assert restore(Repository.open(path), again) == WANTED


def test_a_damaged_page_is_noted_also_by_a_plain_check(made: tuple[Path, Record]) -> None:
    """The tree's own pages are content too: the next backup must not build on a damaged one."""
    path, record = made
    repo = Repository.open(path)
    root = bytes.fromhex(record.disks[0].root)
    (place,) = repo.index.places(root)
    victim = path / "packs" / place.pack
    data = bytearray(victim.read_bytes())
    data[place.offset + 20] ^= 1
    victim.write_bytes(data)
    report = check(Repository.open(path))
    assert [p.backups for p in report.problems] == [(record.id,)]
    assert root in Repository.open(path).damage().digests
    again = back_up(Repository.open(path), CONTENT)
    assert again.disks[0].root == record.disks[0].root
    assert restore(Repository.open(path), again) == WANTED


def test_a_flipped_bit_of_each_blob_names_the_blob(made: tuple[Path, Record]) -> None:
    path, record = made
    for number in (1, 3):
        digest = blob.digest_of(cluster(number))
        (place,) = Repository.open(path).index.places(digest)
        victim = path / "packs" / place.pack
        good = victim.read_bytes()
        bad = bytearray(good)
        bad[place.offset + place.stored // 2] ^= 1
        victim.write_bytes(bad)
        repo = Repository.open(path)
        with pytest.raises(DamagedError, match=digest.hex()):
            repo.reader().read(digest)
        rows = dict(repo.reader().read_many(repo.tree(record.disks[0]).digests(0, 3)))
        hurt = [i for i, content in rows.items() if isinstance(content, DamagedError)]
        assert hurt == [CONTENT.index(number)]
        report = check(repo, read_data=True)
        assert any(digest.hex() in p.what for p in report.problems)
        victim.write_bytes(good)
    assert check(Repository.open(path), read_data=True).problems == []


def test_a_damaged_copy_beside_a_whole_one_harms_nothing(made: tuple[Path, Record]) -> None:
    """Every copy is tried, whichever is found first; a check names the damaged one and hurts no backup."""
    path, record = made
    repo = Repository.open(path)
    digest = blob.digest_of(cluster(1))
    repo.storage.write("damaged", "0" * 32, b'{"digests":["%s"],"backups":[]}' % digest.hex().encode())
    back_up(repo, CONTENT)
    repo.storage.remove("damaged", "0" * 32)
    places = list(Repository.open(path).index.places(digest))
    assert len(places) == 2
    for place in places:
        pack_file = path / "packs" / place.pack
        whole = pack_file.read_bytes()
        spoilt = bytearray(whole)
        spoilt[place.offset + place.stored // 2] ^= 1
        pack_file.write_bytes(spoilt)
        fresh = Repository.open(path)
        assert restore(fresh, record) == WANTED
        found = check(fresh, read_data=True)
        assert [p.backups for p in found.problems] == [()]
        assert "another copy is whole" in found.problems[0].what
        pack_file.write_bytes(whole)


def test_every_copy_is_tried_where_one_index_file_names_them_all(made: tuple[Path, Record]) -> None:
    """An index that was made anew, or merged, has all copies of a blob in one file; either of them may be rotten."""
    path, record = made
    digest = blob.digest_of(cluster(1))
    repo = Repository.open(path)
    repo.storage.write("damaged", "0" * 32, b'{"digests":["%s"],"backups":[]}' % digest.hex().encode())
    back_up(Repository.open(path), CONTENT)
    rebuild_index(Repository.open(path))
    places = list(Repository.open(path).index.places(digest))
    assert len({p.pack for p in places}) == 2
    for place in places:
        victim = path / "packs" / place.pack
        sound = victim.read_bytes()
        spoilt = bytearray(sound)
        spoilt[place.offset + place.stored // 2] ^= 0x10
        victim.write_bytes(spoilt)
        assert restore(Repository.open(path), record) == WANTED
        victim.write_bytes(sound)


def test_two_packs_that_were_swapped_are_found(made: tuple[Path, Record]) -> None:
    path, _ = made
    back_up(Repository.open(path), [9, 12, 15, 18, 21])
    a, b = sorted((path / "packs").iterdir())
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    report = check(Repository.open(path), read_data=True)
    assert {p.name for p in (a, b)} <= {name for p in report.problems for name in (a.name, b.name) if name in p.what}
    assert len({b for p in report.problems for b in p.backups}) == 2


@damaged_by
def test_a_damaged_index_is_found_and_made_anew(made: tuple[Path, Record], how: str) -> None:
    path, record = made
    victim = _only(path, "index")
    DAMAGE[how](victim)
    report = check(Repository.open(path))
    if how != "remove":
        assert any(victim.name in p.what and "rebuild-index" in p.what for p in report.problems)
    assert any(record.id in p.backups for p in report.problems)
    assert rebuild_index(Repository.open(path)) == 5
    assert not victim.exists()
    fresh = Repository.open(path)
    assert restore(fresh, record) == WANTED
    assert check(fresh, read_data=True).problems == []


@pytest.mark.parametrize("point", ["durable.created", "durable.written", "durable.synced"])
def test_an_index_that_cannot_be_made_anew_stays(made: tuple[Path, Record], point: str) -> None:
    """The old files go only when the new ones are durable."""
    path, record = made
    before = Repository.open(path).storage.list("index")
    durable.arm(fault_at=f"{point}:1:ENOSPC")
    with pytest.raises(DurabilityError):
        rebuild_index(Repository.open(path))
    durable.arm()
    assert Repository.open(path).storage.list("index") == before
    assert restore(Repository.open(path), record) == WANTED


def test_index_files_that_were_swapped_are_as_good_as_before(made: tuple[Path, Record]) -> None:
    path, record = made
    other = back_up(Repository.open(path), [9, 12])
    a, b = sorted((path / "index").iterdir())
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    repo = Repository.open(path)
    assert check(repo, read_data=True).problems == []
    assert restore(repo, record) == WANTED
    assert restore(repo, other) == [cluster(9), cluster(12)]


@damaged_by
def test_a_damaged_record_is_found_and_no_backup(made: tuple[Path, Record], how: str) -> None:
    path, record = made
    other = back_up(Repository.open(path), [7])
    DAMAGE[how](path / "backups" / record.id)
    repo = Repository.open(path)
    assert [r.id for r in repo.backups()] == [other.id]
    report = check(repo)
    if how == "remove":
        assert report.problems == []
        return
    assert [p.backups for p in report.problems] == [(record.id,)]
    with pytest.raises(DamagedError, match=record.id):
        repo.find(record.id)


def test_records_that_were_swapped_are_no_backups(made: tuple[Path, Record]) -> None:
    path, record = made
    other = back_up(Repository.open(path), [7])
    a, b = (path / "backups" / r.id for r in (record, other))
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)
    repo = Repository.open(path)
    assert repo.backups() == []
    assert {i for p in check(repo).problems for i in p.backups} == {record.id, other.id}


def test_a_file_that_is_none_of_ours_is_named(made: tuple[Path, Record]) -> None:
    path, _ = made
    (path / "packs" / "notes.txt").write_text("shopping")
    (path / "backups" / "notes.txt").write_text("shopping")
    repo = Repository.open(path)
    assert len(repo.backups()) == 1
    assert sum("notes.txt" in p.what for p in check(repo).problems) == 2


def test_a_damaged_note_is_passed_over(made: tuple[Path, Record]) -> None:
    path, _ = made
    (path / "damaged" / ("0" * 32)).write_bytes(b"\xff not json")
    (path / "damaged" / ("1" * 32)).write_bytes(b'{"digests":["zz"],"backups":[]}')
    assert Repository.open(path).damage().digests == frozenset()
    back_up(Repository.open(path), [5])


def test_a_subset_is_read_in_turn_and_leaves_older_notes(made: tuple[Path, Record]) -> None:
    """A look at a part proves nothing about the rest: it adds notes and removes none.

    What is noted is looked at again by every check, whatever part it reads.
    """
    path, _ = made
    for number in range(4):
        back_up(Repository.open(path), [100 + number * 3])
    victims = sorted((path / "packs").iterdir())
    digest = blob.digest_of(cluster(1))
    (place,) = Repository.open(path).index.places(digest)
    _flip_at(path / "packs" / place.pack, place.offset + 5)
    seen = []
    for seed in range(1000):
        report = check(Repository.open(path), read_data=True, fraction=1 / len(victims), seed=seed)
        assert report.packs_read < len(victims)
        seen.append(digest in report.damaged)
        if len(seen) > seen.count(False) + 4:
            break
    assert seen == sorted(seen)
    assert seen[-1]
    assert digest in Repository.open(path).damage().digests


def _with_a_known_damaged_cluster(path: Path) -> bytes:
    digest = blob.digest_of(cluster(1))
    (place,) = Repository.open(path).index.places(digest)
    _flip_at(path / "packs" / place.pack, place.offset + 5)
    assert check(Repository.open(path), read_data=True).damaged == {digest}
    return digest


def test_a_plain_check_tells_what_is_known_and_still_so(made: tuple[Path, Record]) -> None:
    """It reads what is noted, and nothing else; what was stored again is a problem no more."""
    path, record = made
    digest = _with_a_known_damaged_cluster(path)
    for _ in range(3):
        report = check(Repository.open(path))
        assert (report.damaged, report.packs_read) == ({digest}, 0)
        assert {record.id} == {i for p in report.problems for i in p.backups}
        assert len(list((path / "damaged").iterdir())) == 1, "the same findings make no further note"
    back_up(Repository.open(path), CONTENT)
    assert check(Repository.open(path)).problems == []
    damage = Repository.open(path).damage()
    assert (damage.digests, damage.backups) == (frozenset(), {record.id}), "what else is in it, nobody has read"


def test_a_note_that_cannot_be_read_is_removed_only_by_a_check_of_everything(made: tuple[Path, Record]) -> None:
    path, _ = made
    _with_a_known_damaged_cluster(path)
    note = path / "damaged" / ("0" * 32)
    note.write_bytes(b"\xff not json")
    back_up(Repository.open(path), CONTENT)
    check(Repository.open(path))
    assert note.exists()
    check(Repository.open(path), read_data=True)
    assert not note.exists()


def _flip_at(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_backup_that_is_committed_during_a_check_does_not_look_damaged(
    made: tuple[Path, Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Readers go the other way: records first, then the index, then the packs."""
    path, _ = made
    repo = Repository.open(path)
    real = type(repo.index).refresh
    later: list[Record] = []

    def refresh(index: object) -> None:
        real(index)  # type: ignore[arg-type]
        if index is repo.index and not later:
            later.append(back_up(Repository.open(path), [77, 78]))

    monkeypatch.setattr(type(repo.index), "refresh", refresh)
    report = check(repo, read_data=True)
    assert later
    assert report.problems == []
    assert repo.damage().backups == frozenset()


# -- versions and making -------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_and_left_alone(made: tuple[Path, Record]) -> None:
    """faults row 83."""
    path, record = made
    config = msgspec.json.decode((path / "config").read_bytes())
    for newer in (config | {"version": 2}, {"version": 3, "everything": ["is", "different"]}):
        raw = msgspec.json.encode(newer)
        (path / "config").write_bytes(raw)
        with pytest.raises(FormatTooNewError, match=r"format [23]"):
            Repository.open(path)
        assert (path / "config").read_bytes() == raw
    assert (path / "backups" / record.id).exists()


def test_rebuild_stops_at_a_newer_pack(made: tuple[Path, Record]) -> None:
    path, _ = made
    victim = _only(path, "packs")
    data = bytearray(victim.read_bytes())
    data[-pack.FOOT.size + 8] = pack.VERSION + 1
    victim.write_bytes(data)
    before = sorted(p.name for p in (path / "index").iterdir())
    with pytest.raises(FormatTooNewError):
        rebuild_index(Repository.open(path))
    assert sorted(p.name for p in (path / "index").iterdir()) == before


def test_init_takes_only_an_empty_place(tmp_path: Path) -> None:
    new(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="is a repository already"):
        new(tmp_path / "a" / "b")
    with pytest.raises(UsageError, match="is not an empty directory"):
        new(tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError):
        new(tmp_path / "file")
    for size in (0, 1000, 2048, 8 << 20, 5000):
        with pytest.raises(UsageError, match="not a cluster size"):
            Repository.init(tmp_path / "c", size)
    for place in (tmp_path / "nothing", tmp_path / "file", tmp_path):
        with pytest.raises(NoRepositoryError):
            Repository.open(place)


def test_find_by_id_prefix_and_latest(made: tuple[Path, Record]) -> None:
    path, record = made
    repo = Repository.open(path)
    assert repo.find(record.id).id == repo.find(record.id[:6]).id == repo.find("latest").id == record.id
    for text in ("", "zz", "../config", "0" * 64):
        with pytest.raises(UsageError):
            repo.find(text)
    assert record.cluster_size == CLUSTER

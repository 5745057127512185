"""What is there and cannot be read is not absent: notes of damage, records, pins."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from incbak.doctor.finding import Level
from incbak.doctor.repository import look_at_repository
from incbak.errors import DamagedError, DurabilityError
from incbak.repo import pins
from incbak.repo.check import NotNotedError, check, rebuild_index
from incbak.repo.damage import add_note
from incbak.repo.memory import Memory
from incbak.repo.pack import read_table
from incbak.repo.prune import Options, prune
from incbak.repo.remove import remove
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.unit.repo.scene import back_up, cluster, new, restore

CONTENT = [1, 2, 3]
WANTED = [cluster(n) for n in CONTENT]


def _moved(path: Path) -> None:
    """As a tool leaves it that has put the files elsewhere."""
    elsewhere = path.parent.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    path.rename(elsewhere / path.name)
    path.symlink_to(elsewhere / path.name)


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def _fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


ODDITIES: dict[str, Callable[[Path], None]] = {
    "moved": _moved,
    "dangling": _dangling,
    "fifo": _fifo,
    "folder": _folder,
}
oddly = pytest.mark.parametrize("how", ODDITIES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "repo"


def _only(path: Path, kind: str) -> Path:
    (name,) = Repository.open(path).storage.list(kind)
    return path / kind / name


def _damaged(path: Path) -> Repository:
    """A repository with a cluster that is damaged, and noted."""
    back_up(new(path), CONTENT)
    repo = Repository.open(path)
    pack = _only(path, "packs")
    first = read_table(repo.storage, pack.name, pack.stat().st_size)[0]
    data = bytearray(pack.read_bytes())
    data[int(first["offset"])] ^= 1
    pack.write_bytes(data)
    assert check(repo, read_data=True).damaged
    return Repository.open(path)


@pytest.mark.parametrize("how", [*ODDITIES, "empty"])
def test_a_note_of_damage_may_be_of_anything(path: Path, how: str) -> None:
    """A backup that took what is damaged for good would be a second one that cannot be restored."""
    repo = _damaged(path)
    note = _only(path, "damaged")
    ODDITIES.get(how, lambda p: p.write_bytes(b""))(note)
    assert repo.unsound(repo.backups()) == {repo.backups()[0].id}
    made = back_up(Repository.open(path), CONTENT)
    assert restore(Repository.open(path), made) == WANTED
    checked = check(Repository.open(path))
    assert [p.what for p in checked.serious if note.name in p.what and "check --read-data" in p.what]
    found = look_at_repository(path, Memory(path.parent / "state"), lambda: Repository.open(path))
    assert [f for f in found if f.level is Level.FAULT and note.name in f.text]
    assert note.is_symlink() or note.exists()


@oddly
def test_a_check_of_everything_knows_it_again(path: Path, how: str) -> None:
    repo = _damaged(path)
    note = _only(path, "damaged")
    ODDITIES[how](note)
    found = check(repo, read_data=True)
    assert note.name not in " ".join(p.what for p in found.serious)
    known = Repository.open(path).damage()
    assert (known.unknown, known.digests) == ({}, frozenset(found.damaged))


def test_a_note_that_cannot_be_removed_stays_unknown(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = _damaged(path)
    note = _only(path, "damaged")
    note.write_bytes(b"")

    def refused(*_: object) -> None:
        raise DurabilityError("no permission")

    monkeypatch.setattr(repo.storage, "remove", refused)
    with pytest.raises(NotNotedError) as told:
        check(repo, read_data=True)
    assert [p for p in told.value.report.serious if note.name in p.what and "check --read-data" in p.what]
    assert Repository.open(path).damage().unknown


@pytest.mark.parametrize("empty", [True, False])
@pytest.mark.parametrize("kind", ["backups", "index", "damaged", "condemned", "removed", "needs"])
def test_a_folder_in_the_place_of_a_file_can_be_got_rid_of(path: Path, kind: str, empty: bool) -> None:
    """By the command that the message names; what is in it stays, under a name that is not listed."""
    repo = new(path)
    back_up(repo, CONTENT)
    newest = back_up(repo, [7])
    stray = path / kind / ("ab" * 16)
    stray.mkdir()
    if not empty:
        (stray / "file").write_bytes(b"mine")
    if kind == "backups":
        assert remove(Repository.open(path), [stray.name], Options(grace=0.0)).trouble is None
    elif kind == "index":
        rebuild_index(Repository.open(path))
    elif kind == "damaged":
        check(Repository.open(path), read_data=True)
    elif kind == "removed":
        stray.rename(path / kind / "x")  # nothing replaces what is none of ours
    done = prune(Repository.open(path), Policy(last=1), options=Options(grace=0.0))
    assert (done.trouble, [d.record.id for d in done.decisions if d.keep]) == (None, [newest.id])
    assert not stray.exists()
    left = [p.read_bytes() for p in path.rglob("file")]
    assert left == ([] if empty else [b"mine"])
    assert len(list(path.rglob(".*.aside"))) == (0 if kind == "removed" else len(left))
    assert check(Repository.open(path), read_data=True).serious == []
    assert restore(Repository.open(path), newest) == [cluster(7)]


@pytest.mark.parametrize("how", [lambda p: p.mkdir(), lambda p: p.symlink_to("nowhere")], ids=["folder", "link"])
def test_what_is_no_pack_and_named_by_nothing_does_no_harm(path: Path, how: Callable[[Path], None]) -> None:
    back_up(new(path), CONTENT)
    how(path / "packs" / ("ab" * 16))
    found = check(Repository.open(path))
    assert (found.serious, [p.harmless for p in found.problems]) == ([], [True])


def test_no_policy_removes_a_backup_while_a_note_is_unknown(path: Path) -> None:
    """The newest may be the one that is damaged; an owner may still remove any by name."""
    repo = new(path)
    first, second = back_up(repo, [1]), back_up(repo, [2])
    add_note(repo.storage, set(), {second.id})
    prune(Repository.open(path), Policy(last=1), options=Options(grace=0.0))
    assert len(Repository.open(path).backups()) == 2
    _only(path, "damaged").write_bytes(b"")
    done = prune(Repository.open(path), Policy(last=1), options=Options(grace=0.0))
    assert [d.reasons for d in done.decisions] == [("no good backup",), ("last", "no good backup")]
    assert restore(Repository.open(path), first) == [cluster(1)]
    assert remove(Repository.open(path), [first.id], Options(grace=0.0)).trouble is None
    assert [r.id for r in Repository.open(path).backups()] == [second.id]


def test_a_pack_that_no_index_names_may_hold_the_only_copy(path: Path) -> None:
    """Of content that a note, which cannot be read, says is damaged elsewhere."""
    repo = new(path)
    back_up(repo, CONTENT)
    index = _only(path, "index")
    hidden = index.read_bytes(), index.name
    index.unlink()
    back_up(Repository.open(path), CONTENT)  # the same content once more
    add_note(repo.storage, {b"d" * 32}, set())
    _only(path, "damaged").write_bytes(b"")
    prune(Repository.open(path), Policy(last=9), options=Options(grace=0.0))
    assert len(Repository.open(path).storage.list("packs")) == 2
    (path / "index" / hidden[1]).write_bytes(hidden[0])
    assert check(Repository.open(path), read_data=True).damaged == set()


@oddly
def test_nothing_is_freed_that_a_record_may_need(path: Path, how: str) -> None:
    repo = new(path)
    moved = back_up(repo, CONTENT)
    back_up(repo, [7])
    ODDITIES[how](path / "backups" / moved.id)
    opened = Repository.open(path)
    assert [r.id for r in opened.backups()] != [moved.id]
    assert moved.id in opened.unreadable
    with pytest.raises(DamagedError, match="cannot be read"):
        prune(opened, Policy(last=1), options=Options(grace=0.0))
    assert [p for p in check(opened).serious if moved.id in p.backups]
    if how == "moved":
        link = path / "backups" / moved.id
        data = link.read_bytes()
        link.unlink()
        link.write_bytes(data)
        assert restore(Repository.open(path), moved) == WANTED


@oddly
def test_a_pin_is_a_pin_whatever_it_is(path: Path, how: str) -> None:
    repo = new(path)
    first = back_up(repo, CONTENT)
    back_up(repo, [7])
    assert pins.pin(repo.storage, first.id)
    ODDITIES[how](path / "pins" / first.id)
    prune(Repository.open(path), Policy(last=1), options=Options(grace=0.0))
    assert restore(Repository.open(path), first) == WANTED


@oddly
def test_a_pack_that_cannot_be_read_is_stored_again(path: Path, how: str) -> None:
    """It is listed, and nothing is built on it; bringing it back is enough for the old backup."""
    first = back_up(new(path), CONTENT)
    pack = _only(path, "packs")
    data = pack.read_bytes()
    ODDITIES[how](pack)
    found = check(Repository.open(path))
    assert [p for p in found.serious if pack.name in p.what]
    made = back_up(Repository.open(path), CONTENT)
    assert restore(Repository.open(path), made) == WANTED
    assert len(Repository.open(path).storage.list("packs")) == 2
    if how != "folder":
        pack.unlink()
        pack.write_bytes(data)
        assert restore(Repository.open(path), first) == WANTED


@oddly
def test_an_index_file_that_cannot_be_read_is_damaged(path: Path, how: str) -> None:
    back_up(new(path), CONTENT)
    index = _only(path, "index")
    ODDITIES[how](index)
    repo = Repository.open(path)
    assert repo.index.damaged == [index.name]
    with pytest.raises(DamagedError, match="index"):
        prune(repo, Policy(last=1), options=Options(grace=0.0))

"""Checks that go on where the last one stopped: in turn, never more than was read, whatever happens meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from blake3 import blake3

from incbak import durable
from incbak.errors import DurabilityError
from incbak.events import Event, Warned
from incbak.repo import check as checks
from incbak.repo import reading
from incbak.repo.check import Report, check
from incbak.repo.damage import add_note
from incbak.repo.repository import Repository
from incbak.repo.verified import LastCheck, Verified
from tests.unit.repo.scene import back_up, new

PACKS = 4


class Clock:
    """Each look is a day later."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A repository of `PACKS` packs."""
    repo = new(tmp_path / "repo")
    for number in range(PACKS):
        back_up(repo, [10 * number + 1, 10 * number + 3, 10 * number + 6])
    assert len(repo.storage.list("packs")) == PACKS
    repo.close()
    return tmp_path / "repo"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The packs whose data is read, in order."""
    names: list[str] = []
    whole = reading._one_pack

    def spy(repo: Repository, name: str, entries: object) -> object:
        names.append(name)
        return whole(repo, name, entries)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "_one_pack", spy)
    monkeypatch.setattr(reading, "_THREADS", 1)
    return names


def _night(path: Path, clock: Clock, **more: float) -> Report:
    """A check that has time for one pack only, on the next day."""
    clock.now += 86400
    repo = Repository.open(path)
    try:
        return check(repo, read_data=True, max_duration=0, clock=clock, **more)  # type: ignore[arg-type]
    finally:
        repo.close()


def _rot(path: Path, pack: str) -> None:
    """In place: the file's inode stays; its time of change is hidden from us, as rot's would be."""
    data = bytearray((path / "packs" / pack).read_bytes())
    data[20] ^= 1
    with (path / "packs" / pack).open("r+b") as f:
        f.write(data)


def test_each_night_the_pack_that_was_read_longest_ago(path: Path, read: list[str]) -> None:
    clock = Clock()
    for night in range(1, PACKS + 1):
        found = _night(path, clock).coverage
        assert (found.read_packs, found.complete) == (night, night == PACKS)
        assert found.within == (night - 1) * 86400
    assert sorted(read) == sorted(set(read))
    assert len(read) == PACKS
    for _ in range(PACKS):
        assert _night(path, clock).coverage.within == (PACKS - 1) * 86400
    assert read[PACKS:] == read[:PACKS]


def test_what_came_since_is_read_first_and_nothing_is_called_complete_before(path: Path, read: list[str]) -> None:
    clock = Clock()
    for _ in range(PACKS):
        _night(path, clock)
    repo = Repository.open(path)
    before = repo.storage.list("packs").keys()
    back_up(repo, [501, 503])
    (fresh,) = repo.storage.list("packs").keys() - before
    assert not Verified(repo.storage, clock).coverage().complete
    assert _night(path, clock).coverage.complete
    assert read[-1] == fresh


def test_an_unlimited_check_reads_all_and_counts_too(path: Path, read: list[str]) -> None:
    clock = Clock()
    repo = Repository.open(path)
    assert check(repo, read_data=True, clock=clock).coverage.complete
    assert len(read) == PACKS
    last = Verified(repo.storage, clock).last
    assert last is not None
    assert (last.at, last.packs, last.problems) == (clock.now, PACKS, 0)
    assert last.read == sum(repo.storage.list("packs").values()) - sum(
        64 + 16 + 56 * len(checks.pack.read_table(repo.storage, name, size))
        for name, size in repo.storage.list("packs").items()
    )


def test_a_check_without_data_marks_nothing(path: Path) -> None:
    repo = Repository.open(path)
    assert check(repo).coverage.read_packs == 0
    assert repo.storage.list("verified") == {}


def test_a_pack_with_damage_is_not_whole_and_no_night_forgets_it(path: Path, read: list[str]) -> None:
    """It takes its turn as the others do, or many such would be all that is ever read."""
    clock = Clock()
    name = sorted((path / "packs").iterdir())[0].name
    _rot(path, name)
    nights = [_night(path, clock) for _ in range(PACKS + 1)]
    seen = read.index(name)
    assert [bool(n.problems) for n in nights] == [i >= seen for i in range(PACKS + 1)]
    assert len(set(read[:PACKS])) == PACKS
    assert nights[-1].coverage.damaged == 1
    assert "as an earlier check has found" in next(p.what for p in nights[seen + 1].problems)
    assert Repository.open(path).damage().digests


def test_damage_that_was_mended_is_lifted_by_a_check_of_a_part(path: Path, read: list[str]) -> None:
    clock = Clock()
    name = sorted((path / "packs").iterdir())[0].name
    _rot(path, name)
    while name not in read:
        _night(path, clock)
    assert Repository.open(path).damage().digests
    _rot(path, name)
    found = _night(path, clock)
    assert found.problems == []
    assert found.coverage.read_packs < PACKS or name == read[-1]
    assert Repository.open(path).damage().digests == frozenset()


def test_a_damaged_pack_is_marked_after_its_damage_is_noted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the night that was killed in between would have read it in vain."""
    name = min((path / "packs").iterdir()).name
    _rot(path, name)
    repo = Repository.open(path)
    write = repo.storage.write

    def failing(kind: str, name: str, data: bytes) -> None:
        if kind == "damaged":
            raise DurabilityError("no room")
        write(kind, name, data)

    monkeypatch.setattr(repo.storage, "write", failing)
    with pytest.raises(DurabilityError):
        check(repo, read_data=True)
    found = Verified(repo.storage)
    assert found.coverage().read_packs == PACKS - 1
    assert found.read_at(name) == 0


def test_an_interrupted_check_keeps_what_it_has_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, count = reading._one_pack, 0

    def twice(repo: Repository, name: str, entries: object) -> object:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt
        return whole(repo, name, entries)  # type: ignore[arg-type]

    monkeypatch.setattr(reading, "_one_pack", twice)
    monkeypatch.setattr(reading, "_THREADS", 1)
    repo = Repository.open(path)
    with pytest.raises(KeyboardInterrupt):
        check(repo, read_data=True)
    assert Verified(repo.storage).coverage().read_packs == 2


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, b"0" * 64 + b"\n{}", b"[" * 100_000])
def test_garbage_says_nothing_and_goes(path: Path, content: bytes) -> None:
    clock = Clock()
    _night(path, clock)
    (good,) = (path / "verified").iterdir()
    good.write_bytes(content)
    found = _night(path, clock)
    assert (found.coverage.read_packs, found.problems) == (1, [])
    assert good.name not in [p.name for p in (path / "verified").iterdir()]


def test_one_flipped_bit_is_garbage(path: Path) -> None:
    clock = Clock()
    _night(path, clock)
    (good,) = (path / "verified").iterdir()
    whole = good.read_bytes()
    for at in range(0, len(whole), 7):
        good.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        assert Verified(Repository.open(path).storage, clock).coverage().read_packs == 0


def test_a_newer_version_is_left_alone(path: Path) -> None:
    repo = Repository.open(path)
    body = b'{"version":2,"anything":1}'
    repo.storage.write("verified", "a" * 32, blake3(body).hexdigest().encode() + b"\n" + body)
    check(repo, read_data=True)
    assert "a" * 32 in repo.storage.list("verified")


def test_a_copied_repository_was_not_read(path: Path, tmp_path: Path) -> None:
    check(Repository.open(path), read_data=True)
    shutil.copytree(path, tmp_path / "copy")
    assert Verified(Repository.open(tmp_path / "copy").storage).coverage().read_packs == 0
    assert Verified(Repository.open(path).storage).coverage().complete


def test_a_pack_that_was_put_back_was_not_read(path: Path) -> None:
    check(Repository.open(path), read_data=True)
    pack = next((path / "packs").iterdir())
    shutil.copy2(pack, path / "aside")
    shutil.copy2(path / "aside", pack)
    assert Verified(Repository.open(path).storage).coverage().read_packs == PACKS - 1


def test_a_time_in_the_future_counts_for_nothing(path: Path) -> None:
    clock = Clock()
    check(Repository.open(path), read_data=True, clock=clock)
    assert Verified(Repository.open(path).storage, lambda: clock.now - 10).coverage().read_packs == 0
    assert Verified(Repository.open(path).storage, lambda: clock.now + 10).coverage().within == 10


def test_two_checks_at_once_lose_nothing(path: Path) -> None:
    storage = Repository.open(path).storage
    names = sorted(storage.list("packs"))
    one, other = Verified(storage), Verified(storage)
    one.add(names[0], 5.0, one.look(names[0]), whole=True)
    other.add(names[0], 3.0, other.look(names[0]), whole=True)
    other.add(names[1], 4.0, other.look(names[1]), whole=True)
    one.save(LastCheck(5.0, 1, 1, 0))
    other.save(LastCheck(4.0, 2, 2, 0))
    both = Verified(storage)
    assert [both.read_at(n) for n in names[:2]] == [5.0, 4.0]
    assert both.last == LastCheck(5.0, 1, 1, 0)
    both.save()
    assert len(storage.list("verified")) == 1


def test_packs_that_went_are_forgotten(path: Path) -> None:
    repo = Repository.open(path)
    check(repo, read_data=True)
    gone = next((path / "packs").iterdir())
    gone.unlink()
    marks = Verified(repo.storage)
    assert marks.coverage().packs == PACKS - 1
    marks.save()
    (file,) = (path / "verified").iterdir()
    assert gone.name.encode() not in file.read_bytes()


def test_a_repository_that_cannot_be_written_is_read_all_the_same(path: Path) -> None:
    repo = Repository.open(path)
    told: list[Event] = []
    durable.arm(fault_at="durable.created:1+:EROFS")
    try:
        found = check(repo, read_data=True, report=told.append)
    finally:
        durable.arm()
    assert (found.problems, found.packs_read) == ([], PACKS)
    assert "not remembered" in next(e.text for e in told if isinstance(e, Warned))


def test_a_note_that_came_meanwhile_stays(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backup notes what it cannot read; the check that ran beside has not looked at that, and removes older ones."""
    repo = Repository.open(path)
    add_note(repo.storage, {b"h" * 32}, set())
    whole = checks._backups

    def beside(*args: object) -> object:
        add_note(repo.storage, set(), {"b" * 32})
        return whole(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(checks, "_backups", beside)
    check(repo, read_data=True)
    left = repo.damage()
    assert (left.digests, left.backups) == (set(), {"b" * 32})

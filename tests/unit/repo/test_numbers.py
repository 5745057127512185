"""The numbers of backups: given once, also when the newest backup is removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak.errors import DurabilityError
from incbak.events import Event, Warned
from incbak.repo import numbers
from incbak.repo.damage import add_note
from incbak.repo.digested import digested
from incbak.repo.prune import Options, prune
from incbak.repo.record import Record
from incbak.repo.remove import remove
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from incbak.sync.copy import Options as SyncOptions
from incbak.sync.copy import sync
from tests.unit.repo.scene import new
from tests.unit.repo.test_prune import made

FREE = Options(grace=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    new(tmp_path / "repo")
    return tmp_path / "repo"


def _backup(path: Path, content: list[int], vm: str = "vm", **more: object) -> Record:
    repo = Repository.open(path)
    return made(path, content, vm=vm, seq=numbers.last_number(repo.storage, repo.backups()) + 1, **more)


def _removed(path: Path, *ids: str) -> None:
    assert remove(Repository.open(path), ids, FREE).trouble is None


def _noted(path: Path) -> dict[str, int]:
    return numbers.removed_numbers(Repository.open(path).storage)


def test_a_number_is_not_given_again(path: Path) -> None:
    first, second, other = _backup(path, [1]), _backup(path, [2]), _backup(path, [3], vm="other")
    assert [r.seq for r in (first, second, other)] == [1, 2, 3]
    _removed(path, second.id, other.id)
    assert _noted(path) == {"vm": 2, "other": 3}
    third = _backup(path, [4])
    assert third.seq == 4
    _removed(path, third.id)
    assert _noted(path) == {"vm": 4, "other": 3}
    assert len(Repository.open(path).storage.list(numbers.KIND)) == 1


def test_nothing_is_noted_where_a_later_backup_stays(path: Path) -> None:
    first, _ = _backup(path, [1]), _backup(path, [2])
    _removed(path, first.id)
    prune(Repository.open(path), Policy(last=1), options=FREE)
    assert Repository.open(path).storage.list(numbers.KIND) == {}


def test_a_prune_that_removes_the_newest_notes_it(path: Path) -> None:
    """By a rule that goes by tags; it was damaged, so it is not the last good one."""
    first, newest = _backup(path, [1], tags=("keep",)), _backup(path, [2])
    add_note(Repository.open(path).storage, set(), {newest.id})
    prune(Repository.open(path), Policy(tags=("keep",)), options=FREE)
    assert [r.id for r in Repository.open(path).backups()] == [first.id]
    assert _noted(path) == {"vm": newest.seq}


def test_a_sync_goes_on_after_the_newest_was_removed(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    new(target)
    _backup(path, [1])
    second = _backup(path, [2])

    def synced() -> list[str]:
        done = sync(Repository.open(path), Repository.open(target), SyncOptions())
        assert not done.failed
        return [r.id for r in done.copied]

    assert len(synced()) == 2
    _removed(path, second.id)
    assert synced() == []
    third, fourth = _backup(path, [3]), _backup(path, [4])
    assert synced() == [third.id, fourth.id]
    assert [r.seq for r in Repository.open(target).backups()] == [1, 2, 3, 4]


def test_on_a_full_disk_the_backup_is_removed_all_the_same(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = _backup(path, [1])
    repo, events = Repository.open(path), list[Event]()

    def full(*_: object) -> None:
        raise DurabilityError("no space")

    monkeypatch.setattr(repo.storage, "write", full)
    numbers.forget(repo.storage, repo.backups(), [newest.id], events.append)
    assert repo.backups() == []
    assert [e for e in events if isinstance(e, Warned) and "no space" in e.text]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"rot",
        b"0" * 64 + b"\n{}",
        digested(b'{"version":2,"numbers":{"vm":7}}'),
        digested(b'{"version":1,"numbers":{"vm":7},"more":1}'),
        digested(b'{"version":1,"numbers":{"vm":-7}}'),
        digested(b'{"version":1,"numbers":{"vm":18446744073709551615}}'),
    ],
)
def test_what_cannot_be_read_says_nothing_and_stays(path: Path, content: bytes) -> None:
    """A newer incbak may know what it says."""
    files = [path / numbers.KIND / name for name in ("0" * 32, "stray")]
    for file in files:
        file.write_bytes(content)
    assert _noted(path) == {}
    _removed(path, _backup(path, [1]).id)
    assert _noted(path) == {"vm": 1}
    assert [file.read_bytes() for file in files] == [content] * 2


def test_the_number_is_durable_before_the_record_is_gone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newest = _backup(path, [1])
    repo, order = Repository.open(path), list[str]()
    for name in ("write", "remove_all"):
        real = getattr(repo.storage, name)
        monkeypatch.setattr(
            repo.storage,
            name,
            lambda kind, *rest, real=real, name=name: (order.append(f"{name} {kind}"), real(kind, *rest))[1],
        )
    numbers.forget(repo.storage, repo.backups(), [newest.id], lambda event: None)
    assert order == ["write removed", "remove_all removed", "remove_all backups"]

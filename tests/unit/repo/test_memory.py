"""What a host remembers of a repository, and what it notices by that."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from incbak.errors import DamagedError
from incbak.repo import record as records
from incbak.repo.memory import Memory
from incbak.repo.prune import Options, prune
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.unit.repo.scene import back_up, new, opened


@pytest.fixture
def memory(tmp_path: Path) -> Memory:
    return Memory(tmp_path / "state")


def _made(memory: Memory, path: Path, content: list[int]) -> str:
    repo = opened(path)
    record = back_up(repo, content)
    memory.remember(repo, record)
    assert memory.troubles(opened(path)) == []
    return record.id


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_repository_that_was_rolled_back_is_noticed(memory: Memory, tmp_path: Path, encrypted: bool) -> None:
    """faults rows 53 and 79."""
    path = tmp_path / "repo"
    new(path, encrypted=encrypted)
    _made(memory, path, [1, 2])
    shutil.copytree(path, tmp_path / "older")
    last = _made(memory, path, [3, 4])
    shutil.rmtree(path)
    (tmp_path / "older").rename(path)
    (said,) = memory.troubles(opened(path))
    assert said.startswith(f"backup {last[:8]} of vm, which this host made last, is gone")
    assert memory.troubles(opened(path), "another") == []
    _made(memory, path, [5])


def test_a_dropped_record_is_noticed(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "repo"
    new(path)
    _made(memory, path, [1])
    last = _made(memory, path, [2])
    (path / "backups" / last).unlink()
    assert "is gone" in memory.troubles(opened(path))[0]


def test_a_record_that_was_replaced_is_noticed(memory: Memory, tmp_path: Path) -> None:
    """In a repository that is not encrypted anybody can write a record that verifies."""
    path = tmp_path / "repo"
    new(path)
    last = _made(memory, path, [1])
    record = opened(path).record(last)
    forged = msgspec.structs.replace(record, tags=("forged",))
    (path / "backups" / last).write_bytes(records.encode(forged))
    assert "is not what it was" in memory.troubles(opened(path))[0]


def test_pruning_is_no_alarm(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "repo"
    new(path)
    _made(memory, path, [1])
    last = _made(memory, path, [2])
    repo = opened(path)
    repo.storage.remove("backups", last)
    memory.pruned(repo, [last])
    assert memory.troubles(opened(path)) == []


def test_a_prune_elsewhere_is_none_either(memory: Memory, tmp_path: Path) -> None:
    """Another host made a newer one, and pruned ours."""
    path = tmp_path / "repo"
    new(path)
    _made(memory, path, [1])
    back_up(opened(path), [2])
    prune(opened(path), Policy(last=1), options=Options(grace=0.0))
    assert len(opened(path).backups()) == 1
    assert memory.troubles(opened(path)) == []


def test_one_that_was_encrypted_and_is_not_is_refused(memory: Memory, tmp_path: Path) -> None:
    """Else the next backup would write in clear text into what somebody else has put there."""
    path = tmp_path / "repo"
    repo = new(path, encrypted=True)
    memory.note_place(path, repo.config)
    memory.refuse_downgrade(path, repo.config)
    path.rename(tmp_path / "away")
    fresh = new(path)
    with pytest.raises(DamagedError, match="was encrypted") as caught:
        memory.refuse_downgrade(path, fresh.config)
    assert repo.id in caught.value.hint
    fresh.close()
    memory.forget_place(path)
    memory.note_place(path, fresh.config)
    memory.refuse_downgrade(path, fresh.config)
    other = new(tmp_path / "plain")
    memory.refuse_downgrade(tmp_path / "plain", other.config)


def test_the_same_repository_without_its_cipher_is_refused_wherever_it_is(memory: Memory, tmp_path: Path) -> None:
    repo = new(tmp_path / "repo", encrypted=True)
    memory.note_place(tmp_path / "repo", repo.config)
    stripped = msgspec.structs.replace(repo.config, cipher="", proof="").sealed()
    with pytest.raises(DamagedError, match="was encrypted"):
        memory.refuse_downgrade(tmp_path / "elsewhere", stripped)


def test_what_is_strange_in_it_is_passed_over(memory: Memory, tmp_path: Path) -> None:
    path = tmp_path / "repo"
    new(path)
    _made(memory, path, [1])
    for file in (tmp_path / "state" / ".repositories").iterdir():
        file.write_bytes(b"\xff{")
    assert memory.troubles(opened(path)) == []
    memory.refuse_downgrade(path, Repository.look(path)[1])
    _made(memory, path, [2])

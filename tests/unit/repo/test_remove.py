"""Removal by name: exactly the chosen backups go, whatever a policy would keep; all others restore."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from incbak.errors import DamagedError, LockedError, UsageError
from incbak.repo import pins
from incbak.repo.prune import PRUNE_LOCK, Options
from incbak.repo.remove import Removal, choose, choose_all, remove
from incbak.repo.repository import REPOSITORY_LOCK, Repository
from tests.unit.repo.scene import new
from tests.unit.repo.test_prune import count, made, right

FREE = Options(grace=0.0)
CHILD = """
import sys
from pathlib import Path
from incbak.repo.prune import Options
from incbak.repo.remove import remove
from incbak.repo.repository import Repository
remove(Repository.open(Path(sys.argv[1])), [sys.argv[2]], Options(grace=0.0))
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A repository."""
    new(tmp_path / "repo")
    return tmp_path / "repo"


def removed(path: Path, *ids: str, options: Options = FREE) -> Removal:
    """Remove these from the repository, opened as a process of its own would."""
    return remove(Repository.open(path), ids, options)


def test_the_newest_goes_and_what_it_alone_needed(path: Path) -> None:
    kept, newest = made(path, [1, 2]), made(path, [2, 3, 4])
    done = removed(path, newest.id)
    assert (done.removed, done.trouble) == ((newest.id,), None)
    assert done.freed > 0
    right(path, (kept, [1, 2]))
    assert count(path, "packs") == 1


def test_within_the_grace_the_content_waits(path: Path) -> None:
    made(path, [1])
    newest = made(path, [3])
    done = removed(path, newest.id, options=Options(grace=100.0))
    assert done.freed == 0
    assert done.waiting > 0


def test_the_only_backup_goes(path: Path) -> None:
    """The last good one of a VM, which a prune always keeps."""
    only = made(path, [1])
    assert removed(path, only.id).trouble is None
    right(path)
    assert count(path, "packs") == 0


def test_all_of_a_vm_and_none_of_another(path: Path) -> None:
    made(path, [1], vm="one")
    other = made(path, [1, 2], vm="two")
    made(path, [3], vm="one")
    chosen = choose_all(Repository.open(path), "one")
    assert [each.record.vm for each in chosen if each.record] == ["one", "one"]
    assert removed(path, *(each.id for each in chosen)).trouble is None
    right(path, (other, [1, 2]))
    with pytest.raises(UsageError, match="no backup of one"):
        choose_all(Repository.open(path), "one")


def test_one_pinned_among_them_and_none_is_removed(path: Path) -> None:
    first, second = made(path, [1]), made(path, [2])
    pins.pin(Repository.open(path).storage, second.id)
    with pytest.raises(UsageError, match="pinned, so nothing was removed") as e:
        removed(path, first.id, second.id)
    assert f"incbak unpin {second.id[:8]}" in e.value.hint
    right(path, (first, [1]), (second, [2]))


def test_a_record_that_cannot_be_read_is_removed_by_name(path: Path) -> None:
    """And then a prune can free what no other backup needs."""
    kept, bad = made(path, [1]), made(path, [5])
    (path / "backups" / bad.id).chmod(0o600)
    (path / "backups" / bad.id).write_bytes(b"x")
    (chosen,) = choose(Repository.open(path), [bad.id[:8]])
    assert (chosen.id, chosen.record) == (bad.id, None)
    assert "does not verify" in chosen.why or bad.id[:8] in chosen.why
    assert removed(path, bad.id).trouble is None
    right(path, (kept, [1]))
    assert count(path, "packs") == 1


def test_what_remains_cannot_be_counted_and_its_content_stays(path: Path) -> None:
    """The chosen backup is gone; no pack is, since an unreadable record may need it."""
    bad, other, chosen = made(path, [1]), made(path, [2]), made(path, [3])
    (path / "backups" / bad.id).chmod(0o600)
    (path / "backups" / bad.id).write_bytes(b"x")
    done = removed(path, chosen.id)
    assert isinstance(done.trouble, DamagedError)
    assert sorted(Repository.open(path).storage.list("backups")) == sorted([bad.id, other.id])
    assert count(path, "packs") == 3


@pytest.mark.parametrize("text", ["", "latest", "../x", "A" * 8, "0", "abc", "f" * 32])
def test_what_names_no_backup_is_refused(path: Path, text: str) -> None:
    made(path, [1])
    with pytest.raises(UsageError):
        choose(Repository.open(path), [text])


def test_a_prefix_of_two_is_refused_and_two_names_of_one_are_one(path: Path) -> None:
    record = made(path, [1])
    twin = record.id[:8] + "0" * 24
    assert [c.id for c in choose(Repository.open(path), [record.id, record.id[:8]])] == [record.id]
    (path / "backups" / twin).write_bytes(b"x")
    with pytest.raises(UsageError, match="several backups begin"):
        choose(Repository.open(path), [record.id[:8]])


@pytest.mark.parametrize(("lock", "exclusive"), [(PRUNE_LOCK, True), (REPOSITORY_LOCK, True)])
def test_beside_a_prune_or_a_rebuild_nothing_is_removed(path: Path, lock: str, exclusive: bool) -> None:
    record = made(path, [1])
    repo = Repository.open(path)
    with repo.storage.lock(lock, exclusive=exclusive, wait=0):
        with pytest.raises(LockedError):
            removed(path, record.id)
    right(path, (record, [1]))


def test_a_pin_that_is_set_meanwhile_waits_for_the_removal(path: Path) -> None:
    """Nobody is told that a backup is pinned which is then removed: the lock of pins is held until it is gone."""
    record = made(path, [1])
    repo = Repository.open(path)
    removing = repo.storage.remove_all

    def pinned_meanwhile(kind: str, names: list[str]) -> None:
        if kind == "backups":
            with pytest.raises(LockedError), Repository.open(path).storage.lock("pins.lock", exclusive=True, wait=0):
                pass
        removing(kind, names)

    repo.storage.remove_all = pinned_meanwhile  # type: ignore[method-assign,assignment]
    remove(repo, [record.id], FREE)
    with pytest.raises(UsageError, match="is gone"):
        pins.pin(Repository.open(path).storage, record.id)


@pytest.mark.parametrize("point", ["remove.records-removed", "prune.counted", "prune.condemned", "durable.unlinked"])
def test_killed_at_any_step_the_others_restore_and_it_can_be_done_again(path: Path, point: str) -> None:
    kept, chosen = made(path, [1, 2]), made(path, [2, 3])
    command = [sys.executable, "-c", CHILD, str(path), chosen.id]
    ran = subprocess.run(command, env=durable_env(point), capture_output=True, timeout=60, check=False)
    assert ran.returncode == -9, ran
    assert removed(path, chosen.id).trouble is None
    right(path, (kept, [1, 2]))
    assert count(path, "packs") == 1


def durable_env(point: str) -> dict[str, str]:
    """The environment that kills a child at a crash point."""
    return {**os.environ, "INCBAK_CRASH_AT": point}

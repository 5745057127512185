"""What is damaged can be lived with: others go on, the way out is named, and what was healed is forgotten."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from incbak.errors import DamagedError, DurabilityError
from incbak.repo import columns, condemned, mapping
from incbak.repo import prune as module
from incbak.repo.check import NotNotedError, Report, check, rebuild_index
from incbak.repo.columns import StoredBytes
from incbak.repo.index import REBUILD
from incbak.repo.prune import Options, Outcome, prune
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.unit.repo.scene import CLUSTER, back_up, cluster, new, record_of, restore, store, writing

AT_ONCE = Options(grace=0.0)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    new(tmp_path / "repo")
    return tmp_path / "repo"


def again(path: Path) -> Repository:
    return Repository.open(path)


def of(path: Path, vm: str, content: list[int]) -> Record:
    """A backup of that VM."""
    repo = again(path)
    with writing(repo) as writer:
        update = repo.update(writer, None, len(content) * CLUSTER)
        digests = b"".join(store(writer, cluster(n)) for n in content)
        update.set(np.arange(len(content)), np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
        made = record_of(repo, {"vda": (len(content) * CLUSTER, update.finish())}, vm=vm)
        writer.commit(made)
    return made


def packs_of(path: Path, make: Callable[[], Record]) -> tuple[Record, list[Path]]:
    """A backup, and the packs that it added."""
    before = set((path / "packs").iterdir())
    made = make()
    return made, sorted(set((path / "packs").iterdir()) - before)


def spoil(file: Path, at: int | None = None) -> None:
    data = bytearray(file.read_bytes())
    file.chmod(0o600)
    data[len(data) // 3 if at is None else at] ^= 0xFF
    file.write_bytes(data)


def ids(path: Path) -> set[str]:
    return {name for name in again(path).storage.list("backups") if len(name) == 32}


def pruned(path: Path, vm: str | None = None) -> Outcome:
    return prune(again(path), Policy(last=1), vm, AT_ONCE)


# -- prune ---------------------------------------------------------------------------------------------------------


def test_an_unreadable_record_keeps_all_content_and_stops_no_other_vm(path: Path) -> None:
    bad, old, kept = of(path, "web1", [1]), of(path, "web2", [2]), of(path, "web2", [4])
    other = of(path, "web3", [5])
    spoil(path / "backups" / bad.id)
    packs = set((path / "packs").iterdir())
    done = pruned(path, "web2")
    assert isinstance(done.trouble, DamagedError)
    assert "no content was removed" in str(done.trouble)
    assert ids(path) == {bad.id, kept.id, other.id}
    assert set((path / "packs").iterdir()) == packs
    assert done.freed == done.condemned == 0
    spoil(path / "backups" / bad.id)
    done = pruned(path)
    assert (done.trouble, done.freed > 0) == (None, True)
    assert restore(again(path), again(path).record(bad.id)) == [cluster(1)]
    assert old.id not in ids(path)


def test_damage_in_one_vm_keeps_its_backups_and_stops_no_other(path: Path) -> None:
    (bad, (pack,)), newer = packs_of(path, lambda: of(path, "web1", [1, 3])), of(path, "web1", [1, 3, 5])
    newest = of(path, "web1", [1, 3, 6])
    old, kept = of(path, "web2", [2]), of(path, "web2", [4])
    pack.rename(path / "away")
    packs = set((path / "packs").iterdir())
    done = pruned(path)
    assert "no content was removed" in str(done.trouble)
    assert ids(path) == {bad.id, newer.id, newest.id, kept.id}
    assert set((path / "packs").iterdir()) == packs
    assert {d.record.id for d in done.decisions if not d.keep} == {old.id}
    (path / "away").rename(pack)
    assert pruned(path).trouble is None
    assert ids(path) == {newest.id, kept.id}
    assert restore(again(path), newest) == [cluster(n) for n in (1, 3, 6)]


def test_an_older_backup_stays_beside_one_that_is_hurt(path: Path) -> None:
    """The newest is good, but what is kept before it is not: what would go may be wanted in its place."""
    old, (_, (pack,)) = of(path, "web1", [2]), packs_of(path, lambda: of(path, "web1", [1, 3]))
    of(path, "web1", [6])
    gone = of(path, "web2", [4])
    for _ in range(2):
        of(path, "web2", [4])
    pack.unlink()
    done = prune(again(path), Policy(last=2), None, AT_ONCE)
    assert done.trouble
    assert {d.record.id for d in done.decisions if not d.keep} == {gone.id}
    assert old.id in ids(path)
    assert gone.id not in ids(path)


def test_where_there_is_no_other_vm_nothing_is_removed(path: Path) -> None:
    bad, first, second = of(path, "web1", [1]), of(path, "web1", [2]), of(path, "web1", [4])
    spoil(path / "backups" / bad.id)
    with pytest.raises(DamagedError, match="nothing was removed"):
        pruned(path)
    assert ids(path) == {bad.id, first.id, second.id}


@pytest.mark.parametrize("how", ["rot", "table", "cut", "missing"])
def test_what_was_healed_is_forgotten(path: Path, how: str) -> None:
    """A pack of which everything was stored again goes at the next prune, and no check tells of it any more."""
    first, (pack,) = packs_of(path, lambda: back_up(again(path), [1, 3, 6]))
    if how == "rot":
        spoil(pack, 5000)
    elif how == "table":
        spoil(pack, pack.stat().st_size - 80)
    elif how == "cut":
        os.truncate(pack, 40)
    else:
        pack.unlink()
    assert check(again(path), read_data=True).serious
    back_up(again(path), [1, 3, 6])
    assert restore(again(path), first) == [cluster(n) for n in (1, 3, 6)]
    assert prune(again(path), Policy(last=5), None, AT_ONCE).trouble is None
    assert not pack.exists()
    found = check(again(path), read_data=True)
    assert found.problems == []
    assert found.coverage.damaged == 0
    assert restore(again(path), first) == [cluster(n) for n in (1, 3, 6)]


def test_one_of_two_copies_is_no_problem_and_the_last_one_never_goes(path: Path) -> None:
    first, (pack,) = packs_of(path, lambda: back_up(again(path), [1, 3, 6]))
    spoil(pack, 5000)
    check(again(path), read_data=True)
    done = prune(again(path), Policy(last=5), None, AT_ONCE)
    assert pack.exists()
    assert done.freed == 0
    back_up(again(path), [1, 3, 6])
    found = check(again(path), read_data=True)
    assert found.problems
    assert found.serious == []
    assert first.id in ids(path)


def full_for(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    real, left = condemned.condemn, [times]

    def condemn(*args: object) -> str:
        if left[0]:
            left[0] -= 1
            raise DurabilityError("no room") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "condemn", condemn)


@pytest.mark.parametrize("times", [1, 2])
def test_a_disk_without_room_for_a_condemnation_is_freed(
    path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    old, (pack,) = packs_of(path, lambda: back_up(again(path), [1, 3]))
    kept = back_up(again(path), [6])
    full_for(monkeypatch, times)
    done = pruned(path)
    assert not pack.exists()
    assert done.freed > 0
    assert times == 2 or "had no room" in str(done.trouble)
    assert done.trouble
    assert pruned(path).trouble is None
    assert check(again(path), read_data=True).problems == []
    assert restore(again(path), kept) == [cluster(6)]
    assert old.id not in ids(path)


def test_with_a_grace_it_waits_for_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (pack,) = packs_of(path, lambda: back_up(again(path), [1, 3]))
    back_up(again(path), [6])
    full_for(monkeypatch, 1)
    done = prune(again(path), Policy(last=1), None, Options(grace=60.0))
    assert isinstance(done.trouble, DurabilityError)
    assert pack.exists()


# -- the index -------------------------------------------------------------------------------------------------------


def hints(path: Path, record: Record) -> tuple[Report, DamagedError]:
    with pytest.raises(DamagedError) as refused:
        restore(again(path), record)
    return check(again(path)), refused.value


@pytest.mark.parametrize("how", ["gone", "damaged", "empty"])
def test_a_lost_index_is_called_that_and_made_anew(path: Path, how: str) -> None:
    record = back_up(again(path), [1, 3])
    (file,) = (path / "index").iterdir()
    if how == "gone":
        file.unlink()
    elif how == "damaged":
        spoil(file)
    else:
        os.truncate(file, 0)
    found, error = hints(path, record)
    assert found.hint == REBUILD == error.hint
    if how == "gone":
        assert "1 packs are there that no index names" in str(error)
        assert any("rebuild-index" in p.what for p in found.problems)
    else:
        assert file.name in str(error)
    repo = again(path)
    repo.index.refresh()
    rebuild_index(repo)
    assert check(repo).problems == check(again(path)).problems == []
    assert restore(again(path), record) == [cluster(1), cluster(3)]


def test_packs_of_a_killed_run_are_no_reason_to_doubt(path: Path) -> None:
    with writing(again(path)) as writer:
        store(writer, cluster(3))
        stream = writer._storage.stream("packs")
        stream.append([b"x" * 100])
        stream.commit("0" * 32)
    back_up(again(path), [1])
    found = check(again(path))
    assert not any("no index names" in p.what for p in found.problems)


def test_an_index_that_the_storage_cannot_read_is_an_error_and_not_a_signal(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = back_up(again(path), [1])

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(columns.os, "preadv", failing)
    found, error = hints(path, record)
    assert "cannot be read: Input/output error" in str(error)
    assert error.hint == found.hint == REBUILD


@pytest.mark.parametrize("size", [100, mapping.IN_MEMORY, mapping.IN_MEMORY + 1, 3 * mapping.IN_MEMORY + 7])
def test_small_files_are_held_and_large_ones_read_in_slices(path: Path, size: int) -> None:
    storage = again(path).storage
    content = np.random.default_rng(size).bytes(size)
    storage.write("packs", "a" * 32, content)
    found = mapping.opened(storage, "packs", "a" * 32)
    assert found[:].tobytes() == content
    assert isinstance(found, StoredBytes) == (size > mapping.IN_MEMORY)


# -- a repository that cannot be written -----------------------------------------------------------------------------


def test_damage_is_in_the_error_where_it_cannot_be_noted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, (pack,) = packs_of(path, lambda: back_up(again(path), [1, 3, 6]))
    spoil(pack, 5000)
    repo = again(path)

    def refuse(*_: object) -> None:
        raise DurabilityError("read-only")

    monkeypatch.setattr(repo.storage, "write", refuse)
    for read_data in (True, False):
        if not read_data:
            os.truncate(pack, 100)
        with pytest.raises(NotNotedError) as refused:
            check(repo, read_data=read_data)
        assert refused.value.report.serious


# -- files that are not ours, and files that cannot be read -----------------------------------------------------------


def test_stray_files_stop_nothing_and_stay(path: Path) -> None:
    old, kept = back_up(again(path), [1, 6]), back_up(again(path), [3])
    strays = [path / kind / name for kind in ("packs", "index", "backups") for name in ("README", f"{kept.id}.bak")]
    for stray in strays:
        stray.write_bytes(b"x")
    found = check(again(path), read_data=True)
    assert (len(found.problems), found.serious) == (len(strays), [])
    assert pruned(path).trouble is None
    repo = again(path)
    assert [r.id for r in repo.backups()] == [kept.id]
    assert repo.unreadable == {}
    rebuild_index(repo)
    assert restore(again(path), kept) == [cluster(3)]
    assert all(stray.exists() for stray in strays)
    assert old.id not in ids(path)


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_record_that_the_storage_cannot_read_is_one_of_many(
    path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    bad, good = of(path, "web1", [1]), of(path, "web2", [2])
    repo = again(path)
    read = repo.storage.read

    def failing(kind: str, name: str, limit: int) -> bytes:
        if name == bad.id:
            raise OSError(code, os.strerror(code))
        return read(kind, name, limit)

    monkeypatch.setattr(repo.storage, "read", failing)
    assert [r.id for r in repo.backups()] == [good.id]
    assert os.strerror(code) in repo.unreadable[bad.id]


def test_what_may_not_be_the_latest_is_told(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good, newest = back_up(again(path), [1]), back_up(again(path), [2])
    assert again(path).find("latest").id == newest.id
    assert not caplog.records
    spoil(path / "backups" / newest.id)
    assert again(path).find("latest").id == good.id
    assert "may not be the latest" in caplog.text
    assert newest.id in caplog.text
    spoil(path / "backups" / good.id)
    with pytest.raises(DamagedError, match="no backup that can be read"):
        again(path).find("latest")

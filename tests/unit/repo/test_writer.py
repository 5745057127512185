"""The write order: whatever step dies or fails, every listed backup is whole and the next backup works."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from incbak import durable
from incbak.errors import BackupError, DurabilityError, IncbakError, LockedError
from incbak.repo import blob, pack, repository, tree
from incbak.repo import writer as module
from incbak.repo.check import check
from incbak.repo.repository import Repository
from tests.unit.repo.scene import back_up, cluster, new, record_of, restore, store, writing

FIRST, SECOND = [1, 2, 3, 0, 5], [1, 2, 33, 0, 55, 66]
POINTS = [
    "repo.append",
    "repo.pack-full",
    "repo.packs-durable",
    "repo.index-durable",
    "repo.locks-checked",
    "repo.record-durable",
    *("durable." + step for step in ("created", "written", "synced", "named", "dir-synced")),
]
CHILD = """
import sys
from pathlib import Path
from incbak.repo import pack
from incbak.repo.repository import Repository
from tests.unit.repo.scene import back_up
pack.TARGET = 8000
back_up(Repository.open(Path(sys.argv[1])), [int(n) for n in sys.argv[2].split(",")])
"""


def _whole(path: Path) -> list[list[bytes]]:
    """Content of all listed backups, read through a fresh repository; nothing is damaged."""
    repo = Repository.open(path)
    content = [restore(repo, r) for r in repo.backups()]
    assert repo.unreadable == {}
    assert check(repo, read_data=True).problems == []
    return content


def _content(numbers: list[int]) -> list[bytes]:
    return [cluster(n) for n in numbers]


CRASHES = [(point, count) for point in POINTS for count in (1, 2, 3) if count < 3 or point.startswith("durable.")]


@pytest.mark.parametrize(("point", "count"), CRASHES)
def test_killed_anywhere_the_repository_is_whole(tmp_path: Path, point: str, count: int) -> None:
    """faults rows 14, 17, 19, I3: SIGKILL at each step; then a second backup of the same."""
    path = tmp_path / "repo"
    back_up(new(path), FIRST)
    environment = {**os.environ, "INCBAK_CRASH_AT": f"{point}:{count}", "PYTHONPATH": str(Path(__file__).parents[3])}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(path), ",".join(map(str, SECOND))],
        env=environment,
        timeout=60,
        check=False,
    )
    assert child.returncode in (0, -signal.SIGKILL)
    assert child.returncode or count == 3 or (point.startswith("repo.") and count > 1), "the point was come by"
    listed = _whole(path)
    assert listed[0] == _content(FIRST)
    assert listed[1:] in ([], [_content(SECOND)])
    if point == "repo.record-durable" and count == 1:
        assert len(listed) == 2
    elif count == 1:
        assert len(listed) == 1
    repo = Repository.open(path)
    back_up(repo, SECOND)
    assert _whole(path)[-1] == _content(SECOND)


FAULTS = ["repo.append", "durable.written", "durable.synced", "repo.pack-full", "repo.packs-durable", "durable.named"]


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("count", ["1", "2", "1+"])
@pytest.mark.parametrize("point", FAULTS)
def test_a_step_that_fails_makes_no_backup_and_spoils_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, count: str, code: str
) -> None:
    """faults rows 28, 31, 32: once and for good; space comes back with the next run."""
    monkeypatch.setattr(pack, "TARGET", 8000)
    path = tmp_path / "repo"
    repo = new(path)
    back_up(repo, FIRST)
    durable.arm(fault_at=f"{point}:{count}:{code}")
    made, said = True, ""
    try:
        back_up(repo, SECOND)
    except (IncbakError, OSError) as e:
        made, said = False, str(e)
    durable.arm()
    assert made or code == "EIO" or "space" in said
    listed = _whole(path)
    assert listed[0] == _content(FIRST)
    if made:
        assert listed[1] == _content(SECOND)
    else:
        assert listed[1:] in ([], [_content(SECOND)])
    assert not list(path.glob("*/.*"))
    back_up(repo, SECOND)
    assert _whole(path)[-1] == _content(SECOND)


def test_the_order_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pack is synced, named and its folder synced before an index names it; that before the record."""
    monkeypatch.setattr(pack, "TARGET", 8000)
    repo = new(tmp_path / "repo")
    steps: list[str] = []
    for name in ("fsync", "link"):
        real = getattr(os, name)

        def spy(*args: object, _name: str = name, _real: object = real) -> object:
            where = os.readlink(f"/proc/self/fd/{args[0]}") if _name == "fsync" else str(args[1])
            kind = "dir" if os.path.isdir(where) else "file"
            folder = Path(where).name if kind == "dir" else Path(where).parent.name
            steps.append(f"{'sync' if _name == 'fsync' else 'name'} {kind} {folder}")
            return _real(*args)  # type: ignore[operator]

        monkeypatch.setattr(os, name, spy)
    back_up(repo, SECOND)
    assert [s for s in steps if s.startswith("name")] == [
        *["name file packs"] * (len(steps) // 3 - 2),
        "name file index",
        "name file backups",
    ]
    for i in range(0, len(steps), 3):
        folder = steps[i].split()[-1]
        assert steps[i : i + 3] == [f"sync file {folder}", f"name file {folder}", f"sync dir {folder}"]


def test_the_first_failure_is_final(tmp_path: Path) -> None:
    """faults row 31: a caller that goes on after a failed write cannot commit."""
    repo = new(tmp_path / "repo")
    with writing(repo) as writer:
        store(writer, cluster(1))
        durable.arm(fault_at="repo.pack-full:1:EIO")
        with pytest.raises((IncbakError, OSError)):
            writer.finish()
        durable.arm()
        made = record_of(repo, {"vda": (4096, bytes(32))})
        with pytest.raises(DurabilityError, match="an earlier write of this backup failed"):
            store(writer, cluster(2))
        with pytest.raises(DurabilityError, match="an earlier write of this backup failed"):
            writer.commit(made)
    assert repo.backups() == []


@pytest.mark.parametrize("lock", ["vm-vm.lock", "repository.lock"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_lock_that_went_stops_the_commit(tmp_path: Path, lock: str, how: str) -> None:
    """faults rows 6, 51, L15: suspended for long, the run looks again before it commits."""
    repo = new(tmp_path / "repo")
    path = tmp_path / "repo" / "locks" / lock

    def spoil(_writer: object) -> None:
        path.unlink()
        if how == "replaced":
            path.write_bytes(b"")

    with pytest.raises(LockedError, match="removed or replaced"):
        back_up(repo, FIRST, spoil)
    assert repo.backups() == []
    back_up(repo, FIRST)
    assert _whole(tmp_path / "repo") == [_content(FIRST)]


def test_one_run_per_vm_and_several_vms_at_once(tmp_path: Path) -> None:
    """faults rows 47, 48."""
    repo = new(tmp_path / "repo")
    with repo.vm_lock("a"), repo.vm_lock("b"):
        with pytest.raises(LockedError), repo.vm_lock("a"):
            pass
        with repo.vm_lock("../a"):
            pass
    assert not (tmp_path / "repo" / "vm-a.lock").exists()


def test_the_index_is_not_made_anew_beside_a_backup(tmp_path: Path) -> None:
    """It could remove the index file that the backup has just written. Backups of two VMs share the lock."""
    repo = new(tmp_path / "repo")
    with repo.vm_lock("a"), repo.vm_lock("b"):
        with pytest.raises(LockedError), repo.storage.lock("repository.lock", exclusive=True, wait=0):
            pass
    with repo.storage.lock("repository.lock", exclusive=True, wait=0):
        with pytest.raises(LockedError), repo.vm_lock("a"):
            pass


def test_two_writers_at_once_lose_nothing(tmp_path: Path) -> None:
    """faults row 48: two runs of two VMs with the same content, side by side."""
    path = tmp_path / "repo"
    new(path)

    def run(vm: str) -> None:
        repo = Repository.open(path)
        for turn in range(3):
            with repo.vm_lock(vm) as still, repo.writer(still) as writer:
                update = repo.update(writer, None, 3 * 4096)
                digests = b"".join(store(writer, cluster(n + turn)) for n in (1, 2, 3))
                update.set(np.arange(3), np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32))
                writer.commit(record_of(repo, {"vda": (3 * 4096, update.finish())}, vm=vm))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ["a", "b"]))
    listed = _whole(path)
    assert len(listed) == 6
    assert sorted(listed) == sorted(_content([n + t for n in (1, 2, 3)]) for t in range(3) for _ in "ab")


def test_no_two_backups_have_bitmaps_of_one_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """I6: a bitmap is named after the first 8 digits, and would be believed for the wrong base."""
    repo = new(tmp_path / "repo")
    first = back_up(repo, FIRST)
    drawn = iter([first.id, first.id[:8] + 24 * "0", "f" * 32])
    monkeypatch.setattr(repository, "new_id", lambda: next(drawn))
    assert repo.new_backup_id() == "f" * 32


def test_content_is_stored_once_in_a_run_and_between_runs(tmp_path: Path) -> None:
    repo = new(tmp_path / "repo")
    seen: list[int] = []
    back_up(repo, [1, 1, 2, 0, 0, 1], lambda w: seen.append(w.blobs))  # type: ignore[attr-defined]
    back_up(repo, [2, 1, 7], lambda w: seen.append(w.blobs))  # type: ignore[attr-defined]
    assert seen == [3, 2], "two clusters and a page; one cluster and a page"


def test_a_large_run_spills_its_index_and_has_what_it_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded: index files are written in between, and nothing is stored twice because of it."""
    monkeypatch.setattr(pack, "TARGET", 20000)
    monkeypatch.setattr(module, "SPILL", 4)
    repo = new(tmp_path / "repo")
    numbers = list(range(3, 90, 3))
    seen: list[int] = []
    made = back_up(repo, numbers + numbers, lambda w: seen.append(w.blobs))  # type: ignore[attr-defined]
    assert seen == [len(numbers) + 1]
    assert restore(repo, made) == _content(numbers + numbers)
    assert len(repo.storage.list("index")) > 2


def test_content_noted_as_damaged_is_stored_again_once(tmp_path: Path) -> None:
    repo = new(tmp_path / "repo")
    back_up(repo, [1, 2])
    digest = blob.digest_of(cluster(1))
    repo.storage.write("damaged", "0" * 32, b'{"digests":["%s"],"backups":[]}' % digest.hex().encode())
    with writing(repo) as writer:
        assert not writer.trusts_bases
        for _ in range(2):
            store(writer, cluster(1))
            store(writer, cluster(2))
        assert writer.blobs == 1


def test_a_writer_that_is_given_up_leaves_no_temporary_file(tmp_path: Path) -> None:
    repo = new(tmp_path / "repo")
    with pytest.raises(KeyboardInterrupt), writing(repo) as writer:
        store(writer, cluster(1))
        raise KeyboardInterrupt
    assert list((tmp_path / "repo" / "packs").iterdir()) == []


def test_a_page_that_does_not_decode_to_itself_stops_the_backup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults row 86: a page that is wrong costs more than a cluster."""
    repo = new(tmp_path / "repo")
    real = blob.encode

    def faulty(data: bytes | memoryview, level: int = 1) -> tuple[int, bytes | memoryview]:
        return real(bytes([data[0] ^ 1]) + data[1:] if len(data) == tree.PAGE else data, level)

    monkeypatch.setattr(blob, "encode", faulty)
    with pytest.raises(BackupError, match="came out wrong"):
        back_up(repo, [1, 2])
    assert repo.backups() == []

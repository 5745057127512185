"""A prune that is killed, or that runs out of space: every listed backup restores, and the next prune goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import incbak.repo.prune
from incbak import durable
from incbak.errors import IncbakError
from incbak.repo import pins
from incbak.repo.check import check, rebuild_index
from incbak.repo.condemned import read_condemned
from incbak.repo.needs import Needs
from incbak.repo.prune import Options, Outcome, prune
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from tests.kit.need import need_root
from tests.unit.repo.scene import back_up, cluster, new, restore

CHILD = """
import sys
from pathlib import Path
from incbak.repo.prune import Options, prune
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
done = prune(Repository.open(Path(sys.argv[1])), Policy(last=2), None, Options(grace=0.0))
sys.exit(f"trouble: {done.trouble}" if done.trouble else 0)
"""
CONTENT: dict[str, Sequence[int]] = {
    "condemned already": [1, 2],
    "all garbage": [50, 51],
    "mostly garbage": list(range(3, 11)),
    "kept": [10, 11],
    "newest": [12],
}
POINTS = sorted(p for p in durable.POINTS if p.startswith("prune."))
TWICE = ("prune.packs-removed", "prune.index-written", "prune.index-done", "prune.expired", "prune.condemn")
CRASHES = [
    *((point, 1) for point in POINTS),
    *((point, 2) for point in POINTS if point.startswith(TWICE)),
    *((f"durable.{step}", count) for step in ("created", "named", "dir-synced") for count in (1, 2, 3)),
    *(("durable.unlinked", count) for count in range(1, 9)),
    *(("repo." + step, 1) for step in ("append", "pack-full", "packs-durable", "index-durable")),
]


@pytest.fixture
def backups(tmp_path: Path) -> dict[str, Record]:
    """A repository in which a prune goes through all its steps, some of them twice, with one file as its index."""
    path = tmp_path / "repo"
    new(path)
    found = {name: back_up(Repository.open(path), list(numbers)) for name, numbers in CONTENT.items()}
    for name in ("all garbage", "mostly garbage"):
        pins.pin(Repository.open(path).storage, found[name].id)
    assert again(path, grace=1e6, below=0.0).trouble is None
    for name in ("all garbage", "mostly garbage"):
        pins.unpin(Repository.open(path).storage, found[name].id)
    assert len(read_condemned(Repository.open(path).storage).packs) == 1
    rebuild_index(Repository.open(path))
    return found


def again(path: Path, *, last: int = 2, grace: float = 0.0, below: float = 0.5) -> Outcome:
    """A prune that is not disturbed."""
    return prune(Repository.open(path), Policy(last=last), None, Options(grace=grace, repack_below=below))


def whole(path: Path, backups: dict[str, Record]) -> list[str]:
    """The names of the backups that are listed: each restores, and a check finds nothing."""
    repo = Repository.open(path)
    names = {record.id: name for name, record in backups.items()}
    listed = [names[r.id] for r in repo.backups()]
    for name in listed:
        assert restore(repo, backups[name]) == [cluster(n) for n in CONTENT[name]]
    assert check(Repository.open(path), read_data=True).problems == []
    return listed


def tidy(path: Path) -> None:
    """Nothing is left that nobody needs."""
    repo = Repository.open(path)
    assert repo.storage.list("condemned") == {}
    needs = Needs(repo, anew=True)
    needs.count(repo.backups())
    weights = needs.weights()
    assert weights.keys() == repo.storage.list("packs").keys()
    assert all(weights.values())


@pytest.mark.parametrize(("point", "count"), CRASHES)
def test_killed_anywhere_every_listed_backup_restores(
    tmp_path: Path, backups: dict[str, Record], point: str, count: int
) -> None:
    """faults row 15: SIGKILL at each step; then a backup of what was being removed; then the next prune."""
    path = tmp_path / "repo"
    environment = {**os.environ, "INCBAK_CRASH_AT": f"{point}:{count}", "PYTHONPATH": str(Path(__file__).parents[3])}
    child = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=environment, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL, "the point was come by"
    listed = whole(path, backups)
    assert listed[-2:] == ["kept", "newest"]
    after = back_up(Repository.open(path), [1, 50, 3, 4])
    assert again(path, last=3).trouble is None
    repo = Repository.open(path)
    assert [r.id for r in repo.backups()] == [backups["kept"].id, backups["newest"].id, after.id]
    assert restore(repo, after) == [cluster(n) for n in (1, 50, 3, 4)]
    assert again(path).trouble is None
    repo.storage.remove("backups", after.id)
    assert whole(path, backups) == ["newest"]
    assert again(path).trouble is None
    tidy(path)


def test_all_steps_are_killed() -> None:
    assert {point for point, _ in CRASHES if point.startswith("prune.")} == set(POINTS)
    assert len(POINTS) >= 10
    assert incbak.repo.prune.__doc__


@pytest.mark.parametrize("code", ["ENOSPC", "EIO"])
@pytest.mark.parametrize("count", ["1", "2", "3", "1+"])
@pytest.mark.parametrize("point", ["durable.created", "durable.written", "durable.synced", "repo.append"])
def test_a_write_that_fails_removes_nothing_that_is_needed(
    tmp_path: Path, backups: dict[str, Record], point: str, count: str, code: str
) -> None:
    """faults row 28: it is told, and the next prune goes on."""
    path = tmp_path / "repo"
    durable.arm(fault_at=f"{point}:{count}:{code}")
    trouble: Exception | None
    try:
        trouble = again(path).trouble
    except (IncbakError, OSError) as e:
        trouble = e
    durable.arm()
    assert trouble is None or code == "EIO" or os.strerror(errno.ENOSPC) in str(trouble)
    assert trouble is not None or (point, count) in [("repo.append", "2"), ("repo.append", "3")]
    assert whole(path, backups)[-2:] == ["kept", "newest"]
    assert again(path).trouble is None
    assert whole(path, backups) == ["kept", "newest"]
    tidy(path)


@pytest.mark.root
def test_on_a_full_disk_it_makes_room(tmp_path: Path) -> None:
    """What is wholly garbage goes first, which needs no more space than the records gave back; then there is some for
    the rest."""
    need_root()
    mount = tmp_path / "mount"
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "incbak-test", mount], check=True)
    try:
        path = mount / "repo"
        new(path)
        backups = [back_up(Repository.open(path), [3 * (20 * turn + n + 1) for n in range(20)]) for turn in range(3)]
        mixed = back_up(Repository.open(path), [3, 6])
        with (mount / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError):
            while True:
                filler.write(bytes(4096))
        assert os.statvfs(mount).f_bavail == 0
        with pytest.raises(IncbakError):
            back_up(Repository.open(path), [999, 1002])
        done = prune(Repository.open(path), Policy(last=1), None, Options(grace=0.0))
        assert done.trouble is None
        assert done.freed > 200_000
        repo = Repository.open(path)
        assert [r.id for r in repo.backups()] == [mixed.id]
        assert restore(repo, mixed) == [cluster(3), cluster(6)]
        assert backups[0].id not in repo.storage.list("backups")
        assert check(repo, read_data=True).problems == []
        assert restore(repo, back_up(repo, [999, 1002])) == [cluster(999), cluster(1002)]
    finally:
        subprocess.run(["umount", "-l", mount], check=True)

"""What is remembered of drills: durable, never more than there was, and nothing of a repository that was copied."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest
from blake3 import blake3

from incbak import durable
from incbak.errors import DurabilityError
from incbak.repo.drills import KEPT, KIND, Drill, add_drill, drills_of, read_drills
from incbak.repo.ids import new_id
from incbak.repo.repository import Repository
from tests.unit.repo.scene import new


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return new(tmp_path / "repo")


def made(at: float, vm: str = "vm", **more: object) -> Drill:
    fields = {"backup": "b" * 32, "seconds": 1.0, "sample": 100.0, "seed": 1, "exit_code": 0, **more}
    return Drill(vm=vm, at=at, **fields)  # type: ignore[arg-type]


def _times(repo: Repository, vm: str = "vm") -> list[float]:
    return [each.at for each in read_drills(repo.storage) if each.vm == vm]


def test_the_last_one_and_the_last_good_one(repo: Repository) -> None:
    assert drills_of(read_drills(repo.storage), "vm") == drills_of([], "vm")
    for at, problems in ((30.0, ()), (20.0, ()), (40.0, ("no luck",)), (50.0, ())):
        vm = "other" if at == 50.0 else "vm"
        add_drill(repo.storage, made(at, vm, problems=problems, exit_code=int(bool(problems))))
    found = drills_of(read_drills(Repository.open(repo.storage.root).storage), "vm")
    assert found.last
    assert found.good
    assert (found.last.at, found.last.good, found.good.at) == (40.0, False, 30.0)


def test_old_ones_go_but_for_the_last_good_one(repo: Repository) -> None:
    add_drill(repo.storage, made(1.0, "other"))
    for at in range(1, KEPT + 6):
        add_drill(repo.storage, made(float(at), exit_code=int(at > 2), problems=("no luck",) if at > 2 else ()))
    assert _times(repo) == [2.0, *range(6, KEPT + 6)]
    assert _times(repo, "other") == [1.0]
    assert len(repo.storage.list(KIND)) == KEPT + 2


def test_nobody_has_tried_to_restore_a_copy(repo: Repository, tmp_path: Path) -> None:
    add_drill(repo.storage, made(1.0))
    shutil.copytree(repo.storage.root, tmp_path / "copy")
    shutil.move(repo.storage.root, tmp_path / "moved")
    assert _times(Repository.open(tmp_path / "copy")) == []
    assert _times(Repository.open(tmp_path / "moved")) == [1.0]


def test_the_future_counts_for_nothing(repo: Repository) -> None:
    add_drill(repo.storage, made(1.0))
    add_drill(repo.storage, made(4e9))
    assert _times(repo) == [1.0]


def _sealed(body: bytes) -> bytes:
    return blake3(body).hexdigest().encode() + b"\n" + body


def test_what_cannot_be_a_drill_is_passed_over_and_left_alone(repo: Repository, tmp_path: Path) -> None:
    add_drill(repo.storage, made(1.0))
    (name,) = repo.storage.list(KIND)
    folder = repo.storage.root / KIND
    whole = (folder / name).read_bytes()
    good = msgspec.json.decode(whole.partition(b"\n")[2])
    hostile = [
        whole.replace(b'"seconds":1.0', b'"seconds":3.0'),
        b"",
        b"\xff" * 1000,
        _sealed(b"[" * 100_000),
        *(_sealed(msgspec.json.encode({**good, **change})) for change in (
            {"at": -5.0}, {"at": 1e300}, {"version": 2}, {"more": 1}, {"vm": 7}, {"disks": [{}]},
        )),
        _sealed(whole.partition(b"\n")[2].replace(b'"at":1.0', b'"at":NaN')),
    ]  # fmt: skip
    for data in hostile:
        (folder / new_id()).write_bytes(data)
    (folder / new_id()).symlink_to(folder / name)
    (folder / "../../etc").with_name("not an id").write_bytes(whole)
    assert _times(repo) == [1.0]
    before = len(list(folder.iterdir()))
    add_drill(repo.storage, made(2.0))
    assert _times(repo) == [1.0, 2.0]
    assert len(list(folder.iterdir())) == before + 1


def test_what_cannot_be_written_is_told_and_nothing_goes(repo: Repository) -> None:
    for at in range(1, KEPT + 1):
        add_drill(repo.storage, made(float(at)))
    durable.arm(fault_at="durable.synced:1:EIO")
    try:
        with pytest.raises(DurabilityError):
            add_drill(repo.storage, made(99.0))
    finally:
        durable.arm()
    assert _times(repo) == [float(at) for at in range(1, KEPT + 1)]

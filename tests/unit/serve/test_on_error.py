"""``on-source-error`` and ``on-target-error``: a job that is done has copied all, whatever went wrong on the way."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import FileDisk
from incbak.disk.memory import MemoryDisk
from incbak.extents import whole_sectors
from incbak.serve.jobs import Status
from tests.kit.serve import Machine, wait_until

GRAIN = 65536
SIZE = 40 * GRAIN + 1000


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def machine(tmp_path: Path, faults: Faults) -> Iterator[Machine]:
    """A disk without holes whose reads may fail, with a bitmap in which clusters 3 and 30 are dirty."""
    disk = MemoryDisk(SIZE, name="vda")
    disk.data[:] = os.urandom(1000) * (SIZE // 1000) + bytes(SIZE % 1000)
    with Machine(tmp_path, {"vda": FaultyDisk(disk, faults)}) as made:
        made("block-dirty-bitmap-add", node="vda", name="b")
        for cluster in (3, 30):
            made.guest["vda"].write(memoryview(b"dirty"), cluster * GRAIN)
        yield made


def begin(machine: Machine, **more: Any) -> None:
    arguments = {"device": "vda", "target": "t0", "sync": "full", "job_id": "j", **more}
    machine("blockdev-backup", **arguments)


def stopped(machine: Machine) -> str:
    """The job rests; its ``io-status``."""
    wait_until(lambda: machine.vm.jobs.find("j").status is Status.PAUSED, "the job rests")  # type: ignore[union-attr]
    (told,) = machine("query-block-jobs")
    assert told["paused"]
    return str(told["io-status"])


def errors(machine: Machine) -> list[tuple[object, object]]:
    return [(d["operation"], d["action"]) for event, d in list(machine.events) if event == "BLOCK_JOB_ERROR"]


def is_whole(machine: Machine, peer: Any, before: bytes) -> bool:
    return "error" not in machine.ended("j") and peer.disk.read(0, SIZE) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_source_that_fails_stops_the_job_until_it_is_resumed(machine: Machine, faults: Faults, code: int) -> None:
    """The guest goes on meanwhile: what it overwrites, also where the read failed, is copied as it was."""
    before = machine.disks["vda"].read(0, SIZE)
    peer = machine.target("t0", SIZE)
    faults.fail["read"] = (faults.seen["read"] + 1, code)
    begin(machine, on_source_error="stop", speed=1 << 30)
    assert stopped(machine) == ("nospace" if code == errno.ENOSPC else "failed")
    del faults.fail["read"]
    for cluster in (0, 7, 39):
        machine.guest["vda"].write(memoryview(b"new" * 100), cluster * GRAIN)
    machine("block-job-resume", device="j")
    assert is_whole(machine, peer, before)
    assert errors(machine) == [("read", "stop")]


def test_a_target_that_fails_stops_the_job_until_it_is_resumed(machine: Machine) -> None:
    """What it did not take is sent again, though the guest has overwritten it since."""
    before = machine.disks["vda"].read(0, SIZE)
    faults = Faults(fail={"write": (2, errno.EIO)})
    peer = machine.target("t0", SIZE, faults)
    begin(machine, on_target_error="stop")
    assert stopped(machine) == "failed"
    for cluster in range(40):
        machine.guest["vda"].write(memoryview(b"new"), cluster * GRAIN)
    machine("job-resume", id="j")
    wait_until(lambda: len(errors(machine)) == 2, "it fails again")
    assert stopped(machine) == "failed"
    del faults.fail["write"]
    machine("job-resume", id="j")
    assert is_whole(machine, peer, before)
    assert errors(machine) == [("write", "stop")] * 2


@pytest.mark.parametrize("side", ["source", "target"])
def test_ignored_is_tried_again(machine: Machine, faults: Faults, side: str) -> None:
    before = machine.disks["vda"].read(0, SIZE)
    there = Faults(fail={"write": (2, errno.EIO)} if side == "target" else {}, once=True)
    peer = machine.target("t0", SIZE, there)
    if side == "source":
        faults.once, faults.fail["read"] = True, (faults.seen["read"] + 2, errno.EIO)
    begin(machine, **{f"on_{side}_error": "ignore"})
    assert is_whole(machine, peer, before)
    assert errors(machine) == [("read" if side == "source" else "write", "ignore")]


@pytest.mark.parametrize("policy", ["enospc", "auto"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_where_storage_is_full_it_stops_else_it_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, policy: str, code: int
) -> None:
    """To a file: room is made, and the job goes on."""
    before = machine.disks["vda"].read(0, SIZE)
    full, write = [True], FileDisk.write

    def fails(disk: FileDisk, buf: memoryview | bytes, offset: int) -> None:
        if full and offset:
            raise OSError(code, os.strerror(code))
        write(disk, buf, offset)

    monkeypatch.setattr(FileDisk, "write", fails)
    out = tmp_path / "out"
    machine("drive-backup", device="vda", target=str(out), sync="full", job_id="j", on_target_error=policy)
    if code == errno.ENOSPC:
        assert stopped(machine) == "nospace"
        full.clear()
        machine("block-job-resume", device="j")
        assert "error" not in machine.ended("j")
        assert out.read_bytes() == before.ljust(whole_sectors(SIZE), b"\0")
        assert errors(machine) == [("write", "stop")]
    else:
        assert machine.ended("j")["error"] == os.strerror(code)
        assert errors(machine) == [("write", "report")]


@pytest.mark.parametrize("side", ["source", "target"])
@pytest.mark.parametrize("policy", ["stop", "ignore"])
def test_cancelled_while_it_cannot_go_on(machine: Machine, faults: Faults, side: str, policy: str) -> None:
    """The bitmap is as before, nothing is left behind."""
    there = Faults(fail={"write": (2, errno.EIO)} if side == "target" else {})
    machine.target("t0", SIZE, there)
    if side == "source":
        faults.fail["read"] = (2, errno.EIO)
    begin(machine, sync="incremental", bitmap="b", **{f"on_{side}_error": policy})
    wait_until(lambda: errors(machine), "it fails")
    machine("block-job-cancel", device="j", force=True)
    machine.ended("j")
    assert machine.tracked["vda"].bitmaps["b"].runs().tolist() == [[3, 1], [30, 1]]
    assert not machine.bitmap("vda", "b")["busy"]
    assert not machine.tracked["vda"].copied
    assert machine.vm.budget.used == 0


def test_a_bitmap_does_not_say_dirty_of_what_was_sent_again(machine: Machine) -> None:
    """``always``: refused once, taken the second time; then the job is cancelled when it is pending."""
    faults = Faults(fail={"write": (1, errno.EIO)}, once=True)
    machine.target("t0", SIZE, faults)
    begin(machine, sync="bitmap", bitmap="b", bitmap_mode="always", on_target_error="ignore", auto_finalize=False)
    wait_until(lambda: machine.vm.jobs.find("j").status is Status.PENDING, "it is pending")  # type: ignore[union-attr]
    machine("job-cancel", id="j")
    machine.ended("j")
    assert machine.bitmap("vda", "b")["count"] == 0


def test_no_policy_mends_a_point_in_time_that_is_lost(machine: Machine, faults: Faults) -> None:
    """The guest overwrote what could not be saved: there is nothing left to try again, and the job says so."""
    faults.stall["read"] = threading.Event()
    machine.target("t0", SIZE)
    begin(machine, on_source_error="ignore", on_target_error="ignore", speed=1)
    copy = machine.vm.jobs.find("j")._copy  # type: ignore[union-attr]
    copy.break_off(OSError(errno.ENOSPC, "no room"))
    faults.stall.pop("read").set()
    assert machine.ended("j")["error"] == "No space left on device"


def test_the_other_of_a_group_that_rests_is_woken(machine: Machine, tmp_path: Path) -> None:
    """One rests after an error, the other is cancelled: both end."""
    machine.target("t0", SIZE, Faults(fail={"write": (1, errno.EIO)}))
    machine.target("t1", SIZE)
    actions = [
        {"type": "blockdev-backup", "data": {"device": "vda", "sync": "full", "target": target, **more}}
        for target, more in (
            ("t0", {"job-id": "j", "on-target-error": "stop"}),
            ("t1", {"job-id": "k", "auto-finalize": False}),
        )
    ]
    machine("transaction", actions=actions, properties={"completion-mode": "grouped"})
    wait_until(lambda: machine.vm.jobs.find("j").status is Status.PAUSED, "it rests")  # type: ignore[union-attr]
    machine("job-cancel", id="k")
    machine.ended("j")
    machine.ended("k")

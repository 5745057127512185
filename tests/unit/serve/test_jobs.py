"""Backup jobs inside one process: what reaches the target, how jobs end, and that no guest write suffers."""

from __future__ import annotations

import errno
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.serve.schema import QmpError
from tests.kit.serve import Machine, wait_until

GRAIN = 65536
SIZE = 40 * GRAIN + 1234


def _disk(size: int = SIZE) -> MemoryDisk:
    disk = MemoryDisk(size, name="vda.raw")
    for cluster in range(0, size // GRAIN, 2):
        disk.data[cluster * GRAIN : cluster * GRAIN + 1000] = os.urandom(1000)
    disk.data[-5:] = b"tail!"
    return disk


def _write(machine: Machine, offset: int, data: bytes, disk: str = "vda") -> None:
    machine.guest[disk].write(memoryview(data), offset)


def test_a_full_copies_everything_at_one_instant_while_the_guest_writes(tmp_path: Path) -> None:
    """I1; also the odd tail of the disk (faults row 38), and what had nothing to save until the job began."""
    disk = _disk()
    with Machine(tmp_path, {"vda": disk}) as machine:
        for cluster in range(20, 41):
            _write(machine, cluster * GRAIN + 7, b"old")
        before = bytes(disk.data)
        peer = machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", speed=1 << 20)
        for cluster in range(40):
            _write(machine, cluster * GRAIN + 7, b"new")
        machine("block-job-set-speed", device="j", speed=0)
        end = machine.ended("j")
        assert bytes(peer.disk.data) == before  # type: ignore[union-attr]
        assert end["len"] == end["offset"] == SIZE
        assert "error" not in end
        assert disk.data[39 * GRAIN + 7 : 39 * GRAIN + 10] == b"new"


@pytest.mark.parametrize("kind", ["zeroes", "trim"])
def test_what_the_guest_discards_is_copied_as_it_was(tmp_path: Path, kind: str) -> None:
    """I1, faults row 59: the disk has holes there now, the point in time had content."""
    disk = _disk()
    before = bytes(disk.data)
    with Machine(tmp_path, {"vda": disk}) as machine:
        peer = machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", speed=1 << 20)
        guest = machine.guest["vda"]
        if kind == "zeroes":
            guest.write_zeroes(17 * GRAIN, 23 * GRAIN, unmap=True, fast=False)
        else:
            guest.trim(17 * GRAIN, 23 * GRAIN)
        machine("block-job-set-speed", device="j", speed=0)
        assert "error" not in machine.ended("j")
        assert not any(disk.data[17 * GRAIN : 40 * GRAIN])
        assert bytes(peer.disk.data) == before  # type: ignore[union-attr]


def test_a_job_that_ends_waits_for_a_write_in_flight(tmp_path: Path) -> None:
    """I6: the write is recorded in the bitmap and, a moment later, in what stays of it: both or neither count."""
    faults, disk = Faults(), _disk()
    with Machine(tmp_path, {"vda": FaultyDisk(disk, faults)}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE)
        _write(machine, 2 * GRAIN, b"x")
        job = {"sync": "bitmap", "bitmap": "b", "bitmap-mode": "on-success", "job-id": "j", "speed": 1}
        machine("blockdev-backup", {"device": "vda", "target": "t0", **job})
        wait_until(lambda: machine.vm.jobs.find("j"), "the job runs")
        faults.stall["write"] = threading.Event()
        guest = threading.Thread(target=_write, args=(machine, 9 * GRAIN, b"x"))
        guest.start()
        wait_until(lambda: faults.seen["write"] == 2, "the write is under way")
        machine("block-job-set-speed", device="j", speed=0)

        def early() -> list[str]:
            return [event for event, _data in list(machine.events) if event == "BLOCK_JOB_COMPLETED"]

        wait_until(lambda: machine.tracked["vda"].gate._draining or early(), "the job is about to end")
        too_early = early()
        faults.stall["write"].set()
        guest.join(10)
        machine.ended("j")
        assert too_early == []
        assert machine.tracked["vda"].bitmaps["b"].runs().tolist() == [[9, 1]]


def test_a_bitmap_backup_copies_the_dirty_clusters_and_no_others(tmp_path: Path) -> None:
    disk = _disk()
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        peer = machine.target("t0", SIZE)
        _write(machine, 3 * GRAIN - 1, b"xy")
        _write(machine, SIZE - 1, b"z")
        machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="b", bitmap_mode="never")
        assert machine.ended("vda")["len"] == 2 * GRAIN + 1234
        assert {o // GRAIN for o, _ in peer.wrote} == {2, 3, 40} or {o // GRAIN for o, _ in peer.wrote} == {2, 40}
        got = peer.disk.data  # type: ignore[union-attr]
        assert got[2 * GRAIN : 4 * GRAIN] == disk.data[2 * GRAIN : 4 * GRAIN]
        assert got[-1234:] == disk.data[-1234:]
        assert sum(length for _, length in peer.wrote) == 2 * GRAIN + 1234
        assert machine.bitmap("vda", "b")["count"] == 2 * GRAIN + 1234, "mode never leaves the bitmap alone"


def test_sync_none_copies_what_the_guest_overwrites_until_it_is_cancelled(tmp_path: Path) -> None:
    disk = _disk()
    before = bytes(disk.data)
    with Machine(tmp_path, {"vda": disk}) as machine:
        peer = machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="none", job_id="j")
        _write(machine, 4 * GRAIN + 5, b"new")
        wait_until(lambda: (4 * GRAIN, GRAIN) in peer.wrote, "the old content is at the target")
        got = peer.disk.data  # type: ignore[union-attr]
        assert got[4 * GRAIN : 5 * GRAIN] == before[4 * GRAIN : 5 * GRAIN]
        machine("block-job-cancel", device="j")
        machine.ended("j")
        assert [o for o, _ in peer.wrote] == [4 * GRAIN]


@pytest.mark.parametrize(
    ("mode", "success", "left"),
    [
        ("never", True, {2, 3, 9}),
        ("never", False, {2, 3, 9}),
        ("on-success", True, {9}),
        ("on-success", False, {2, 3, 9}),
        ("always", True, {9}),
        ("always", False, {2, 3, 9}),
    ],
)
def test_what_each_bitmap_mode_leaves(tmp_path: Path, mode: str, success: bool, left: set[int]) -> None:
    """The table in `backup_job`: I6, no bit is given up for content that is not at the target."""
    faults = Faults(stall={"write": threading.Event()})
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE, faults)
        _write(machine, 2 * GRAIN, b"x" * 2 * GRAIN)
        machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="b", bitmap_mode=mode)
        wait_until(lambda: faults.seen.get("write"), "the job is at the target")
        assert machine.bitmap("vda", "b")["busy"]
        _write(machine, 9 * GRAIN, b"x")
        if not success:
            machine("block-job-cancel", device="vda")
        faults.stall["write"].set()
        machine.ended("vda")
        found = machine.tracked["vda"].bitmaps["b"].runs().tolist()
        assert {first + i for first, count in found for i in range(count)} == left
        assert not machine.bitmap("vda", "b")["busy"]


def test_always_gives_up_what_the_target_has_flushed_before_the_source_failed(tmp_path: Path) -> None:
    disk = FaultyDisk(_disk(), Faults(fail={"read": (3, errno.EIO)}))
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE)
        for cluster in (2, 4, 6, 8):
            _write(machine, cluster * GRAIN, b"x")
        machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="b", bitmap_mode="always")
        end = machine.ended("vda")
        assert end["error"] == "Input/output error"
        found = machine.tracked["vda"].bitmaps["b"].runs().tolist()
        left = {first + i for first, count in found for i in range(count)}
        assert 6 in left or 8 in left
        assert left < {2, 4, 6, 8}


@pytest.mark.parametrize("nth", [1, 3, 20, 40])
@pytest.mark.parametrize("fill", [b"x", b"\0"])
def test_always_keeps_what_the_target_refused(tmp_path: Path, nth: int, fill: bytes) -> None:
    """Neither what was refused nor what was never sent for that reason is given up; all else is."""
    grain = 4096
    faults = Faults(fail={"write": (nth, errno.EIO), "zero": (nth, errno.EIO)}, once=True)
    disk = _disk()
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b", granularity=grain)
        peer = machine.target("t0", SIZE, faults)
        dirty = set(range(0, 80, 2))
        for cluster in dirty:
            _write(machine, cluster * grain, fill * grain)
        machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="b", bitmap_mode="always")
        assert machine.ended("vda")["error"] == "Input/output error"
        found = machine.tracked["vda"].bitmaps["b"].runs().tolist()
        left = {first + i for first, count in found for i in range(count)}
        copied = {offset // grain for offset, _length in peer.wrote} - {sorted(dirty)[nth - 1]}
        assert left == dirty - copied


def test_always_gives_up_nothing_after_a_flush_that_failed(tmp_path: Path) -> None:
    """faults row 31: the first failure of a sync is final, also where the next one succeeds."""
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE, Faults(fail={"flush": (1, errno.EIO)}, once=True))
        for cluster in (2, 4):
            _write(machine, cluster * GRAIN, b"x")
        machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="b", bitmap_mode="always")
        assert machine.ended("vda")["error"] == "Input/output error"
        assert machine.tracked["vda"].bitmaps["b"].runs().tolist() == [[2, 1], [4, 1]]


@pytest.mark.parametrize("reads_fail", [False, True])
def test_always_gives_up_nothing_where_the_disk_cannot_be_flushed(tmp_path: Path, reads_fail: bool) -> None:
    """A power cut may take from the disk what the target has: then the two differ, and the bitmap must say so."""
    faults = Faults(fail={"flush": (1, errno.EIO)})
    with Machine(tmp_path, {"vda": FaultyDisk(_disk(), faults)}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE)
        for cluster in (2, 4):
            _write(machine, cluster * GRAIN, b"x")
        if reads_fail:
            faults.fail["read"] = (faults.seen.get("read", 0) + 2, errno.EIO)
        machine("blockdev-backup", device="vda", target="t0", sync="bitmap", bitmap="b", bitmap_mode="always")
        assert machine.ended("vda")["error"] == "Input/output error"
        assert machine.tracked["vda"].bitmaps["b"].runs().tolist() == [[2, 1], [4, 1]]


@pytest.mark.parametrize("failure", ["none", "cancelled", "midway"])
@pytest.mark.parametrize(
    ("sync", "mode"),
    [
        *(("bitmap", mode) for mode in ("never", "on-success", "always")),
        *((sync, mode) for sync in ("full", "top") for mode in ("on-success", "always")),
    ],
)
def test_the_table_of_qemus_test_257(tmp_path: Path, sync: str, mode: str, failure: str) -> None:
    """A source that fails midway, a cancel at the last moment, or neither: what is left dirty, to the cluster."""
    before, meanwhile, size = {0, 20, 40, 60}, {20, 41}, 64 * GRAIN
    faults = Faults()
    disk = FaultyDisk(MemoryDisk(size, name="vda"), faults)
    disk.inner.write(b"o" * size, 0)
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        peer = machine.target("t0", size)
        for cluster in before:
            _write(machine, cluster * GRAIN, b"x")
        if failure == "midway":
            faults.fail["read"] = (faults.seen.get("read", 0) + 2, errno.EIO)
        modes: dict[str, Any] = {"sync": sync, "bitmap": "b", "bitmap_mode": mode, "auto_finalize": False}
        machine("blockdev-backup", device="vda", target="t0", job_id="j", **modes)
        if failure != "midway":
            wait_until(lambda: machine("query-jobs")[0]["status"] == "pending", "the job is pending")
            for cluster in meanwhile:
                _write(machine, cluster * GRAIN, b"y")
            machine("job-cancel" if failure == "cancelled" else "job-finalize", id="j")
        machine.ended("j")
        found = machine.tracked["vda"].bitmaps["b"].runs().tolist()
        left = {first + i for first, count in found for i in range(count)}
        if failure == "midway" and mode == "always":
            wanted, read = (before, {0}) if sync == "bitmap" else (set(range(64)), set(range(16)))
            assert {c for o, n in peer.wrote for c in range(o // GRAIN, (o + n) // GRAIN)} == read
            assert left == wanted - read
        elif failure == "midway":
            assert left == before
        elif mode == "always" or (mode == "on-success" and failure == "none"):
            assert left == meanwhile
        else:
            assert left == before | meanwhile


def test_always_after_a_cancel_when_all_is_copied(tmp_path: Path) -> None:
    """As QEMU's test 257 has it: the target has everything, so only what came since is left."""
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE)
        _write(machine, 2 * GRAIN, b"x")
        more: dict[str, Any] = {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "always", "auto_finalize": False}
        machine("blockdev-backup", device="vda", target="t0", **more)
        wait_until(lambda: machine("query-jobs")[0]["status"] == "pending", "the job is pending")
        _write(machine, 9 * GRAIN, b"x")
        machine("block-job-cancel", device="vda")
        machine.ended("vda")
        assert machine.tracked["vda"].bitmaps["b"].runs().tolist() == [[9, 1]]


def test_several_jobs_on_one_disk_and_each_has_its_own_instant(tmp_path: Path) -> None:
    disk = _disk()
    with Machine(tmp_path, {"vda": disk}) as machine:
        peers, wanted = [], []
        for i in range(3):
            peers.append(machine.target(f"t{i}", SIZE))
            wanted.append(bytes(disk.data))
            machine("blockdev-backup", device="vda", target=f"t{i}", sync="full", job_id=f"j{i}", speed=1 << 19)
            for cluster in range(i, 40, 3):
                _write(machine, cluster * GRAIN, b"%d" % i * 100)
        assert len(machine("query-jobs")) == 3
        for i in range(3):
            machine("block-job-set-speed", device=f"j{i}", speed=0)
        for i in range(3):
            assert "error" not in machine.ended(f"j{i}")
            assert bytes(peers[i].disk.data) == wanted[i]  # type: ignore[union-attr]


@pytest.mark.alone
def test_a_target_that_stalls_holds_no_guest_write(tmp_path: Path) -> None:
    """I4: the target takes nothing for a while; every guest write over the whole disk goes out at once."""
    faults = Faults(stall={"write": threading.Event()})
    disk = _disk()
    before = bytes(disk.data)
    with Machine(tmp_path, {"vda": disk}) as machine:
        peer = machine.target("t0", SIZE, faults)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
        wait_until(lambda: faults.seen.get("write"), "the job is at the target")
        took = []
        for cluster in range(40):
            began = time.monotonic()
            _write(machine, cluster * GRAIN, b"new")
            took.append(time.monotonic() - began)
        assert max(took) < 1.0
        faults.stall["write"].set()
        assert "error" not in machine.ended("j")
        assert bytes(peer.disk.inner.data) == before  # type: ignore[union-attr]


def test_the_guest_waits_until_the_job_has_read(tmp_path: Path) -> None:
    """I1: a cluster that the job is reading is let go only when it has been read."""
    faults = Faults(stall={"read": threading.Event()})
    disk = _disk()
    before = bytes(disk.data)
    with Machine(tmp_path, {"vda": FaultyDisk(disk, faults)}) as machine:
        peer = machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
        wait_until(lambda: faults.seen.get("read"), "the job is reading")
        guest = threading.Thread(target=_write, args=(machine, 0, b"new"))
        guest.start()
        guest.join(0.2)
        waited = guest.is_alive()
        faults.stall["read"].set()
        guest.join(10)
        assert "error" not in machine.ended("j")
        assert waited
        assert bytes(peer.disk.data) == before  # type: ignore[union-attr]


def test_a_job_is_done_only_when_the_target_has_flushed(tmp_path: Path) -> None:
    faults = Faults(fail={"flush": (1, errno.EIO)})
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine.target("t0", SIZE, faults)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
        assert machine.ended("j")["error"] == "Input/output error"


@pytest.mark.parametrize("how", ["refuses", "dies"])
def test_trouble_at_the_target_fails_the_job_only(tmp_path: Path, how: str) -> None:
    """I4; the target can be used again by the next job, which connects anew."""
    faults = Faults(fail={"write": (2, errno.ENOSPC)} if how == "refuses" else {}, once=True)
    faults.stall = {"write": threading.Event()} if how == "dies" else {}
    disk = _disk()
    with Machine(tmp_path, {"vda": disk}) as machine:
        peer = machine.target("t0", SIZE, faults)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
        if how == "dies":
            wait_until(lambda: faults.seen.get("write"), "the job is at the target")
            threading.Thread(target=peer.stop, daemon=True).start()
        end = machine.ended("j")
        if how == "dies":
            faults.stall["write"].set()
        assert end["error"] == {"refuses": "No space left on device", "dies": "Input/output error"}[how]
        _write(machine, 0, b"goes on")
        assert disk.data[:7] == b"goes on"
        assert machine.tracked["vda"]._copies == ()
        if how == "refuses":
            machine("blockdev-del", node_name="t0")


def test_a_target_that_closes_between_jobs_is_connected_to_anew(tmp_path: Path) -> None:
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="a")
        machine("block-job-cancel", device="a")
        machine.ended("a")
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="b")
        assert "error" not in machine.ended("b")


def test_scratch_full_breaks_the_job_and_the_guest_goes_on(tmp_path: Path) -> None:
    """faults row 27, through the commands: ``break-snapshot`` is the default."""
    disk = _disk()
    with Machine(tmp_path, {"vda": disk}, scratch_limit=0) as machine:
        machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", speed=1)
        copy = machine.tracked["vda"]._copies[0]
        copy._held._limit = 2 * GRAIN
        for cluster in range(38, 20, -1):
            _write(machine, cluster * GRAIN, b"new")
        assert disk.data[21 * GRAIN : 21 * GRAIN + 3] == b"new"
        assert machine.ended("j")["error"] == "No space left on device"


def test_a_source_that_cannot_be_read_fails_the_job(tmp_path: Path) -> None:
    """faults row 29: never zero-filled in silence."""
    disk = FaultyDisk(_disk(), Faults(fail={"read": (2, errno.EIO)}))
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full")
        assert machine.ended("vda")["error"] == "Input/output error"


def test_the_life_of_a_job_by_hand(tmp_path: Path) -> None:
    """``auto-finalize`` and ``auto-dismiss`` off: pending, concluded, and the verbs each allows."""
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine.target("t0", SIZE)
        more: dict[str, Any] = {"auto_finalize": False, "auto_dismiss": False}
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", **more)
        wait_until(lambda: machine("query-jobs")[0]["status"] == "pending", "the job is pending")
        with pytest.raises(QmpError, match=r"Job 'j' in state 'pending' cannot accept command verb 'dismiss'"):
            machine("job-dismiss", id="j")
        machine("job-finalize", id="j")
        wait_until(lambda: machine("query-jobs")[0]["status"] == "concluded", "the job is concluded")
        with pytest.raises(QmpError, match=r"in state 'concluded' cannot accept command verb 'cancel'"):
            machine("job-cancel", id="j")
        assert machine("query-block-jobs")[0]["offset"] == SIZE
        machine("job-dismiss", id="j")
        assert machine("query-jobs") == []
        turns = [d["status"] for e, d in machine.events if e == "JOB_STATUS_CHANGE"]
        assert turns == ["created", "running", "waiting", "pending", "concluded", "null"]


def test_a_cancelled_pending_job_does_not_count(tmp_path: Path) -> None:
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.target("t0", SIZE)
        _write(machine, 0, b"x")
        machine(
            "blockdev-backup",
            device="vda",
            target="t0",
            sync="bitmap",
            bitmap="b",
            bitmap_mode="on-success",
            auto_finalize=False,
        )
        wait_until(lambda: machine("query-jobs")[0]["status"] == "pending", "the job is pending")
        machine("block-job-cancel", device="vda")
        machine.ended("vda")
        assert [e for e, _ in machine.events if e.startswith("BLOCK_JOB_C")] == ["BLOCK_JOB_CANCELLED"]
        assert machine.bitmap("vda", "b")["count"] == GRAIN


def test_one_target_serves_one_job_at_a_time(tmp_path: Path) -> None:
    faults = Faults(stall={"write": threading.Event()})
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine.target("t0", SIZE, faults)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="a")
        with pytest.raises(QmpError, match="Node 't0' is busy"):
            machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="b")
        with pytest.raises(QmpError, match="Node 't0' is busy"):
            machine("blockdev-del", node_name="t0")
        with pytest.raises(QmpError, match="Job ID 'a' already in use"):
            machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="a")
        faults.stall["write"].set()
        machine.ended("a")
        assert [j["id"] for j in machine("query-jobs")] == []


def test_no_scratch_remains_charged_after_jobs(tmp_path: Path) -> None:
    """faults row 13: scratch is bounded and cleaned, however a job ends."""
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine.target("t0", SIZE)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", speed=1)
        _write(machine, 38 * GRAIN, b"new")
        wait_until(lambda: machine.vm.budget.used > 0, "old content is in scratch")
        machine("block-job-cancel", device="j")
        machine.ended("j")
        wait_until(lambda: machine.vm.budget.used == 0, "scratch is given back")
        assert list(machine.directory.glob("*.tmp")) == []


def test_speed_is_kept_also_when_it_is_low_or_changed(tmp_path: Path) -> None:
    """A limit below one request a second is kept too; a raised one holds from then on."""
    with Machine(tmp_path, {"vda": _disk(8 << 20)}) as machine:
        machine.target("t0", 8 << 20)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", speed=1)
        time.sleep(1.3)
        assert machine("query-jobs")[0]["current-progress"] <= 1 << 20
        machine("block-job-set-speed", device="j", speed=0)
        assert machine.ended("j")["offset"] == 8 << 20


@pytest.mark.parametrize("mode", ["never", "on-success"])
def test_a_job_is_done_only_when_what_it_copied_is_on_the_disk(tmp_path: Path, mode: str) -> None:
    """Else a power cut takes from the disk what the backup has, and the bitmap from there on calls it clean."""
    faults = Faults(fail={"flush": (1, errno.EIO)})
    with Machine(tmp_path, {"vda": FaultyDisk(_disk(), faults)}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.guest["vda"].write(memoryview(b"x"), 3 * GRAIN)
        machine.target("t0", SIZE)
        job = {"device": "vda", "target": "t0", "sync": "bitmap", "bitmap": "b", "bitmap-mode": mode, "job-id": "j"}
        machine("blockdev-backup", job)
        assert machine.ended("j")["error"] == "Input/output error"
        assert faults.seen["flush"] == 1
        assert machine.bitmap("vda", "b")["count"] == GRAIN
        faults.fail.clear()
        machine("blockdev-backup", job | {"job-id": "k"})
        assert "error" not in machine.ended("k")
        assert faults.seen["flush"] == 2

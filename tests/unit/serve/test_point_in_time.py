"""Image fleecing: a disk at one instant, read by others while the guest goes on; and what can go wrong."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdRequestError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.serve.schema import QmpError
from tests.kit.serve import Machine, wait_until

GRAIN = 65536
SIZE = 40 * GRAIN + 1234


def _disk(name: str) -> MemoryDisk:
    disk = MemoryDisk(SIZE, name=name)
    for cluster in range(0, SIZE // GRAIN + 1, 2):
        disk.data[cluster * GRAIN : cluster * GRAIN + 1000] = os.urandom(1000)
    return disk


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def limit() -> int | None:
    return None


@pytest.fixture
def machine(tmp_path: Path, faults: Faults, limit: int | None) -> Iterator[Machine]:
    disks = {"vda": FaultyDisk(_disk("vda"), faults), "vdb": _disk("vdb")}
    with Machine(tmp_path, disks, limit) as made:
        made("nbd-server-start", addr={"type": "unix", "data": {"path": str(tmp_path / "added.sock")}})
        yield made
        made.vm.exports.stop(5)
        for point in list(made.vm.points.values()):
            point.close()


def fix(machine: Machine, disk: str = "vda", node: str = "p") -> bytes:
    """A point in time, exported; what it is to hold."""
    before = machine.disks[disk].read(0, SIZE)
    machine("x-incbak-point-in-time-add", device=disk, node_name=node)
    machine("block-export-add", type="nbd", id=f"e-{node}", node_name=node)
    return before


def client(machine: Machine, node: str = "p") -> NbdClient:
    return NbdClient.connect(NbdUri(node, path=str(machine.directory / "added.sock")), contexts=["base:allocation"])


def told(machine: Machine, node: str = "p") -> dict[str, Any]:
    return next(n for n in machine("query-named-block-nodes") if n["node-name"] == node)


def test_the_story_of_222(machine: Machine) -> None:
    """QEMU's test: old content where the guest overwrites, zeroes and discards; in the end nothing is left."""
    before, guest = fix(machine), machine.guest["vda"]
    with closing(client(machine)) as reader:
        assert (reader.size, reader.read_only) == (SIZE, True)
        guest.write(memoryview(b"new" * 1000), 5)
        guest.write_zeroes(2 * GRAIN, 4 * GRAIN, unmap=True, fast=False)
        guest.trim(10 * GRAIN + 7, 3 * GRAIN)
        guest.write(memoryview(b"end"), SIZE - 3)
        for _ in range(2):
            assert reader.read(0, SIZE) == before
        assert reader.read(2 * GRAIN - 5, 10) == before[2 * GRAIN - 5 : 2 * GRAIN + 5]
        assert reader.block_status(0, SIZE, "base:allocation") == [(SIZE, 0)]
        with pytest.raises(NbdRequestError):
            reader.write(b"x", 0)
    assert machine.disks["vda"].read(5, 3) == b"new"
    assert machine("query-block-exports")[0]["node-name"] == "p"
    with pytest.raises(QmpError, match="Block device p is in use"):
        machine("blockdev-del", node_name="p")
    machine("nbd-server-stop")
    machine("blockdev-del", node_name="p")
    assert not machine.tracked["vda"].copied
    wait_until(lambda: not machine.vm.budget.used, "scratch is given back")
    with pytest.raises(QmpError, match="Failed to find node"):
        machine("blockdev-del", node_name="p")


def test_readers_and_guests_that_race(machine: Machine) -> None:
    """Two of each, in no order: what is read is what was there, and no write fails."""
    before, stop = fix(machine), threading.Event()

    def write(seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            machine.guest["vda"].write(memoryview(rng.randbytes(5000)), rng.randrange(SIZE - 5000))

    writing = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for thread in writing:
        thread.start()
    try:
        readers = [client(machine) for _ in range(2)]
        rng = random.Random(3)
        for _ in range(60):
            offset = rng.randrange(SIZE - 1)
            length = min(rng.choice((1, 4096, 3 * GRAIN, SIZE)), SIZE - offset)
            for reader in readers:
                assert reader.read(offset, length) == before[offset : offset + length]
        for reader in readers:
            reader.close()
    finally:
        stop.set()
        for thread in writing:
            thread.join(30)
    assert told(machine).get("x-incbak-lost") is None


def test_two_disks_and_a_bitmap_at_one_instant(machine: Machine) -> None:
    before = {disk: machine.disks[disk].read(0, SIZE) for disk in ("vda", "vdb")}
    actions: list[dict[str, Any]] = [
        {"type": "x-incbak-point-in-time-add", "data": {"device": disk, "node-name": f"p{disk}"}} for disk in before
    ]
    actions.append({"type": "block-dirty-bitmap-add", "data": {"node": "vda", "name": "since"}})
    machine("transaction", actions=actions)
    for disk in before:
        machine.guest[disk].write(memoryview(b"new"), 4 * GRAIN)
        machine("block-export-add", type="nbd", id=f"e{disk}", node_name=f"p{disk}")
        with closing(client(machine, f"p{disk}")) as reader:
            assert reader.read(0, SIZE) == before[disk]
    assert machine.tracked["vda"].bitmaps["since"].runs().tolist() == [[4, 1]]


def test_in_a_transaction_that_does_not_happen(machine: Machine) -> None:
    add = {"type": "x-incbak-point-in-time-add", "data": {"device": "vda", "node-name": "p"}}
    with pytest.raises(QmpError, match="aborted"):
        machine("transaction", actions=[add, {"type": "abort", "data": {}}])
    with pytest.raises(QmpError, match="Duplicate nodes with node-name='p'"):
        machine("transaction", actions=[add, add])
    with pytest.raises(QmpError, match="completion-mode = grouped"):
        machine("transaction", actions=[add], properties={"completion-mode": "grouped"})
    assert not machine.vm.points
    assert not machine.tracked["vda"].copied
    fix(machine)


@pytest.mark.parametrize("limit", [0])
def test_without_room_it_is_lost_and_the_guest_goes_on(machine: Machine, limit: int) -> None:
    """I4: 16 MiB are held in memory; here not even those are there."""
    before = fix(machine)
    copy = machine.vm.points["p"]._copy
    copy._held._limit = 4 * GRAIN
    with closing(client(machine)) as reader:
        assert reader.read(0, 100) == before[:100]
        for cluster in range(0, 40, 2):
            machine.guest["vda"].write(memoryview(b"new"), cluster * GRAIN)
        assert told(machine)["x-incbak-lost"] == f"the scratch limit of {limit} bytes is reached"
        for offset in (0, 39 * GRAIN):
            with pytest.raises(NbdRequestError) as caught:
                reader.read(offset, 10)
            assert caught.value.errno in (errno.EIO, errno.ENOSPC)
    wait_until(lambda: not machine.vm.budget.used, "scratch is given back")
    machine("block-export-del", id="e-p", mode="hard")
    wait_until(lambda: not machine("query-block-exports"), "the export is gone")
    machine("blockdev-del", node_name="p")


def test_a_read_that_fails_is_one_read(machine: Machine, faults: Faults) -> None:
    """The disk cannot be read for a while: that is no reason to lose what was saved."""
    before = fix(machine)
    with closing(client(machine)) as reader:
        machine.guest["vda"].write(memoryview(b"new"), 0)
        faults.fail["read"] = (1, errno.EIO)
        with pytest.raises(NbdRequestError) as caught:
            reader.read(2 * GRAIN, 10)
        assert caught.value.errno == errno.EIO
        assert reader.read(0, 10) == before[:10]
        del faults.fail["read"]
        assert reader.read(0, SIZE) == before


def test_what_was_read_while_it_got_lost_is_not_handed_out(machine: Machine, faults: Faults) -> None:
    """The reader is in the middle of a cluster; scratch goes only when it has been told."""
    fix(machine)
    point = machine.vm.points["p"]
    faults.stall["read"] = threading.Event()
    failed: list[OSError] = []

    def read() -> None:
        try:
            point.read_into(memoryview(bytearray(10)), 0)
        except OSError as e:
            failed.append(e)

    seen = faults.seen.get("read", 0)
    reading = threading.Thread(target=read)
    reading.start()
    wait_until(lambda: faults.seen.get("read", 0) > seen, "the read is under way")
    point._copy.break_off(OSError(errno.ENOSPC, "no room"))
    held_open = not point._copy._held._closed
    faults.stall.pop("read").set()
    reading.join(30)
    assert held_open
    assert [e.errno for e in failed] == [errno.ENOSPC]
    assert point._copy._held._closed


def test_a_guest_waits_for_who_reads_what_it_overwrites(machine: Machine, faults: Faults) -> None:
    """A read that has begun ends with the old content, and only then is it overwritten."""
    before = fix(machine)
    point, buffer = machine.vm.points["p"], bytearray(10)
    stall = faults.stall["read"] = threading.Event()
    seen, wrote = faults.seen.get("read", 0), faults.seen.get("write", 0)
    reading = threading.Thread(target=point.read_into, args=(memoryview(buffer), 2 * GRAIN))
    writing = threading.Thread(target=machine.guest["vda"].write, args=(memoryview(b"new" * 10), 2 * GRAIN))
    try:
        reading.start()
        wait_until(lambda: faults.seen.get("read", 0) > seen, "the read is under way")
        assert [(run.first, run.count) for run in point._copy._claims] == [(2, 1)]
        writing.start()
        early = faults.seen.get("write", 0) - wrote, faults.seen["read"] - seen
    finally:
        stall.set()
        for thread in (reading, writing):
            thread.join(30)
    assert early == (0, 1)
    assert bytes(buffer) == before[2 * GRAIN :][:10]


def test_beside_a_backup_and_the_other_way_round(machine: Machine) -> None:
    before = fix(machine)
    peer = machine.target("t0", SIZE)
    machine.guest["vda"].write(memoryview(b"later"), 6 * GRAIN)
    later = machine.disks["vda"].read(0, SIZE)
    machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", speed=1)
    machine.guest["vda"].write(memoryview(b"latest"), 6 * GRAIN)
    machine("block-job-set-speed", device="j", speed=0)
    assert "error" not in machine.ended("j")
    assert peer.disk.read(0, SIZE) == later
    with closing(client(machine)) as reader:
        assert reader.read(0, SIZE) == before
    with pytest.raises(QmpError, match="Node 'vda' is busy"):
        machine("block_resize", device="vda", size=2 * SIZE)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("x-incbak-point-in-time-add", {"device": "nothing"}, "Cannot find device='nothing'"),
        ("x-incbak-point-in-time-add", {"node-name": "vdb"}, "Duplicate nodes with node-name='vdb'"),
        ("x-incbak-point-in-time-add", {"node-name": "p"}, "Duplicate nodes with node-name='p'"),
        ("x-incbak-point-in-time-add", {"node-name": "1"}, "Invalid node-name: '1'"),
        ("block-export-add", {"writable": True}, "Cannot export read-only node as writable"),
        ("block-export-add", {"bitmaps": ["b"]}, "Bitmap 'b' is not found"),
        ("block-export-add", {"name": "x" * 5000}, "export name '.*' too long"),
    ],
)
def test_what_is_refused(machine: Machine, command: str, arguments: dict[str, Any], message: str) -> None:
    fix(machine)
    given: dict[str, Any] = {"device": "vda", "node-name": "q", **arguments}
    if command == "block-export-add":
        given = {"type": "nbd", "id": "f", "node-name": "p", **arguments}
    with pytest.raises(QmpError, match=message):
        machine(command, given)

"""``block_resize``: no bitmap is believed that should not be, and no client reaches beyond the end of a disk."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from incbak.bitmap.file import State
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import open_disk
from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdRequestError
from incbak.serve import tracker
from incbak.serve.schema import QmpError
from incbak.serve.tracker import SettledMap
from tests.kit.serve import Machine, Serve, raw_image, serving, wait_until

GRAIN = 65536
SIZE = 16 * GRAIN + 512
GROWN, CUT = SIZE + 3 * GRAIN, 9 * GRAIN + 512


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def machine(tmp_path: Path, faults: Faults) -> Iterator[Machine]:
    """One disk with a bitmap in a file, one in memory and one that is switched off; cluster 2 is dirty."""
    with Machine(tmp_path, {"vda": FaultyDisk(MemoryDisk(SIZE), faults)}) as made:
        made("block-dirty-bitmap-add", node="vda", name="file", persistent=True)
        made("block-dirty-bitmap-add", node="vda", name="memory")
        made("block-dirty-bitmap-add", node="vda", name="off", disabled=True)
        made.guest["vda"].write(memoryview(b"x"), 2 * GRAIN)
        yield made


def runs(machine: Machine, name: str) -> list[list[int]]:
    return machine.tracked["vda"].bitmaps[name].runs().tolist()  # type: ignore[no-any-return]


def size_told(machine: Machine) -> int:
    return int(machine("query-block")[0]["inserted"]["image"]["virtual-size"])


@pytest.mark.parametrize("size", [GROWN, CUT, 0])
def test_bitmaps_in_files_are_not_believed_any_more(machine: Machine, size: int) -> None:
    """faults rows 35 and 36, L2, L5: read whole, with the reason."""
    machine("block_resize", node_name="vda", size=size)
    told = machine.bitmap("vda", "file")
    assert (told["inconsistent"], told["x-incbak-reason"]) == (True, "resized")
    assert size_told(machine) == machine.disks["vda"].size == size


def test_a_size_that_is_no_multiple_of_a_sector(machine: Machine, tmp_path: Path) -> None:
    """It is the next one for image, clients and bitmaps alike, as in QEMU and at the next start."""
    for _ in range(2):
        machine("block_resize", node_name="vda", size=GROWN + 1)
        assert size_told(machine) == machine.disks["vda"].size == GROWN + 512
        assert machine.tracked["vda"].bitmaps["memory"].size == GROWN + 512


def test_bitmaps_in_memory_have_the_new_end(machine: Machine) -> None:
    machine("block_resize", device="vda", size=GROWN)
    assert runs(machine, "memory") == [[2, 1], [16, 4]]
    assert runs(machine, "off") == [[16, 4]]
    assert machine.bitmap("vda", "memory")["count"] == GRAIN + 3 * GRAIN + 512


def test_what_was_cut_off_and_comes_again_counts_as_written(machine: Machine) -> None:
    """A backup has the old content there, the disk has zeroes."""
    machine("block_resize", device="vda", size=CUT)
    assert runs(machine, "memory") == [[2, 1]]
    machine("block_resize", device="vda", size=SIZE)
    assert runs(machine, "memory") == [[2, 1], [9, 8]]


def test_what_is_cut_off_is_dirty_no_more(machine: Machine) -> None:
    machine.guest["vda"].write(memoryview(b"x"), 15 * GRAIN)
    machine("block_resize", device="vda", size=CUT)
    assert runs(machine, "memory") == [[2, 1]]
    assert machine.bitmap("vda", "memory")["count"] == GRAIN


def test_the_bitmap_is_durably_invalid_before_the_disk_has_another_size(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    disk, bitmap = machine.disks["vda"], machine.tracked["vda"].bitmaps["file"]
    resize = disk.resize
    monkeypatch.setattr(disk, "resize", lambda size: (seen.append(bitmap.state), resize(size)))
    machine("block_resize", device="vda", size=GROWN)
    assert seen == [State.INVALID]


def test_the_size_is_durable_before_the_answer(machine: Machine, faults: Faults) -> None:
    before = faults.seen.get("flush", 0)
    machine("block_resize", device="vda", size=GROWN)
    assert faults.seen["flush"] == before + 1
    faults.fail["flush"] = (before + 2, errno.EIO)
    with pytest.raises(QmpError):
        machine("block_resize", device="vda", size=SIZE)


def test_a_write_in_flight_is_waited_for(machine: Machine, faults: Faults) -> None:
    """Not even one that another thread has begun is cut in two."""
    stall = faults.stall["write"] = threading.Event()
    content = memoryview(b"y" * GRAIN)
    writing = threading.Thread(target=machine.guest["vda"].write, args=(content, 15 * GRAIN))
    resizing = threading.Thread(target=machine, args=("block_resize", {"device": "vda", "size": CUT}))
    disk, gate = machine.disks["vda"], machine.tracked["vda"].gate
    try:
        writing.start()
        wait_until(lambda: faults.seen["write"] == 2, "the write is under way")
        resizing.start()
        wait_until(lambda: gate._draining or disk.size == CUT, "the resize waits")
        assert disk.size == SIZE
    finally:
        stall.set()
        for thread in (writing, resizing):
            thread.join(30)
    assert disk.size == CUT


@pytest.mark.parametrize("coarse", [False, True])
def test_who_came_before_the_cut_reaches_nothing_beyond_it(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, coarse: bool
) -> None:
    """Also within the cluster in which the disk ends, also where it was written before, also during a job."""
    if coarse:
        monkeypatch.setattr(tracker, "MAP_LIMIT", 0)
    guest = machine.guest["vda"]
    machine("block_resize", device="vda", size=CUT)
    machine.target("t0", CUT)
    guest.write(memoryview(b"in"), CUT - 2)
    for with_job in (False, True):
        if with_job:
            machine("blockdev-backup", device="vda", target="t0", sync="none", job_id="j")
        for offset, length in ((CUT - 1, 2), (CUT, 1), (9 * GRAIN, GRAIN), (12 * GRAIN, 10), (SIZE - 1, 1)):
            assert guest.may_block(offset, length), "no worker would look at it"
            acts = (
                lambda o=offset, n=length: guest.write(memoryview(bytes(n)), o),
                lambda o=offset, n=length: guest.write_zeroes(o, n, unmap=True, fast=False),
                lambda o=offset, n=length: guest.trim(o, n),
            )
            for act in acts:
                with pytest.raises(OSError, match="bytes now") as caught:
                    act()
                assert caught.value.errno == errno.ENOSPC
            with pytest.raises(OSError, match="ends at"):
                guest.read_into(memoryview(bytearray(length)), offset)
            with pytest.raises(OSError, match="bytes now"):
                guest.status(offset, length, "base:allocation", 9)
    assert machine.disks["vda"].read(CUT - 2, 2) == b"in"
    assert machine.disks["vda"].size == len(machine.disks["vda"].inner.data) == CUT  # type: ignore[attr-defined]
    guest.write(memoryview(b"ok"), CUT - 2)


def test_a_map_of_a_cut_disk_never_settles_the_end() -> None:
    found = SettledMap(GRAIN + 100, (), 10 * GRAIN)
    found.settle(0, GRAIN + 100)
    assert found.holds(0, GRAIN)
    assert not found.holds(GRAIN, 100)
    assert not found.holds(GRAIN, 200)
    assert not found.holds(9 * GRAIN, GRAIN)


@pytest.mark.parametrize("why", ["job", "pending"])
def test_not_while_a_job_runs(machine: Machine, why: str) -> None:
    """faults row 37."""
    machine.target("t0", SIZE)
    more: dict[str, Any] = {"speed": 1} if why == "job" else {"auto_finalize": False}
    machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j", **more)
    with pytest.raises(QmpError, match="Node 'vda' is busy: block device is in use by block job: backup"):
        machine("block_resize", device="vda", size=GROWN)
    machine("job-cancel", id="j")
    machine.ended("j")
    assert machine.bitmap("vda", "file").get("inconsistent") is None
    machine("block_resize", device="vda", size=GROWN)
    assert size_told(machine) == GROWN


def test_where_it_fails_nothing_is_cut(machine: Machine, faults: Faults) -> None:
    faults.fail["resize"] = (1, errno.EFBIG)
    with pytest.raises(QmpError, match="File too large"):
        machine("block_resize", device="vda", size=1 << 62)
    assert size_told(machine) == SIZE
    assert runs(machine, "memory") == [[2, 1]]
    machine.guest["vda"].write(memoryview(b"x"), SIZE - 1)
    assert runs(machine, "memory") == [[2, 1], [16, 1]]


def test_the_size_that_it_has_costs_nothing(machine: Machine) -> None:
    machine("block_resize", device="vda", size=SIZE)
    assert machine.bitmap("vda", "file").get("inconsistent") is None


def test_a_device_has_the_size_that_it_has(tmp_path: Path) -> None:
    """`FileDisk` of a device, which here is a file that somebody else makes longer."""
    path = raw_image(tmp_path / "device", SIZE)
    disk = open_disk(path)
    disk.is_block = True
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="file", persistent=True)
        with pytest.raises(QmpError, match=f"device .* has {SIZE} bytes"):
            machine("block_resize", device="vda", size=GROWN)
        assert machine.bitmap("vda", "file").get("inconsistent") is None
        os.truncate(path, GROWN)
        machine("block_resize", device="vda", size=GROWN)
        assert size_told(machine) == GROWN
        assert machine.bitmap("vda", "file")["x-incbak-reason"] == "resized"
        disk.is_block = False


def test_a_read_only_disk_keeps_its_size(tmp_path: Path) -> None:
    with Machine(tmp_path, {"vda": MemoryDisk(SIZE, read_only=True)}) as machine:
        with pytest.raises(QmpError, match="read-only"):
            machine("block_resize", device="vda", size=GROWN)


# -- the process -------------------------------------------------------------------------------------------------------


def test_old_and_new_clients(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "a.raw", SIZE)
    with serving(tmp_path, {"vda": image}) as serve:
        qmp, old = serve.qmp(), serve.connect("vda")
        qmp("block_resize", device="vda", size=GROWN)
        new = serve.connect("vda")
        assert (old.size, new.size) == (SIZE, GROWN)
        new.write(b"new", GROWN - 3)
        old.write(b"old", SIZE - 3)
        qmp("block_resize", device="vda", size=CUT)
        for client in (old, new):
            with pytest.raises(NbdRequestError) as caught:
                client.write(b"lost", CUT - 1)
            assert caught.value.errno == errno.ENOSPC
            with pytest.raises(NbdRequestError):
                client.read(CUT - 1, 2)
            client.write(b"x", CUT - 1)
            assert client.read(CUT - 1, 1) == b"x"
        assert image.stat().st_size == CUT
        assert serve.connect("vda").size == CUT
        qmp.close()
        assert serve.stop() == 0


def _serve(directory: Path, **env: str) -> Serve:
    return Serve(directory, {"vda": directory / "a.raw"}, env=env)


@pytest.mark.parametrize(
    ("point", "size"),
    [("invalidated", GROWN), ("resized", GROWN), ("resized", CUT)],
)
def test_killed_between_the_steps(tmp_path: Path, point: str, size: int) -> None:
    """Whichever size it has then, and even if it is given back the old one, the bitmap is not believed."""
    image = raw_image(tmp_path / "a.raw", SIZE)
    serve = _serve(tmp_path, INCBAK_CRASH_AT=f"serve.resize-{point}")
    with closing(serve.qmp()) as qmp:
        qmp("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        with pytest.raises(Exception, match=r".*"):
            qmp("block_resize", device="vda", size=size)
        serve.process.wait(30)
    assert image.stat().st_size == (SIZE if point == "invalidated" else size)
    times = image.stat()
    os.truncate(image, SIZE)
    os.utime(image, ns=(times.st_atime_ns, times.st_mtime_ns))
    again = _serve(tmp_path)
    with closing(again.qmp()) as qmp:
        told = qmp.bitmaps("vda")["b"]
    assert again.stop() == 0
    assert (told.get("inconsistent"), told.get("x-incbak-reason")) == (True, "resized")

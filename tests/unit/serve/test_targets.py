"""Targets of jobs beside NBD nodes and raw files: qcow2 images, NBD URIs, other disks of the same VM."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from incbak import durable
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import open_disk, probe_format
from incbak.disk.memory import MemoryDisk
from incbak.errors import ImageInUseError, NbdError
from incbak.nbd.client import NbdClient
from incbak.serve import image_target
from incbak.serve.export import DiskExport
from incbak.serve.image_target import ImageTarget
from incbak.serve.jobs import TargetError
from incbak.serve.schema import QmpError
from tests.kit.need import need
from tests.kit.serve import Machine, Peer, raw_image, serving, wait_until

GRAIN = 65536
SIZE = 16 * GRAIN


def _disk(faults: Faults | None = None) -> Any:
    disk = MemoryDisk(SIZE, name="vda")
    for cluster in (1, 5, 15):
        disk.data[cluster * GRAIN : cluster * GRAIN + 1000] = os.urandom(1000)
    return FaultyDisk(disk, faults) if faults else disk


def run(machine: Machine, command: str = "drive-backup", **more: Any) -> dict[str, Any]:
    machine(command, **{"device": "vda", "sync": "full", "job_id": "j", **more})
    end = machine.ended("j")
    machine.events.clear()
    return end


def plain(image: Path) -> bytes:
    """What a qcow2 image holds, which nobody has open."""
    out = image.with_suffix(".plain")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(out)], check=True)
    return out.read_bytes()


def children() -> list[str]:
    """Command lines of qemu-nbd processes that are ours."""
    ran = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], capture_output=True, text=True, check=True)
    return [line for line in ran.stdout.splitlines() if line.startswith("qemu-nbd")]


# -- qcow2 -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    need("qemu-img", "qemu-nbd")
    made = tmp_path / "images"
    made.mkdir()
    return made


@pytest.mark.qemu
def test_a_new_image_and_an_incremental_into_it(tmp_path: Path, images: Path) -> None:
    """The story of test 124 with one image: whole, and then what changed, by its format or by its name."""
    out = images / "out.qcow2"
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        assert "error" not in run(machine, target=str(out), format="qcow2")
        assert (probe_format(out), out.stat().st_mode & 0o777) == ("qcow2", 0o600)
        assert plain(out) == machine.disks["vda"].read(0, SIZE)
        for number, more in enumerate(({"format": "qcow2"}, {})):
            machine.guest["vda"].write(memoryview(b"new"), (2 + number) * GRAIN)
            end = run(machine, target=str(out), mode="existing", sync="incremental", bitmap="b", **more)
            assert ("error" in end, end["len"]) == (False, GRAIN)
            assert plain(out) == machine.disks["vda"].read(0, SIZE)
        assert machine.bitmap("vda", "b")["count"] == 0
        assert sorted(p.name for p in images.iterdir()) == ["out.plain", "out.qcow2"]
        assert children() == []


@pytest.mark.qemu
def test_a_chain_of_images(tmp_path: Path, images: Path) -> None:
    """124: each incremental into an image of its own on the one before; each is the disk as it was then."""
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        run(machine, target=str(images / "0.qcow2"), format="qcow2")
        expected = [machine.disks["vda"].read(0, SIZE)]
        for number in (1, 2, 3):
            machine.guest["vda"].write(memoryview(bytes([number]) * GRAIN), number * GRAIN)
            expected.append(machine.disks["vda"].read(0, SIZE))
            new, base = images / f"{number}.qcow2", images / f"{number - 1}.qcow2"
            command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", str(base), str(new)]
            subprocess.run(command, check=True)
            run(machine, target=str(new), mode="existing", sync="incremental", bitmap="b")
        assert [plain(images / f"{n}.qcow2") for n in range(4)] == expected


@pytest.mark.qemu
@pytest.mark.parametrize("old", [None, b"what was there"])
def test_in_a_transaction_that_does_not_happen(tmp_path: Path, images: Path, old: bytes | None) -> None:
    """What was there is there still, no file is left, no process."""
    out = images / "out.qcow2"
    if old is not None:
        out.write_bytes(old)
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        data = {"device": "vda", "target": str(out), "sync": "full", "format": "qcow2", "job-id": "j"}
        with pytest.raises(QmpError, match="aborted"):
            machine("transaction", actions=[{"type": "drive-backup", "data": data}, {"type": "abort", "data": {}}])
        assert [p.read_bytes() for p in images.iterdir()] == ([] if old is None else [old])
        assert machine("query-jobs") == []
        assert children() == []
        run(machine, target=str(out), format="qcow2")
        assert plain(out) == machine.disks["vda"].read(0, SIZE)


@pytest.mark.qemu
def test_a_job_that_fails_leaves_no_process(tmp_path: Path, images: Path) -> None:
    faults = Faults(fail={"read": (1, errno.EIO)})
    with Machine(tmp_path, {"vda": _disk(faults)}) as machine:
        assert run(machine, target=str(images / "out.qcow2"), format="qcow2")["error"] == "Input/output error"
        assert children() == []
        open_disk(images / "out.qcow2").close()


@pytest.mark.qemu
@pytest.mark.parametrize("taken", [True, False])
def test_the_child_has_ended_when_the_target_is_let_go(images: Path, taken: bool) -> None:
    """Not a moment later: whoever hears that the job is over may open the image."""
    target = ImageTarget(images / "out.qcow2", SIZE, existing=False)
    child = target._child
    assert child is not None
    if taken:
        target.take("j")
        target.begin()
        target.write(memoryview(b"x" * GRAIN), 0)
        target.flush()
        target.release()
    else:
        target.close()
        target.withdraw()
    assert child.returncode == 0
    assert [p.name for p in images.iterdir()] == (["out.qcow2"] if taken else [])


@pytest.mark.qemu
def test_an_image_that_is_put_in_its_place_gets_nothing(images: Path) -> None:
    """QEMU's tools write to the file that was made, and its name goes to no other."""
    target = ImageTarget(images / "out.qcow2", SIZE, existing=False)
    try:
        target.take("j")
        assert target._temporary
        (images / "theirs").write_bytes(b"")
        os.replace(images / "theirs", target._temporary)
        target.write(memoryview(b"x" * GRAIN), 0)
        with pytest.raises(TargetError, match="replaced by another process"):
            target.begin()
        assert [p.stat().st_size for p in images.iterdir()] == [0]
    finally:
        target.release()


@pytest.mark.qemu
def test_an_image_in_use_is_left_alone(tmp_path: Path, images: Path) -> None:
    """Also the disk itself."""
    out = images / "out.raw"
    with Machine(tmp_path, {"vda": open_disk(raw_image(out, SIZE, b"mine"))}) as machine:
        for mode in ("absolute-paths", "existing"):
            with pytest.raises(QmpError, match="Could not open"):
                machine("drive-backup", device="vda", target=str(out), sync="full", format="qcow2", mode=mode)
        assert out.read_bytes()[:4] == b"mine"
        assert [p.name for p in images.iterdir()] == ["out.raw"]


@pytest.mark.qemu
def test_an_image_whose_users_cannot_be_seen_is_left_alone(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of another host are told by the lock alone."""
    monkeypatch.setattr(image_target, "refuse_users", lambda _: None)
    out = raw_image(images / "out.raw", SIZE, b"mine")
    with closing(open_disk(out)), Machine(tmp_path, {"vda": _disk()}) as machine:
        with pytest.raises(QmpError, match="in use"):
            machine("drive-backup", device="vda", target=str(out), sync="full", format="qcow2")
    assert out.read_bytes()[:4] == b"mine"


@pytest.mark.qemu
def test_the_new_name_is_durable_before_the_job_is_done(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = images / "out.qcow2", []
    out.write_bytes(b"old")
    sync = durable.sync_dir
    monkeypatch.setattr(durable, "sync_dir", lambda path: (seen.append((path, probe_format(out))), sync(path)))
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        run(machine, target=str(out), format="qcow2")
    assert (images, "qcow2") in seen


@pytest.mark.qemu
def test_a_link_stays_one(tmp_path: Path, images: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(images / "out.qcow2")
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        run(machine, target=str(link), format="qcow2")
        assert link.is_symlink()
        assert plain(images / "out.qcow2") == machine.disks["vda"].read(0, SIZE)


@pytest.mark.qemu
def test_the_child_dies_with_us(tmp_path: Path, images: Path) -> None:
    """Killed in the middle of a job: nobody is left who writes to the image."""
    image = raw_image(tmp_path / "a.raw", SIZE, b"x" * SIZE)
    out = images / "out.qcow2"
    with serving(tmp_path, {"vda": image}) as serve:
        with closing(serve.qmp()) as qmp:
            qmp("drive-backup", device="vda", target=str(out), sync="full", format="qcow2", speed=1)
            wait_until(out.exists, "the job has begun")
            with pytest.raises(ImageInUseError):
                open_disk(out)
            serve.stop(signal.SIGKILL)

    def free() -> bool:
        try:
            open_disk(out).close()
        except ImageInUseError:
            return False
        return True

    wait_until(free, "the lock is gone, and with it the process")


@pytest.mark.qemu
def test_without_qemus_tools_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(QmpError, match="qemu-img is not installed"):
        ImageTarget(tmp_path / "x", SIZE, existing=False)


# -- an NBD URI --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_to_an_nbd_uri(tmp_path: Path, mode: str) -> None:
    """The connection is the job's own, and gone with it."""
    peer = Peer(tmp_path / "peer.sock", MemoryDisk(SIZE))
    with Machine(tmp_path, {"vda": _disk()}) as machine:
        assert "error" not in run(machine, target=str(peer.uri), mode=mode)
        assert peer.disk.read(0, SIZE) == machine.disks["vda"].read(0, SIZE)
        wait_until(lambda: not peer.server.connections(), "the connection is gone")
        with pytest.raises(QmpError, match="different sizes"):
            machine("block_resize", device="vda", size=SIZE // 2)
            machine("drive-backup", device="vda", target=str(peer.uri), sync="full")
        wait_until(lambda: not peer.server.connections(), "the connection is gone")
    peer.stop()


# -- another disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Machine]:
    """vda, and vdb with a bitmap and no guest, which begins with other content."""
    other = MemoryDisk(SIZE, name="vdb")
    other.data[:] = b"\xff" * SIZE
    with Machine(tmp_path, {"vda": _disk(), "vdb": FaultyDisk(other, Faults())}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine("block-dirty-bitmap-add", node="vdb", name="b", persistent=True)
        machine.guest["vda"].write(memoryview(b"new"), 7 * GRAIN)
        machine.guest["vdb"].close()
        yield machine


def test_to_another_disk_whose_bitmaps_record_it(pair: Machine) -> None:
    end = run(pair, "blockdev-backup", target="vdb", sync="incremental", bitmap="b")
    assert "error" not in end
    assert pair.tracked["vdb"].bitmaps["b"].runs().tolist() == [[7, 1]]
    assert pair.disks["vdb"].read(7 * GRAIN, GRAIN) == pair.disks["vda"].read(7 * GRAIN, GRAIN)
    run(pair, "blockdev-backup", target="vdb")
    assert pair.disks["vdb"].read(0, SIZE) == pair.disks["vda"].read(0, SIZE)
    assert pair.tracked["vdb"].bitmaps["b"].runs().tolist() == [[0, 16]]


def test_a_job_of_that_disk_has_its_point_in_time(pair: Machine) -> None:
    """What the first job overwrites there is saved for the second."""
    before = pair.disks["vdb"].read(0, SIZE)
    peer = pair.target("t0", SIZE)
    pair("blockdev-backup", device="vdb", target="t0", sync="full", job_id="k", speed=1)
    run(pair, "blockdev-backup", target="vdb")
    pair("block-job-set-speed", device="k", speed=0)
    assert "error" not in pair.ended("k")
    assert peer.disk.read(0, SIZE) == before


def test_guests_are_kept_out_while_it_is_a_target(pair: Machine) -> None:
    pair("blockdev-backup", device="vda", target="vdb", sync="full", job_id="j", auto_finalize=False)
    with pytest.raises(OSError, match="job j writes to disk vdb"):
        DiskExport(pair.tracked["vdb"]).open()
    busy = "Node 'vdb' is busy: block device is in use by block job: backup"
    with pytest.raises(QmpError, match=busy):
        pair("blockdev-backup", device="vda", target="vdb", sync="full", job_id="k")
    with pytest.raises(QmpError, match=busy):
        pair("block_resize", device="vdb", size=2 * SIZE)
    wait_until(lambda: str(pair("query-jobs")[0]["status"]) == "pending", "it is pending")
    pair("job-finalize", id="j")
    pair.ended("j")
    guest = DiskExport(pair.tracked["vdb"]).open()
    with pytest.raises(QmpError, match="Node 'vdb' is busy: NBD clients that may write: 1"):
        pair("blockdev-backup", device="vda", target="vdb", sync="full", job_id="k")
    guest.close()
    run(pair, "blockdev-backup", target="vdb")


@pytest.mark.parametrize("how", ["abort", "size"])
def test_a_job_that_is_not_going_to_be_keeps_nobody_out(pair: Machine, how: str) -> None:
    data = {"device": "vda", "target": "vdb", "sync": "full"}
    if how == "size":
        pair("block_resize", device="vdb", size=2 * SIZE)
    with pytest.raises(QmpError, match="different sizes" if how == "size" else "aborted"):
        pair("transaction", actions=[{"type": "blockdev-backup", "data": data}, {"type": "abort", "data": {}}])
    DiskExport(pair.tracked["vdb"]).open().close()


def test_a_target_disk_that_fails(pair: Machine) -> None:
    faults = pair.disks["vdb"].faults  # type: ignore[attr-defined]
    faults.fail["write"] = (1, errno.ENOSPC)
    end = run(pair, "blockdev-backup", target="vdb", sync="incremental", bitmap="b")
    assert end["error"] == "No space left on device"
    assert pair.bitmap("vda", "b")["count"] == GRAIN
    del faults.fail["write"]
    faults.fail["flush"] = (1, errno.EIO)
    assert run(pair, "blockdev-backup", target="vdb", sync="incremental", bitmap="b")["error"] == "Input/output error"
    assert pair.bitmap("vda", "b")["count"] == GRAIN


def test_no_disk_is_its_own_target(pair: Machine) -> None:
    with pytest.raises(QmpError, match="Source and target cannot be the same"):
        pair("blockdev-backup", device="vdb", target="vdb", sync="full")


def test_a_guest_of_the_process_is_turned_away(tmp_path: Path) -> None:
    disks = {name: raw_image(tmp_path / name, SIZE, b"x" * GRAIN) for name in ("vda", "vdb")}
    with serving(tmp_path, disks) as serve, closing(serve.qmp()) as qmp:
        qmp("blockdev-backup", device="vda", target="vdb", sync="full", job_id="j", auto_finalize=False)
        wait_until(lambda: qmp("query-jobs")[0]["status"] == "pending", "it is pending")
        with closing(NbdClient.connect(serve.uri("vdb"))) as guest, pytest.raises(NbdError):
            guest.read(0, 1)
        qmp("job-finalize", id="j")
        qmp.wait_event("BLOCK_JOB_COMPLETED")
        with closing(NbdClient.connect(serve.uri("vdb"))) as guest:
            assert guest.read(0, 1) == b"x"

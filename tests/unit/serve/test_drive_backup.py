"""``drive-backup``: what it may write to, and that nothing is lost where it may not."""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from incbak import durable
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.memory import MemoryDisk
from incbak.serve import file_target
from incbak.serve.schema import QmpError
from tests.kit.devices import loop_device
from tests.kit.need import need, need_root
from tests.kit.serve import Machine, holding, wait_until

GRAIN = 65536
SIZE = 16 * GRAIN + 512


def machine_of(tmp_path: Path, faults: Faults | None = None) -> Machine:
    disk = MemoryDisk(SIZE, name="vda")
    disk.write(b"old" * 1000, 3 * GRAIN)
    return Machine(tmp_path, {"vda": FaultyDisk(disk, faults) if faults else disk})


def run(machine: Machine, target: Path, **more: Any) -> dict[str, Any]:
    machine("drive-backup", device="vda", target=str(target), **{"sync": "full", **more})
    return machine.ended(more.get("job_id", "vda"))


@pytest.mark.parametrize("sync", ["full", "top"])
def test_to_a_new_file(tmp_path: Path, sync: str) -> None:
    """Its holes are holes there too; nobody else may read it; the job's lock is gone with the job."""
    with machine_of(tmp_path) as machine:
        out = tmp_path / "out.raw"
        end = run(machine, out, sync=sync, format="raw")
        assert "error" not in end
        assert end["offset"] == end["len"] == SIZE
        assert out.read_bytes() == machine.disks["vda"].read(0, SIZE)
        assert out.stat().st_mode & 0o777 == 0o600
        open_disk(out).close()


def test_the_point_in_time_is_that_of_the_command(tmp_path: Path) -> None:
    faults = Faults(stall={"read": threading.Event()})
    with machine_of(tmp_path, faults) as machine:
        before = b"old" * 1000
        machine("drive-backup", device="vda", target=str(tmp_path / "out"), sync="full")
        faults.stall["read"].set()
        machine.guest["vda"].write(memoryview(b"new" * 1000), 3 * GRAIN)
        machine.ended("vda")
        assert (tmp_path / "out").read_bytes()[3 * GRAIN :][: len(before)] == before


@pytest.mark.parametrize("length", [0, 5 * GRAIN, 40 * GRAIN])
def test_over_a_file_that_is_there(tmp_path: Path, length: int) -> None:
    """Nothing of it is left, whatever its size was."""
    out = tmp_path / "out.raw"
    out.write_bytes(b"\xff" * length)
    with machine_of(tmp_path) as machine:
        assert "error" not in run(machine, out)
        assert out.read_bytes() == machine.disks["vda"].read(0, SIZE)


def test_incremental_into_an_existing_file(tmp_path: Path) -> None:
    out = tmp_path / "out.raw"
    with machine_of(tmp_path) as machine:
        run(machine, out)
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.guest["vda"].write(memoryview(b"new" * 1000), 7 * GRAIN)
        end = run(machine, out, sync="incremental", bitmap="b", mode="existing", job_id="j")
        assert end["len"] == GRAIN
        assert out.read_bytes() == machine.disks["vda"].read(0, SIZE)
        assert machine.bitmap("vda", "b")["count"] == 0


def test_in_a_transaction_that_does_not_happen(tmp_path: Path) -> None:
    """A file that was there is as it was, one that was not is not."""
    there, new = tmp_path / "there", tmp_path / "new"
    there.write_bytes(b"precious")
    with machine_of(tmp_path) as machine:
        for target in (there, new):
            data = {"device": "vda", "target": str(target), "sync": "full"}
            actions = [{"type": "drive-backup", "data": data}, {"type": "abort", "data": {}}]
            with pytest.raises(QmpError, match="aborted"):
                machine("transaction", actions=actions)
        assert there.read_bytes() == b"precious"
        assert not new.exists()
        assert machine("query-jobs") == []
        assert "error" not in run(machine, there)


def test_another_node_of_a_served_device_is_no_target(tmp_path: Path) -> None:
    need_root()
    image, node = tmp_path / "vda.raw", tmp_path / "node"
    image.write_bytes(b"x" * SIZE)
    with loop_device(image) as device:
        os.mknod(node, 0o600 | stat.S_IFBLK, device.stat().st_rdev)
        with Machine(tmp_path, {"vda": open_disk(device), "vdb": MemoryDisk(SIZE)}) as machine:
            for target in (device, node, image):
                with pytest.raises(QmpError, match="in use"):
                    machine(
                        "drive-backup", device="vdb", target=str(target), sync="full", mode="existing", format="raw"
                    )
    assert image.read_bytes() == b"x" * SIZE


def test_a_file_whose_users_cannot_be_seen_is_no_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of another host are told by the lock alone."""
    monkeypatch.setattr(file_target, "refuse_users", lambda _: None)
    out = tmp_path / "out.raw"
    out.write_bytes(b"x" * SIZE)
    with closing(open_disk(out)), machine_of(tmp_path) as machine:
        for mode in ("existing", "absolute-paths"):
            with pytest.raises(QmpError, match="in use"):
                machine("drive-backup", device="vda", target=str(out), sync="full", mode=mode, format="raw")
    assert out.read_bytes() == b"x" * SIZE


def test_the_disk_itself_is_no_target(tmp_path: Path) -> None:
    """By no name of it, nor an image that a reader holds: its lock is looked at before it is touched."""
    image = tmp_path / "vda.raw"
    image.write_bytes(b"x" * SIZE)
    (tmp_path / "other-name").hardlink_to(image)
    (tmp_path / "link").symlink_to(image)
    with Machine(tmp_path, {"vda": open_disk(image)}) as machine:
        for name in ("vda.raw", "other-name", "link"):
            for mode in ("existing", "absolute-paths"):
                with pytest.raises(QmpError, match="in use"):
                    more = {"sync": "full", "mode": mode, "format": "raw"}
                    machine("drive-backup", device="vda", target=str(tmp_path / name), **more)
        assert image.read_bytes() == b"x" * SIZE
        assert machine("query-jobs") == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "vmdk"}, "Parameter 'format' does not support 'vmdk'"),
        ({"target": "http://host/x"}, "Parameter 'target' expects the path of a file"),
        ({"target": "nbd://host/x", "format": "qcow2"}, "Parameter 'target' expects the path of a file"),
        ({"target": "nbd+unix:///x?socket={dir}/none"}, "Failed to connect to '.*/none': No such file or directory"),
        ({"target": "nbd+unix:///x"}, "Could not open '.*': no socket in"),
        ({"target": "{dir}/none/x", "format": "qcow2"}, "Could not create '.*/none/x': No such file or directory"),
        ({"target": "{dir}/fifo", "format": "qcow2"}, "Could not create '.*/fifo': not a file"),
        ({"target": "{dir}/none", "format": "qcow2", "mode": "existing"}, "Could not open '.*/none': .*No such file"),
        ({"target": "{dir}/small", "format": "qcow2", "mode": "existing"}, "Could not open '.*/small': .*not in qcow2"),
        ({"target": "a\0b"}, "Parameter 'target' expects a path"),
        ({"target": "{dir}"}, "Could not open .*: (cannot open image .*Is a directory|.*neither a file)"),
        ({"target": "{dir}/none/x"}, "Could not create '.*/none/x': No such file or directory"),
        ({"target": "{dir}/none", "mode": "existing", "format": "raw"}, "cannot open image .*/none: No such file"),
        ({"target": "{dir}/small", "mode": "existing"}, "'format' is missing: .*'.*/small' is not guessed"),
        (
            {"target": "{dir}/small", "mode": "existing", "format": "raw"},
            "Source and target image have different sizes",
        ),
        ({"target": "{dir}/x.qcow2", "mode": "existing", "format": "raw"}, "is a qcow2 image, only raw"),
        ({"target": "{dir}/x.qcow2", "mode": "existing"}, "Could not open '.*/x.qcow2': .*Unsupported qcow2 version"),
        ({"target": "{dir}/fifo", "mode": "absolute-paths"}, "neither a file nor a block device|No such device"),
        ({"target": "/dev/no-such-disk"}, "nothing is made below /dev"),
        ({"target": "/dev/no-such-disk", "format": "qcow2"}, "nothing is made below /dev"),
        ({"sync": "none"}, "Parameter 'sync' does not support 'none'"),
        ({"sync": "bitmap"}, "must provide a valid bitmap name for 'bitmap' sync mode"),
        ({"on-source-error": "stay"}, "Parameter 'on-source-error' does not accept value 'stay'"),
        ({"mode": "other"}, "Parameter 'mode' does not accept value 'other'"),
        ({"job-id": "1x"}, "Invalid job ID '1x'"),
        ({"speed": -1}, "Parameter 'speed' expects a non-negative value"),
        ({"filename": "x"}, "Parameter 'filename' is unexpected"),
    ],
)
def test_what_cannot_be(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    """Refused by name, and no file is made, emptied or left."""
    (tmp_path / "small").write_bytes(b"small")
    (tmp_path / "x.qcow2").write_bytes(b"QFI\xfb" + bytes(SIZE - 4))
    os.mkfifo(tmp_path / "fifo")
    with machine_of(tmp_path) as machine:
        before = sorted(p.name for p in tmp_path.iterdir())
        given: dict[str, Any] = {"device": "vda", "sync": "full", "target": "{dir}/out", **arguments}
        given["target"] = given["target"].replace("{dir}", str(tmp_path))
        with pytest.raises(QmpError, match=message):
            machine("drive-backup", given)
        assert sorted(p.name for p in tmp_path.iterdir()) == before
        assert (tmp_path / "small").read_bytes() == b"small"
        assert machine("query-jobs") == []


@pytest.mark.parametrize("magic", [b"QFI\xfb\0\0\0\3", b"conectix", b"LUKS\xba\xbe"])
@pytest.mark.parametrize("name", ["out", "out.raw"])
def test_the_format_of_an_existing_file_is_not_its_content(tmp_path: Path, magic: bytes, name: str) -> None:
    """It is that of a guest, which could have root open other files, or stop the backups of its own disk."""
    out = tmp_path / name
    with machine_of(tmp_path) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        machine.guest["vda"].write(memoryview(magic), 0)
        run(machine, out, format="raw")
        for number in (1, 2):
            machine.guest["vda"].write(memoryview(b"new"), number * GRAIN)
            given = {"sync": "incremental", "bitmap": "b", "mode": "existing", "job_id": "j"}
            if name == "out":
                with pytest.raises(QmpError, match=r"'format' is missing: .* is not guessed by its content"):
                    machine("drive-backup", device="vda", target=str(out), **given)
                given["format"] = "raw"
            assert "error" not in run(machine, out, **given)
            assert out.read_bytes() == machine.disks["vda"].read(0, SIZE)


@pytest.mark.root
@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_a_file_that_another_process_has_open_is_left_alone(tmp_path: Path, form: str, mode: str) -> None:
    """Without locks, as a QEMU may; its image would be overwritten, or be another file than the one of that name."""
    need_root()
    need("qemu-img", "qemu-nbd")
    out = tmp_path / "out"
    out.write_bytes(b"theirs" + bytes(SIZE - 6))
    with machine_of(tmp_path) as machine, holding(out, "rb") as pid:
        with pytest.raises(QmpError, match=f"in use: process {pid} "):
            machine("drive-backup", device="vda", target=str(out), sync="full", format=form, mode=mode)
        assert out.read_bytes()[:6] == b"theirs"
        assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "state"]


@pytest.mark.root
def test_a_file_that_another_user_planted_is_not_filled(tmp_path: Path) -> None:
    """Whoever made it may have it open, and would read the disk there; a target that is meant is ``existing``."""
    need_root()
    planted = tmp_path / "out.raw"
    planted.write_bytes(bytes(SIZE))
    os.chown(planted, 65534, 65534)
    with machine_of(tmp_path) as machine:
        with pytest.raises(QmpError, match="of another user"):
            machine("drive-backup", device="vda", target=str(planted), sync="full")
        assert planted.read_bytes() == bytes(SIZE)
        assert "error" not in run(machine, planted, mode="existing", format="raw")


@pytest.mark.root
@pytest.mark.parametrize("form", ["raw", "qcow2"])
@pytest.mark.parametrize("mode", ["absolute-paths", "existing"])
def test_a_link_that_another_user_planted_is_not_followed(tmp_path: Path, form: str, mode: str) -> None:
    need_root()
    victim, link = tmp_path / "victim", tmp_path / "out"
    victim.write_bytes(b"mine" + bytes(SIZE - 4))
    link.symlink_to(victim)
    os.lchown(link, 65534, 65534)
    with machine_of(tmp_path) as machine:
        with pytest.raises(QmpError, match="link of another user"):
            machine("drive-backup", device="vda", target=str(link), sync="full", format=form, mode=mode)
        assert victim.read_bytes() == b"mine" + bytes(SIZE - 4)


@pytest.mark.parametrize("mode", ["always", "on-success"])
def test_a_file_that_cannot_be_written(tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job fails with the file's error, at the target; no bit is lost of what is not there."""
    count = 0

    def full(self: FileDisk, buf: memoryview | bytes, offset: int) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        os.pwrite(self.fd, buf, offset)

    monkeypatch.setattr(FileDisk, "write", full)
    with machine_of(tmp_path) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b")
        for cluster in (2, 5, 8):
            machine.guest["vda"].write(memoryview(b"x"), cluster * GRAIN)
        end = run(machine, tmp_path / "out", sync="bitmap", bitmap="b", bitmap_mode=mode)
        assert end["error"] == "No space left on device"
        errors = [d for e, d in machine.events if e == "BLOCK_JOB_ERROR"]
        assert errors == [{"device": "vda", "operation": "write", "action": "report"}]
        left = {first for first, _ in machine.tracked["vda"].bitmaps["b"].runs().tolist()}
        assert left == ({5, 8} if mode == "always" else {2, 5, 8})


def test_a_new_file_has_a_durable_name_before_the_job_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    sync, flush = durable.sync_dir, FileDisk.flush

    def sync_dir(path: Path) -> None:
        said.append(f"directory {path}")
        sync(path)

    def flushes(self: FileDisk) -> None:
        said.append(f"file {self.name}")
        flush(self)

    with machine_of(tmp_path) as machine:
        monkeypatch.setattr(durable, "sync_dir", sync_dir)
        monkeypatch.setattr(FileDisk, "flush", flushes)
        run(machine, tmp_path / "out")
        assert said == [f"directory {tmp_path}", f"file {tmp_path / 'out'}"]


def test_pause_and_resume(tmp_path: Path) -> None:
    """A job that rests copies nothing, keeps its instant, and is cancelled by force only."""
    with machine_of(tmp_path) as machine:
        machine("drive-backup", device="vda", target=str(tmp_path / "out"), sync="full", speed=1)
        machine("job-pause", id="vda")
        with pytest.raises(QmpError, match="Job is already paused"):
            machine("block-job-pause", device="vda")
        wait_until(lambda: machine("query-jobs")[0]["status"] == "paused", "the job rests")
        info = machine("query-block-jobs")[0]
        assert (info["paused"], info["busy"], info["status"]) == (True, False, "paused")
        with pytest.raises(QmpError, match="The block job for device 'vda' is currently paused"):
            machine("block-job-cancel", device="vda")
        machine("block-job-set-speed", device="vda", speed=0)
        machine.guest["vda"].write(memoryview(b"new" * 1000), 3 * GRAIN)
        done = machine("query-jobs")[0]["current-progress"]
        with pytest.raises(QmpError, match="cannot accept command verb 'complete'"):
            machine("job-complete", id="vda")
        assert machine("query-jobs")[0]["current-progress"] == done
        machine("block-job-resume", device="vda")
        assert "error" not in machine.ended("vda")
        assert (tmp_path / "out").read_bytes()[3 * GRAIN :][:3000] == b"old" * 1000
        turns = [d["status"] for e, d in machine.events if e == "JOB_STATUS_CHANGE"]
        assert turns[:4] == ["created", "running", "paused", "running"]
        with pytest.raises(QmpError, match="Job not found"):
            machine("job-resume", id="vda")


@pytest.mark.parametrize("kind", ["read", "flush"])
def test_a_job_is_not_done_while_it_is_paused(tmp_path: Path, kind: str) -> None:
    """Paused while it reads, or when all is copied but not flushed; then forced to end."""
    faults = Faults(stall={kind: threading.Event()})
    with machine_of(tmp_path, faults) as machine:
        machine("drive-backup", device="vda", target=str(tmp_path / "out"), sync="full")
        wait_until(lambda: faults.seen.get(kind), "the job is there")
        machine("job-pause", id="vda")
        with pytest.raises(QmpError, match="Can't resume a job that was not paused"):
            machine("job-resume", id="vda")
            machine("job-resume", id="vda")
        machine("job-pause", id="vda")
        faults.stall[kind].set()
        wait_until(lambda: machine("query-jobs")[0]["status"] == "paused", "the job rests")
        machine("block-job-cancel", device="vda", force=True)
        machine.ended("vda")
        assert [e for e, _ in machine.events if e.startswith("BLOCK_JOB_C")] == ["BLOCK_JOB_CANCELLED"]

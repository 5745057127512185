"""Other programs in the same QEMU: external snapshots, filters and second writers. No guest is booted."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cli import Incbak, differing
from tests.kit.guest import Guest, GuestDisk, need_guest
from tests.kit.live import (
    assert_written,
    backup_jobs,
    content_of,
    device_write,
    eventually,
    ours_in,
    qcow2_image,
    unproven_write,
)
from tests.kit.need import need
from tests.kit.serve import raw_image, wait_until

pytestmark = pytest.mark.kvm
SIZE = 8 << 20
SLOW = ("--speed-limit", "3M")


class Vm:
    """A VM with one qcow2 disk, which waits before its first instruction, and a backup under way."""

    def __init__(self, root: Path) -> None:
        self.incbak = Incbak(root)
        self.incbak("init")
        self.image = qcow2_image(root / "vda.qcow2", SIZE)
        fill = ["qemu-io", "-f", "qcow2", "-c", f"write -P 7 0 {SIZE}", self.image]
        subprocess.run(fill, check=True, capture_output=True, timeout=20)
        self.guest = Guest(root / "guest", [GuestDisk("vda", self.image, format="qcow2")], arguments=["-S"])
        self.overlay = root / "overlay.qcow2"

    def start(self) -> subprocess.Popen[str]:
        """Begin a full; return when its job copies."""
        process = self.incbak.popen("full", f"qmp:{self.guest.monitor}", "--name", "vm", *SLOW)
        eventually(lambda: backup_jobs(self.guest.qmp), 20, "a job")
        return process

    def top(self) -> str:
        """The node below the device."""
        return str(self.guest.qmp("query-block")[0]["inserted"]["node-name"])

    def snapshot(self, node: str) -> None:
        """An external snapshot, as snapshot scripts and libvirt take it."""
        names = {"node_name": node, "snapshot_file": str(self.overlay), "snapshot_node_name": "theirs"}
        self.guest.qmp("blockdev-snapshot-sync", 20, **names, format="qcow2")


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    need_guest()
    made = Vm(tmp_path)
    yield made
    made.guest.kill()


@pytest.mark.parametrize("where", ["image", "filter"])
def test_an_external_snapshot_during_a_backup(vm: Vm, where: str) -> None:
    """Of the image's node, or of the top node, which is our filter then: the guest's writes stay in the overlay."""
    before = content_of(vm.image)
    process = vm.start()
    vm.snapshot("vda" if where == "image" else vm.top())
    unproven_write(vm.guest.qmp, "vda-dev", 9, 65536, 65536)
    _, err = process.communicate(timeout=60)
    assert (ours_in(vm.guest), vm.top()) == ([], "theirs"), err
    if where == "image":
        assert process.returncode == 0, err
        assert differing(vm.incbak.restored(disk="vda-dev"), before) == []
    else:  # QEMU itself ends the reading of the point in time
        assert "the point in time cannot be read" in err
    overlay = vm.overlay, "qcow2"
    device_write(vm.guest.qmp, "vda-dev", overlay, 10, 0, 65536)
    assert_written(overlay, 9, 65536, 65536)
    vm.guest.quit()
    header = json.loads(subprocess.check_output(["qemu-img", "info", "--output=json", vm.overlay], timeout=20))
    assert (header["full-backing-filename"], header["backing-filename-format"]) == (str(vm.image), "qcow2")
    assert content_of(vm.image) == before


def test_a_filter_that_another_program_builds_on_is_told_and_goes_with_the_next_run(vm: Vm) -> None:
    process = vm.start()
    ours = vm.top()
    vm.guest.qmp("object-add", 20, qom_type="throttle-group", id="group")
    vm.guest.qmp("blockdev-add", 20, driver="throttle", node_name="limit", throttle_group="group", file=ours)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3, err
    assert "is made, but a part of it is still in the VM's QEMU" in err
    assert "limit uses node" in err
    vm.guest.qmp("blockdev-del", 20, node_name="limit")
    vm.guest.qmp("cont")  # only then QEMU closes scratch files
    vm.incbak("incremental", f"qmp:{vm.guest.monitor}", "--name", "vm")
    assert ours_in(vm.guest) == []


def test_a_write_that_fails_is_seen_by_the_tests(tmp_path: Path) -> None:
    """QEMU's answer is the same: these tests must not be blind."""
    need_guest()
    image = raw_image(tmp_path / "vdb.raw", SIZE)
    fault = [{"event": "none", "iotype": "write", "errno": 5, "once": True}]
    blkdebug = {"driver": "blkdebug", "image": {"driver": "file", "filename": str(image)}, "inject-error": fault}
    node = {"driver": "raw", "node-name": "vdb", "file": blkdebug}
    arguments = ["-S", "-blockdev", json.dumps(node), "-device", "virtio-blk-pci,drive=vdb,id=vdb-dev"]
    disks = [GuestDisk("vda", raw_image(tmp_path / "vda.raw", SIZE))]
    with Guest(tmp_path / "guest", disks, arguments=arguments) as guest:
        with pytest.raises(AssertionError, match="a write failed"):
            device_write(guest.qmp, "vdb-dev", (image, "raw"), 5, 0, 65536)
        device_write(guest.qmp, "vdb-dev", (image, "raw"), 5, 0, 65536)


def test_disks_that_others_write_to_are_left_out_and_the_guest_lives(tmp_path: Path) -> None:
    """Two devices on one node, a writable export, and SCSI commands passed through; another disk is backed up."""
    need_guest()
    incbak = Incbak(tmp_path)
    incbak("init")
    images = {n: raw_image(tmp_path / f"{n}.raw", SIZE, n.encode() * 1000) for n in ("vda", "vdb", "vdc", "vdd")}
    twin = ["-device", "virtio-blk-pci,drive=vdb,id=twin,share-rw=on"]
    arguments = ["-S", *_shared(images["vdb"], "vdb"), *twin, *_shared(images["vdc"], "vdc")]
    node = {"driver": "raw", "node-name": "vdd", "file": {"driver": "file", "filename": str(images["vdd"])}}
    passed = "virtio-blk-pci,drive=vdd,id=vdd-dev,scsi=on,disable-modern=on,disable-legacy=off"
    arguments += ["-blockdev", json.dumps(node), "-device", passed]
    with Guest(tmp_path / "guest", [GuestDisk("vda", images["vda"])], arguments=arguments) as guest:
        guest.qmp("nbd-server-start", 20, addr={"type": "unix", "data": {"path": str(tmp_path / "nbd")}})
        guest.qmp("block-export-add", 20, type="nbd", id="e", node_name="vdc", writable=True)
        (made,) = incbak("--json", "full", f"qmp:{guest.monitor}", "--name", "vm").objects()
        assert [d["name"] for d in made["disks"]] == ["vda-dev"]
        notes = "; ".join(made["notes"])
        assert all(f"disk {n} was left out" in notes for n in ("vdb-dev", "twin", "vdc-dev", "vdd-dev"))
        ran = incbak.run("full", f"qmp:{guest.monitor}", "--name", "vm", "--disk", "vdc-dev")
        assert (ran.code, "share-rw=on" in ran.err) == (2, True)
        assert guest.process.poll() is None
        assert ours_in(guest) == []


def test_a_disk_outside_of_the_block_layer_is_said_to_be_left_out(tmp_path: Path) -> None:
    """An NVDIMM and a vhost-user disk, with and without an id; they are backed up by nobody."""
    need_guest()
    need("qemu-storage-daemon")
    incbak = Incbak(tmp_path)
    incbak("init")
    sock, data, nv = tmp_path / "vu", tmp_path / "data.raw", tmp_path / "nv.raw"
    for path in (data, nv):
        raw_image(path, 16 << 20)
    export = f"vhost-user-blk,id=e,node-name=f,writable=on,addr.type=unix,addr.path={sock}"
    daemon = ["qemu-storage-daemon", "--blockdev", f"file,node-name=f,filename={data}", "--export", export]
    arguments = ["-S", "-machine", "pc,nvdimm=on,memory-backend=ram", "-m", "64,slots=2,maxmem=1G"]
    arguments += ["-object", "memory-backend-memfd,id=ram,size=64M,share=on"]
    arguments += ["-object", f"memory-backend-file,id=m,share=on,mem-path={nv},size=16M"]
    arguments += ["-device", "nvdimm,memdev=m", "-chardev", f"socket,id=c,path={sock}"]
    arguments += ["-device", "vhost-user-blk-pci,chardev=c,id=data"]
    with subprocess.Popen(daemon) as server:
        try:
            wait_until(sock.exists, "the daemon listens")
            vda = raw_image(tmp_path / "vda.raw", SIZE)
            with Guest(tmp_path / "guest", [GuestDisk("vda", vda)], arguments=arguments) as guest:
                ran = incbak.run("--json", "full", f"qmp:{guest.monitor}", "--name", "vm")
                (made,) = ran.objects()
                notes = "; ".join(made["notes"])
                for name, why in (("data", "vhost-user"), ("device[", "NVDIMM")):
                    assert f"disk {name}" in notes
                    assert why in notes
                    assert f"disk {name}" in ran.err
        finally:
            server.terminate()


def _shared(image: Path, name: str) -> list[str]:
    node = {"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": str(image)}}
    return ["-blockdev", json.dumps(node), "-device", f"virtio-blk-pci,drive={name},id={name}-dev,share-rw=on"]

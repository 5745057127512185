"""A VM that changes between backups, that dies in one, or whose runner dies while it is stopped. No guest is booted."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.kit.cli import Incbak, content
from tests.kit.guest import Guest, GuestDisk, Target, need_guest
from tests.kit.guest_targets import MemoryTarget, chain_of
from tests.kit.live import Chain, Writes, backup_jobs, bitmaps_of, eventually, ours_in, running
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SIZE = 16 << 20
NOBODY = Writes("nobody", 0, [Target("vda")], slots=1)


class Vm:
    """A VM with two raw disks, which waits before its first instruction."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = {
            n: raw_image(root / f"{n}.raw", SIZE, random.Random(n).randbytes(1 << 20)) for n in ("vda", "vdb")
        }
        self.guest = Guest(
            root / "guest", [GuestDisk(n, i, iothread=True) for n, i in self.images.items()], arguments=["-S"]
        )
        self.chain = Chain(Incbak(root), NOBODY)
        self.chain.incbak("init")

    def reasons(self, kind: str = "incremental") -> dict[str, str | None]:
        """Of a backup's disks; what it restores to is what they are."""
        made = self.chain.back_up(self.guest, kind)
        assert self.chain.differs({n.removesuffix("-dev"): self.images[n.removesuffix("-dev")] for n in made}) == {}
        return {name: disk["reason"] for name, disk in made.items()}


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    need_guest()
    made = Vm(tmp_path)
    yield made
    made.guest.kill()


def test_a_disk_is_resized_added_and_removed(vm: Vm) -> None:
    assert vm.reasons("full") == {"vda-dev": None, "vdb-dev": None}
    vm.guest.qmp("block_resize", 20, node_name="vdb", size=2 * SIZE)
    assert vm.reasons() == {"vda-dev": None, "vdb-dev": "resized"}
    vm.images["vdc"] = raw_image(vm.root / "vdc.raw", SIZE, b"new" * 30000)
    vm.guest.qmp(
        "blockdev-add", 20, node_name="vdc", driver="raw", file={"driver": "file", "filename": str(vm.images["vdc"])}
    )
    vm.guest.qmp("device_add", 20, driver="virtio-blk-pci", drive="vdc", id="vdc-dev")
    assert vm.reasons() == {"vda-dev": None, "vdb-dev": None, "vdc-dev": "new-disk"}
    assert vm.reasons() == {"vda-dev": None, "vdb-dev": None, "vdc-dev": None}
    assert ours_in(vm.guest) == []


def test_a_disk_cannot_be_resized_under_a_backup(vm: Vm) -> None:
    """Row 37: refused by QEMU, or the backup fails; here the point in time stays whole."""
    process = vm.chain.incbak.popen("full", f"qmp:{vm.guest.monitor}", "--name", "vm", "--speed-limit", "4M")
    eventually(lambda: backup_jobs(vm.guest.qmp), 20, "a job")
    before = content(vm.images["vda"])
    try:
        vm.guest.qmp("block_resize", 20, node_name="vda", size=2 * SIZE)
    except Exception as e:  # noqa: BLE001 - any refusal will do
        assert "resize" in str(e)  # noqa: PT017
    _, err = process.communicate(timeout=60)
    assert "Traceback" not in err
    if process.returncode == 0:
        assert content(vm.chain.restore() / "vda-dev.raw") == before
    else:
        assert process.returncode in (1, 3), err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--scratch-dir", "/nonexistent"), "scratch"),
        (("--scratch-limit", "1K"), "cannot make the scratch file"),
        (("--disk", "vdz"), "there is no disk 'vdz'"),
        (("--scratch-dir", "/proc"), "scratch"),
    ],
)
def test_what_cannot_be_begun_leaves_nothing(vm: Vm, options: tuple[str, ...], said: str) -> None:
    ran = vm.chain.incbak.run("full", f"qmp:{vm.guest.monitor}", "--name", "vm", *options)
    assert ran.code in (1, 2)
    assert said in ran.err
    assert ours_in(vm.guest) == []
    assert bitmaps_of(vm.guest, "vda") == []
    assert not running(vm.guest)


def test_a_dry_run_says_what_and_why_and_changes_nothing(vm: Vm) -> None:
    command = ("--json", "incremental", f"qmp:{vm.guest.monitor}", "--name", "vm", "--dry-run")
    before = vm.chain.incbak(*command).objects()
    assert {(d["disk"], d["kind"], d["reason"]) for d in before} == {
        ("vda-dev", "full", "no-base"),
        ("vdb-dev", "full", "no-base"),
    }
    assert bitmaps_of(vm.guest, "vda") == []
    vm.reasons("full")
    (held,) = bitmaps_of(vm.guest, "vda")
    assert {(d["disk"], d["kind"]) for d in vm.chain.incbak(*command).objects()} == {
        ("vda-dev", "incremental"),
        ("vdb-dev", "incremental"),
    }
    assert bitmaps_of(vm.guest, "vda") == [held]
    assert len(vm.chain.incbak.list()) == 1


def test_qemu_is_killed_during_a_backup(vm: Vm) -> None:
    process = vm.chain.incbak.popen("full", f"qmp:{vm.guest.monitor}", "--name", "vm", "--speed-limit", "2M")
    eventually(lambda: backup_jobs(vm.guest.qmp), 20, "a job")
    vm.guest.process.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "the engine went away" in err
    assert "Traceback" not in err
    assert vm.chain.incbak.list() == []


_HANGS = """
import sys, time
from incbak.engine import qemu_filter
async def insert(self):
    print("stopped", flush=True)
    time.sleep(60)
qemu_filter.DiskFilter.insert = insert
from incbak.cli.main import main
main()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_vm_never_stays_stopped(vm: Vm, killed: bool) -> None:
    """With two disks the VM is stopped for the point in time. The runner hangs there, and is killed or not."""
    vm.guest.qmp("cont")
    process = _hanging(vm)
    assert process.stdout
    assert process.stdout.readline() == b"stopped\n"
    assert not running(vm.guest)
    begun = time.monotonic()
    if killed:
        process.send_signal(signal.SIGKILL)
    eventually(lambda: running(vm.guest), 2.0 if killed else 12.0, "the VM runs again")
    assert killed or time.monotonic() - begun > 5
    process.kill()
    process.communicate()
    assert vm.chain.back_up(vm.guest, "full")
    assert ours_in(vm.guest) == []


def test_a_paused_vm_is_not_resumed_by_the_guard(vm: Vm) -> None:
    process = _hanging(vm)
    assert process.stdout
    process.stdout.readline()
    process.kill()
    process.communicate()
    time.sleep(1)
    assert vm.guest.qmp("query-status")["status"] == "prelaunch"
    vm.chain.back_up(vm.guest, "full")
    assert not running(vm.guest)
    vm.guest.qmp("cont")
    vm.chain.back_up(vm.guest)  # only now QEMU closes the dead run's scratch files
    assert ours_in(vm.guest) == []


def test_a_reset_does_not_wait_for_a_sink_that_stalls(vm: Vm) -> None:
    """Nor does a job that ends in the midst of it harm QEMU, which has I/O threads here."""
    vm.guest.qmp("cont")
    chain = chain_of(f"qmp:{vm.guest.monitor}", vm.root)
    took = []

    def reset(targets: Mapping[str, MemoryTarget]) -> None:
        for target in targets.values():
            target.stall()
        eventually(lambda: len(backup_jobs(vm.guest.qmp)) == 2, 20, "two jobs")
        begun = time.monotonic()
        vm.guest.qmp("system_reset", 40)
        took.append(time.monotonic() - begun)

    chain.during = reset
    for _ in range(2):
        with pytest.raises(AssertionError, match="may have been waiting for the copy"):
            chain.full()
        assert took.pop() < 12
        assert running(vm.guest)
    chain.during = None
    chain.full()
    assert ours_in(vm.guest) == []


def _hanging(vm: Vm) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _HANGS, "full", f"qmp:{vm.guest.monitor}", "--name", "vm"]
    environment = vm.chain.incbak.environment({"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

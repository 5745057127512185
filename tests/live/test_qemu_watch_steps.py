"""``incbak watch`` step by step: deaths at each of them, and what it finds when it comes. No guest is booted."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.kit.guest import need_guest
from tests.kit.live import device_write, eventually, running
from tests.kit.need import missing, need, need_root
from tests.kit.serve import raw_image, serving
from tests.kit.watch import CLUSTER, WatchedVm

pytestmark = pytest.mark.kvm
SIZE = 64 << 20
WHOLE = SIZE // CLUSTER
LOADING = ("watch.invalidated", "watch.recording", "watch.filled", "watch.loaded")
SAVING_IN_QEMU = ("watch.read", "watch.quitting")
NOTHING_SAVED = ("watch.gone", "saved.filled", "saved.closed")
ALL_SAVED = ("saved.named", "watch.written", "watch.saved")


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[WatchedVm]:
    need_guest()
    made = WatchedVm(tmp_path, "vda", size=SIZE)
    yield made
    made.close()


def saved(vm: WatchedVm, *clusters: int) -> None:
    """A full backup, writes of ``clusters``, and a shutdown after which they are in the file."""
    watch = vm.begin()
    vm.back_up("full")
    vm.poke("vda", *clusters)
    vm.fall_down(watch)
    assert vm.files() == {"vda": "clean"}


def plug(vm: WatchedVm, name: str, image: Path) -> None:
    """A raw disk more, while the VM runs."""
    file = {"driver": "file", "filename": str(image)}
    vm.qmp("blockdev-add", 20, node_name=name, driver="raw", file=file)
    vm.qmp("device_add", 20, driver="virtio-blk-pci", drive=name, id=f"{name}-dev")


@pytest.mark.parametrize("point", LOADING)
def test_watch_is_killed_while_it_loads(vm: WatchedVm, point: str) -> None:
    """Who comes next finds the VM still paused; what was not loaded is read whole, and never half of it believed."""
    saved(vm, 3, 77)
    vm.start()
    assert vm.watch("--start", env={"INCBAK_CRASH_AT": point}).ended() == -signal.SIGKILL
    assert vm.files() == {"vda": "invalid unsaved"}
    assert not running(vm.guest)
    watch = vm.watch("--start", "--once")
    ready = watch.wait("ready")
    vm.poke("vda", 500)
    whole = point != "watch.loaded"
    assert ready["bitmaps"] == (0 if whole else 1)
    assert [each["reason"] for each in watch.heard("invalid")] == (["unsaved"] if whole else [])
    assert vm.next_reads() == {"vda": ("unsaved", WHOLE) if whole else (None, 3)}
    nodes = [n["node-name"] for n in vm.qmp("query-named-block-nodes", flat=True)]
    assert [n for n in nodes if "watch" in n] == []
    vm.poke("vda", 9)
    vm.fall_down(watch)
    vm.begin()
    assert vm.next_reads() == {"vda": (None, 1)}


@pytest.mark.parametrize("point", [*SAVING_IN_QEMU, *NOTHING_SAVED, *ALL_SAVED])
def test_watch_is_killed_while_it_saves(vm: WatchedVm, point: str) -> None:
    """While QEMU is there, who comes next saves. Later the file is either valid and whole, or invalid."""
    saved(vm, 3)
    vm.start()
    watch = vm.watch("--start", env={"INCBAK_CRASH_AT": point})
    watch.wait("ready")
    vm.poke("vda", 77, 78)
    vm.fall()
    assert watch.ended() == -signal.SIGKILL
    if point in SAVING_IN_QEMU:
        assert vm.qmp("query-status")["status"] == "shutdown"
        vm.saved(vm.watch("--once"))
    else:
        assert vm.guest.process.wait(30) == 0
    valid = point not in NOTHING_SAVED
    assert vm.files() == {"vda": "clean" if valid else "invalid unsaved"}
    watch = vm.begin()
    vm.poke("vda", 500)
    assert vm.next_reads() == {"vda": (None, 4) if valid else ("unsaved", WHOLE)}


def test_qemu_is_killed(vm: WatchedVm) -> None:
    """Rows 9 and 10: while it runs, and at any moment of a shutdown. The file is believed only if it has all."""
    dice = random.Random(seed := random.randrange(1 << 30))
    print(f"seed {seed}")
    saved(vm, 3)
    watch = vm.begin()
    vm.poke("vda", 77)
    vm.guest.process.kill()
    assert watch.ended() == 1
    assert watch.events()[-1] == "lost"
    assert vm.files() == {"vda": "invalid unsaved"}
    for _ in range(2):  # first the bitmap that was loaded, then one that had no file yet
        watch = vm.begin()
        (row,) = vm.incbak("--json", "status", f"qmp:{vm.guest.monitor}", "--name", "vm").objects()
        assert row["reason"] == "unsaved"
        assert vm.next_reads() == {"vda": ("unsaved", WHOLE)}
        vm.guest.process.kill()
        assert watch.ended() == 1
    for _ in range(4):
        watch = vm.begin()
        vm.next_reads()
        vm.poke("vda", dice.randrange(WHOLE))
        vm.fall()
        time.sleep(dice.uniform(0, 0.4))
        vm.guest.process.kill()
        code = watch.ended()
        assert vm.files() == {"vda": "invalid unsaved" if code else "clean"}, (watch.said, watch.errors)
    vm.begin()
    vm.next_reads()


def test_somebody_else_quits(vm: WatchedVm) -> None:
    """The bitmaps are lost, and that is said; of a VM that is off, an incremental says it too."""
    saved(vm, 3)
    watch = vm.begin()
    vm.poke("vda", 9)
    assert vm.guest.quit() == 0
    assert watch.ended() == 1
    assert "its bitmaps are lost" in watch.heard("lost")[0]["text"]
    vm.guest.kill()
    assert vm.next_reads(str(vm.images["vda"])) == {"vda": ("unsaved", WHOLE)}


def test_a_vm_that_ran_before(vm: WatchedVm) -> None:
    """Whether it runs, or was reset and stands where it began: what is in the file is not believed."""
    saved(vm, 3)
    vm.start()
    vm.qmp("cont")
    vm.poke("vda", 77)
    watch = vm.watch("--once")
    assert watch.wait("ready")["bitmaps"] == 0
    (lost,) = watch.heard("invalid")
    assert (lost["reason"], lost["detail"]) == ("unwatched", "the VM has run already: it is running")
    assert vm.next_reads() == {"vda": ("unwatched", WHOLE)}
    vm.fall_down(watch)
    vm.start()
    vm.qmp("cont")
    before = os.stat(vm.images["vda"])
    vm.poke("vda", 78)
    os.utime(vm.images["vda"], ns=(before.st_atime_ns, before.st_mtime_ns))  # as on a block device, nothing tells
    vm.qmp("stop")
    vm.qmp("system_reset")
    eventually(lambda: vm.qmp("query-status")["status"] == "prelaunch", 20, "the reset")
    watch = vm.watch("--start", "--once")
    watch.wait("ready")
    (lost,) = watch.heard("invalid")
    assert (lost["reason"], lost["detail"]) == ("unwatched", "the VM has run already: it has written, and was reset")
    assert not running(vm.guest)
    assert vm.next_reads() == {"vda": ("unwatched", WHOLE)}


def test_an_incoming_migration(vm: WatchedVm) -> None:
    """Row 46: another QEMU may be writing to the image, of which this one knows nothing."""
    saved(vm, 3)
    vm.start("-incoming", "defer")
    watch = vm.watch("--start", "--once")
    assert watch.wait("ready")["bitmaps"] == 0
    (lost,) = watch.heard("invalid")
    assert (lost["reason"], lost["detail"]) == ("unwatched", "the VM has run already: it is inmigrate")
    assert vm.files() == {"vda": "invalid unwatched"}
    assert not running(vm.guest)


def test_an_image_that_is_not_the_one_that_qemu_has(vm: WatchedVm) -> None:
    """Another file has its path now, as in a container: nothing of it is read, saved or believed."""
    image = vm.images["vda"]
    saved(vm, 3)
    vm.start()
    image.rename(vm.root / "moved")
    shutil.copy2(vm.root / "moved", image)
    watch = vm.watch("--start", "--once")
    assert watch.wait("ready")["disks"] == []
    (left,) = watch.heard("left-out")
    assert "nothing shows that QEMU has this" in left["why"]


def test_the_guest_starts_while_its_bitmaps_are_loaded(vm: WatchedVm) -> None:
    """Somebody else gives cont: what is written then is in the bitmap that has recorded since before the look."""
    saved(vm, 3)
    vm.start()
    stopped = vm.watch("--once", env={"INCBAK_CRASH_AT": "watch.recording"})
    assert stopped.ended() == -signal.SIGKILL
    recording = [b for n in vm.qmp("query-named-block-nodes", flat=True) for b in n.get("dirty-bitmaps", [])]
    assert [(b["name"], b["recording"]) for b in recording] == [("incbak-watch", True)]
    vm.qmp("cont")
    vm.poke("vda", 9)
    recording = [b for n in vm.qmp("query-named-block-nodes", flat=True) for b in n.get("dirty-bitmaps", [])]
    assert [b["count"] for b in recording] == [CLUSTER]
    vm.watch("--once").wait("ready")
    assert vm.next_reads() == {"vda": ("unsaved", WHOLE)}


@pytest.mark.parametrize("how", ["written", "older copy", "replaced", "grown"])
def test_the_image_is_changed_while_the_vm_is_off(vm: WatchedVm, how: str) -> None:
    """Rows 8, 39 and 40."""
    image, copy = vm.images["vda"], vm.root / "copy"
    shutil.copy2(image, copy)
    saved(vm, 3)
    if how == "written":
        with image.open("r+b") as f:
            f.seek(77 * CLUSTER + 5)
            f.write(b"x")
    elif how == "older copy":
        shutil.copyfile(copy, image)
        os.utime(image, ns=(copy.stat().st_atime_ns, copy.stat().st_mtime_ns))
    elif how == "replaced":
        shutil.copy2(image, copy)
        copy.replace(image)
    else:
        with image.open("r+b") as f:
            f.truncate(SIZE + CLUSTER)
    vm.start()
    watch = vm.watch("--start", "--once")
    watch.wait("ready")
    expected = "resized" if how == "grown" else "disk-changed"
    assert [each["reason"] for each in watch.heard("invalid")] == [expected]
    assert vm.next_reads() == {"vda": (expected, WHOLE + (how == "grown"))}


@pytest.mark.parametrize("option", [(), ("--ignore-ctime",)])
def test_a_manager_changes_the_owner_at_each_start(vm: WatchedVm, option: tuple[str, ...]) -> None:
    """As libvirt does. That cannot be told from a write that was dated back, so it costs a reading of the whole disk,
    unless the owner of the image says that nothing else moves its ctime."""
    watch = vm.begin(*option)
    vm.back_up("full")
    vm.poke("vda", 3)
    vm.fall_down(watch)
    os.chown(vm.images["vda"], 64055, 64055)
    assert vm.files() == {"vda": "clean" if option else "invalid unproven"}
    vm.begin(*option)
    assert vm.next_reads() == {"vda": (None, 1) if option else ("unproven", WHOLE)}


def test_sigterm(vm: WatchedVm) -> None:
    """While the VM runs, watch lets go and a shutdown ends QEMU; when it is down already, its bitmaps are saved."""
    saved(vm, 3)
    watch = vm.begin()
    assert watch.end() == 0
    assert watch.events()[-1] == "left"
    vm.poke("vda", 9)
    vm.fall()
    assert vm.guest.process.wait(30) == 0
    assert vm.files() == {"vda": "invalid unsaved"}
    watch = vm.begin()
    vm.next_reads()
    vm.poke("vda", 10)
    slow_job(vm)
    vm.fall()
    watch.wait("shutdown")
    assert watch.end() == 0
    assert watch.events()[-1] == "saved"
    assert vm.guest.process.wait(30) == 0
    vm.begin()
    assert vm.next_reads() == {"vda": (None, 1)}


def slow_job(vm: WatchedVm) -> None:
    """A job that goes by the name of a backup, and does not end."""
    for name in ("from", "to"):
        vm.qmp("blockdev-add", 20, driver="null-co", node_name=name, size=1 << 30, read_zeroes=True)
    job = {"job_id": "incbak-slow", "device": "from", "target": "to", "sync": "full", "speed": 65536}
    vm.qmp("blockdev-backup", 20, **job)


def test_the_vm_runs_again_while_a_backup_is_waited_for(vm: WatchedVm) -> None:
    """Nothing is saved then, and nothing ended; the next shutdown is as any other."""
    saved(vm, 3)
    watch = vm.begin()
    vm.poke("vda", 9)
    slow_job(vm)
    vm.fall()
    watch.wait("shutdown")
    vm.qmp("set-action", reboot="reset")
    vm.qmp("system_reset")
    vm.qmp("cont")
    vm.poke("vda", 10)
    vm.qmp("block-job-cancel", device="incbak-slow", force=True)
    watch.wait("resumed")
    vm.poke("vda", 11)
    assert vm.files() == {"vda": "invalid unsaved"}
    vm.fall_down(watch)
    vm.begin()
    assert vm.next_reads() == {"vda": (None, 4)}


def test_a_second_watch_is_refused(vm: WatchedVm) -> None:
    """It changes nothing of the first, which goes on."""
    saved(vm, 3)
    watch = vm.begin()
    second = vm.watch("--once", socket=vm.other)
    assert second.ended() == 11
    assert "is watched by another" in second.errors
    other = vm.watch("--once", "--name", "another", socket=vm.other)
    assert other.ended() == 11
    assert "is watched by another" in other.errors
    third = vm.watch("--once")
    assert third.ended() == 1
    assert "is busy" in third.errors
    vm.poke("vda", 9)
    vm.fall_down(watch)
    vm.begin()
    assert vm.next_reads() == {"vda": (None, 2)}


def test_disks_that_come_and_go(vm: WatchedVm) -> None:
    """A disk that is plugged in has a file of another time: it is made invalid, and watched from then on."""
    vm.images["vdb"] = raw_image(vm.root / "vdb.raw", SIZE, b"b" * CLUSTER)
    saved_b = vm.begin()
    vm.back_up("full")
    vm.poke("vdb", 5)
    vm.fall_down(saved_b)
    image = vm.images.pop("vdb")
    watch = vm.begin()
    assert vm.files() == {"vda": "invalid unsaved", "vdb": "clean"}
    plug(vm, "vdb", image)
    eventually(lambda: watch.heard("invalid"), 30, "the new disk is seen")
    assert [(e["disk"], e["reason"]) for e in watch.heard("invalid")] == [("vdb-dev", "unwatched")]
    assert vm.files() == {"vda": "invalid unsaved", "vdb": "invalid unwatched"}
    vm.images["vdb"] = image
    assert vm.next_reads() == {"vda": (None, 0), "vdb": ("unwatched", WHOLE)}
    vm.poke("vdb", 6, 7)
    vm.fall_down(watch)
    watch = vm.begin()
    assert vm.next_reads() == {"vda": (None, 0), "vdb": (None, 2)}
    vm.qmp("device_del", id="vdb-dev")
    vm.fall_down(watch)


def test_other_formats(vm: WatchedVm) -> None:
    """A qcow2 image of version 2 is watched, one of version 3 looks after itself, and a chain is left alone."""
    tool = ["qemu-img", "create", "-q", "-f", "qcow2"]
    for name, options in {"old": ["-o", "compat=0.10"], "new": []}.items():
        vm.images[name] = vm.root / f"{name}.qcow2"
        vm.formats[name] = "qcow2"
        run(*tool, *options, str(vm.images[name]), str(SIZE))
    watch = vm.begin()
    assert watch.wait("ready")["disks"] == ["vda-dev", "old-dev"]
    assert [(e["disk"], e["why"]) for e in watch.heard("left-out")] == [
        ("new-dev", "its image stores its bitmaps itself")
    ]
    vm.back_up("full")
    for name, clusters in {"vda": [1], "old": [2, 3], "new": [4, 5, 6]}.items():
        vm.poke(name, *clusters)
    vm.fall_down(watch)
    assert vm.files() == {"vda": "clean", "old": "clean"}
    watch = vm.begin()
    vm.poke("old", 900)
    assert vm.next_reads() == {"vda": (None, 1), "old": (None, 3), "new": (None, 3)}
    vm.fall_down(watch)
    run("qemu-io", "-c", "write 0 64k", str(vm.images["old"]))
    watch = vm.begin()
    assert [(e["disk"], e["reason"]) for e in watch.heard("invalid")] == [("old-dev", "disk-changed")]
    assert vm.next_reads() == {"vda": (None, 0), "old": ("disk-changed", WHOLE), "new": (None, 0)}


def run(*argv: str) -> None:
    subprocess.run(argv, check=True, timeout=60, capture_output=True)


def test_one_watch_over_many_runs(vm: WatchedVm) -> None:
    """It is there before the VM is, waits for it between its runs, and ends when it is told to."""
    watch = vm.watch("--start")
    assert "there is no socket" in watch.wait("waiting")["text"]
    for run in range(3):
        vm.start()
        ready = watch.wait("ready", run + 1)
        assert ready["bitmaps"] == (1 if run else 0)
        if run:
            assert vm.next_reads() == {"vda": (None, 2)}
        else:
            vm.back_up("full")
        vm.poke("vda", 3 * run, 3 * run + 1)
        vm.fall()
        watch.wait("saved", run + 1)
        assert vm.guest.process.wait(30) == 0
    assert watch.heard("invalid") == watch.heard("lost") == []
    vm.guest.kill()
    assert vm.next_reads(str(vm.images["vda"])) == {"vda": (None, 2)}
    assert watch.end() == 0


def test_nothing_to_watch(vm: WatchedVm) -> None:
    """The VM is started, and ends as it would without a watch."""
    vm.images = {"new": vm.root / "new.qcow2"}
    vm.formats = {"new": "qcow2"}
    run("qemu-img", "create", "-q", "-f", "qcow2", str(vm.images["new"]), str(SIZE))
    watch = vm.begin()
    assert watch.heard("ready")[0]["disks"] == []
    assert running(vm.guest)
    vm.back_up("full")
    vm.poke("new", 3)
    vm.fall()
    assert vm.guest.process.wait(30) == 0
    assert watch.ended() == 0
    assert watch.events()[-1] == "ended"
    watch = vm.begin()
    assert vm.next_reads() == {"new": (None, 1)}


def test_images_and_serve_use_the_same_files(vm: WatchedVm) -> None:
    """The VM under watch, off, and on disks of ``incbak serve``: one chain of incrementals, nothing read twice."""
    image = vm.images["vda"]
    saved(vm, 3, 4)
    vm.guest.kill()
    assert vm.next_reads(str(image)) == {"vda": (None, 2)}
    vm.back_up("full", str(image))
    assert vm.files() == {"vda": "clean"}
    watch = vm.begin()
    assert watch.heard("ready")[0]["bitmaps"] == 1
    vm.poke("vda", 5)
    vm.fall_down(watch)
    vm.guest.kill()
    with serving(vm.root, {"vda-dev": image}) as serve:
        with closing(serve.connect("vda-dev")) as client:
            client.write(b"s" * CLUSTER, 6 * CLUSTER)
        assert vm.next_reads(f"qmp:{serve.monitor}") == {"vda": (None, 2)}
        with closing(serve.connect("vda-dev")) as client:
            client.write(b"t" * CLUSTER, 7 * CLUSTER)
        assert serve.stop() == 0
    watch = vm.begin()
    vm.poke("vda", 8)
    assert vm.next_reads() == {"vda": (None, 2)}
    vm.fall_down(watch)
    vm.guest.kill()
    with serving(vm.root, {"vda-dev": image}) as serve:
        with closing(serve.connect("vda-dev")) as client:
            client.write(b"u" * CLUSTER, 9 * CLUSTER)
            serve.stop(signal.SIGKILL)
    watch = vm.begin()
    assert watch.heard("invalid") == []
    assert vm.next_reads() == {"vda": (None, 1)}
    watch.end(signal.SIGKILL)
    vm.guest.kill()
    with serving(vm.root, {"vda-dev": image}) as serve:
        assert vm.next_reads(f"qmp:{serve.monitor}") == {"vda": ("unwatched", WHOLE)}


def test_a_file_of_any_size_is_one_disk_on_and_off(tmp_path: Path) -> None:
    """QEMU's disk has whole sectors, so ours has too: off, watched, served, off again, and nothing is read twice."""
    need_guest()
    end, size = (16 << 20) + 1000, (16 << 20) + 1024
    vm = WatchedVm(tmp_path, "vda", size=end)
    image = vm.images["vda"]
    with image.open("r+b") as f:
        f.seek(end - 4)
        f.write(b"last")

    def step(source: str, *options: str) -> tuple[str | None, int]:
        """Of an incremental that restores to the disk: reason and clusters read."""
        disk = vm.back_up("incremental", source, *options)["vda"]
        vm.incbak("-q", "restore", "latest", tmp_path / "out.raw", "--force")
        assert disk["size"] == size
        assert (tmp_path / "out.raw").read_bytes() == image.read_bytes().ljust(size, b"\0")
        return disk["reason"], -(-disk["read"] // CLUSTER)

    try:
        vm.back_up("full", str(image), "--disk", "vda-dev")
        assert step(str(image)) == (None, 0)
        watch = vm.begin()
        vm.poke("vda", 5)
        assert step("") == (None, 1)
        assert image.stat().st_size == end
        vm.fall_down(watch)
        vm.guest.kill()
        assert step(str(image)) == (None, 0)
        with serving(vm.root, {"vda-dev": image}) as serve:
            with closing(serve.connect("vda-dev")) as client:
                assert client.size == size
                assert client.read(size - 28, 28) == b"last" + bytes(24)
                client.write(b"s", 9 * CLUSTER)
            assert step(f"qmp:{serve.monitor}") == (None, 1)
            assert serve.stop() == 0
        assert image.stat().st_size == end
        watch = vm.begin()
        device_write(vm.qmp, "vda-dev", (image, "raw"), 0x77, size - 512, 512)
        vm.fall_down(watch)
        vm.guest.kill()
        assert step(str(image)) == (None, 1)
        assert image.stat().st_size == size
        assert step(str(image)) == (None, 0)
        vm.incbak("-q", "restore", "latest", image, "--in-place", "--force")
    finally:
        vm.close()


@pytest.fixture
def device(vm: WatchedVm) -> Iterator[Path]:
    """The VM's disk is a block device."""
    need_root()
    need("losetup")
    vm.backing["vda"] = vm.images["vda"]
    setup = ["losetup", "--find", "--show", str(vm.backing["vda"])]
    ran = subprocess.run(setup, capture_output=True, text=True, check=False)
    if ran.returncode:
        missing("losetup", "no loop device can be had here")
    vm.images["vda"] = Path(ran.stdout.strip())
    yield vm.images["vda"]
    vm.guest.kill()
    subprocess.run(["losetup", "--detach", str(vm.images["vda"])], check=True)


def test_a_block_device(vm: WatchedVm, device: Path) -> None:
    """It has no time of change, but the kernel counts what is written to it: a run without watch is noticed."""
    saved(vm, 3)
    watch = vm.begin()
    vm.poke("vda", 4)
    assert vm.next_reads() == {"vda": (None, 2)}
    vm.poke("vda", 5)
    vm.fall_down(watch)
    vm.guest.kill()
    assert vm.next_reads(str(device)) == {"vda": (None, 1)}
    with serving(vm.root, {"vda-dev": device}) as serve:
        with closing(serve.connect("vda-dev")) as client:
            client.write(b"s" * CLUSTER, 6 * CLUSTER)
        assert serve.stop() == 0
    watch = vm.begin()
    assert vm.next_reads() == {"vda": (None, 1)}
    vm.fall_down(watch)
    vm.start()
    vm.qmp("cont")
    vm.poke("vda", 7)
    assert vm.guest.quit() == 0
    watch = vm.begin()
    assert [each["reason"] for each in watch.heard("invalid")] == ["disk-changed"]
    assert vm.next_reads() == {"vda": ("disk-changed", WHOLE)}
    vm.fall_down(watch)
    vm.start()
    vm.qmp("cont")
    vm.poke("vda", 8)
    assert vm.guest.quit() == 0
    assert vm.next_reads(str(device)) == {"vda": ("disk-changed", WHOLE)}


def test_a_monitor_that_is_none_of_a_vm(vm: WatchedVm) -> None:
    """Usage errors, before anything is changed."""
    path = vm.run / "daemon"
    command = ["qemu-storage-daemon", "--chardev", f"socket,id=m,path={path},server=on,wait=off", "--monitor", "m"]
    daemon = subprocess.Popen(command)
    try:
        eventually(path.is_socket, 20, "the daemon's monitor")
        watch = vm.watch("--once", socket=path)
        assert watch.ended() == 2
        assert "is not the monitor of a VM that can be watched" in watch.errors
    finally:
        daemon.kill()
        daemon.wait()
    with serving(vm.root, {"vda-dev": vm.images["vda"]}) as serve:
        watch = vm.watch("--once", socket=serve.monitor)
        assert watch.ended() == 2
        assert "keep their bitmaps themselves" in watch.errors
    for source in ("qmp:localhost:4444", str(vm.images["vda"]), "qmp:"):
        ran = vm.incbak.run("watch", source)
        assert ran.code == 2, ran
    ran = vm.incbak.run("watch", f"qmp:{vm.socket}", "--backup-wait", "soon")
    assert ran.code == 2


def test_a_vm_must_have_a_name(vm: WatchedVm) -> None:
    vm.start()
    ran = vm.incbak.run("watch", f"qmp:{vm.socket}", "--once")
    assert (ran.code, "Name it with --name." in ran.err) == (2, True)
    assert not running(vm.guest)

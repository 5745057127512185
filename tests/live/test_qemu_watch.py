"""``incbak watch`` with guests that boot: bitmaps of raw images over shutdowns, reboots, and deaths of watch."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.guest import Target, need_guest
from tests.kit.live import Writes, bitmaps_of, eventually, ours_in, unharmed
from tests.kit.watch import WatchedVm, facts

pytestmark = pytest.mark.kvm
SIZE = 192 << 20


@pytest.fixture(params=["plain", "iothread"])
def vm(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[WatchedVm]:
    need_guest()
    made = WatchedVm(tmp_path, "vda", "vdb", size=SIZE, iothread=request.param == "iothread")
    yield made
    made.close()


def test_two_disks_over_shutdowns_and_a_reboot(vm: WatchedVm) -> None:
    """Only what was written is read, before and after each restart; a reboot of the guest changes nothing."""
    watch = vm.boot()
    vm.back_up("full")
    vm.write("vda", 5, 700, 2999)
    vm.write("vdb", 0)
    vm.guest.send("reboot")
    vm.guest.wait_ready(2)
    vm.write("vdb", 1)
    vm.shut_down(watch)
    assert vm.files() == {"vda": "clean", "vdb": "clean"}
    watch = vm.boot()
    assert vm.files() == {"vda": "invalid unsaved", "vdb": "invalid unsaved"}
    vm.write("vda", 6, 7)
    made = vm.back_up()
    assert [facts(made[d]) for d in ("vda", "vdb")] == [(None, 5), (None, 2)]
    vm.write("vda", 2, 3)
    vm.shut_down(watch)
    vm.start()
    watch = vm.watch("--once")
    watch.wait("ready")
    made = vm.back_up()
    assert [facts(made[d]) for d in ("vda", "vdb")] == [(None, 2), (None, 0)]
    vm.restores(made)
    assert ours_in(vm.guest) == []
    assert bitmaps_of(vm.guest, "vda") == [made["vda"]["bitmap"]]


def test_watch_dies_and_leaves_while_the_guest_writes(vm: WatchedVm) -> None:
    """The guest never notices; who attaches next goes on with what QEMU has. A watch that was told to go lets go."""
    writes = Writes("w", 3, [Target("vda", spacing=3 * 65536), Target("vdb", spacing=65536)], slots=331)
    watch = vm.boot()
    vm.back_up("full")
    writes.start(vm.guest)
    for _ in range(2):
        assert watch.end(signal.SIGKILL) == -signal.SIGKILL
        vm.guest.wait_more("w", 5)
        watch = vm.watch("--once")
        assert watch.wait("ready")["bitmaps"] == 2
        assert watch.heard("invalid") == []
        unharmed(vm.guest, "w")
    vm.guest.send("poweroff")
    vm.saved(watch)
    vm.start()
    watch = vm.watch("--start", "--once")
    assert watch.wait("ready")["bitmaps"] == 2
    reads = vm.next_reads()
    assert [reason for reason, _ in reads.values()] == [None, None]
    assert 0 < reads["vda"][1] < SIZE // 65536 // 2
    vm.guest.wait_ready()
    assert watch.end() == 0
    assert watch.events()[-1] == "left"
    vm.guest.send("poweroff")
    assert vm.guest.process.wait(60) == 0
    assert vm.files() == {"vda": "invalid unsaved", "vdb": "invalid unsaved"}


def test_a_guest_panics(tmp_path: Path) -> None:
    """QEMU would end by itself; watched it pauses, and must not stay so, unless that was asked for."""
    need_guest()
    vm = WatchedVm(tmp_path, "vda", size=SIZE)
    try:
        for keep in (False, True):
            vm.start("-device", "pvpanic")
            watch = vm.watch("--start", "--once", *(["--keep-panicked"] if keep else []))
            watch.wait("ready")
            vm.guest.wait_ready()
            if keep:
                assert facts(vm.back_up()["vda"]) == (None, 1)
            else:
                vm.back_up("full")
            vm.write("vda", 3)
            vm.guest.send("run", argv=["sh", "-c", "echo c > /proc/sysrq-trigger"])
            if not keep:
                assert watch.wait("shutdown")["text"] == "vm: the guest has panicked"
                vm.saved(watch)
        eventually(lambda: vm.qmp("query-status")["status"] == "guest-panicked", 60, "the panic")
        time.sleep(3)
        assert watch.events() == ["ready"]
        assert vm.next_reads() == {"vda": (None, 1)}
    finally:
        vm.close()

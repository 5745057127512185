"""What goes wrong with a backup does not reach a real guest that writes meanwhile, and the next run clears up."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cli import Incbak
from tests.kit.guest import Guest, GuestDisk, Target, need_guest
from tests.kit.live import Chain, Writes, backup_jobs, bitmaps_of, eventually, ours_in, unharmed
from tests.kit.qmp import Qmp
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SIZE = 64 << 20
WRITES = Writes("w", 5, [Target("vda", spacing=3 * 65536)], slots=331)
SLOW = ("--speed-limit", "16M")  # so that a full takes four seconds
IN_THE_WINDOW = ("qemu.stopped", "qemu.filtering")
STEPS = ("qemu.prepared", "qemu.recording", *IN_THE_WINDOW, "qemu.instant", "qemu.copying", "qemu.copied")
AFTER = ("runner.copied", "runner.committed")
LONGEST_WRITE = 4.0  # seconds; the guest may be emulated, on a machine that is busy


class Vm:
    """A running guest with one raw disk that it writes to all the time, and its backups."""

    def __init__(self, root: Path, iothread: bool) -> None:
        self.iothread = iothread
        self.image = raw_image(root / "vda.raw", SIZE, random.Random(1).randbytes(24 << 20))
        self.second = root / "second"
        monitor = ["-qmp", f"unix:{self.second},server=on,wait=off"]
        self.guest = Guest(root / "guest", [GuestDisk("vda", self.image, iothread=iothread)], arguments=monitor)
        self.chain = Chain(Incbak(root), WRITES)
        self.chain.incbak("init")
        WRITES.start(self.guest)
        self.chain.back_up(self.guest, "full")

    def start(self, kind: str = "full", *options: str) -> subprocess.Popen[str]:
        """Begin a backup; it takes a while."""
        return self.chain.incbak.popen(kind, f"qmp:{self.guest.monitor}", "--name", "vm", *SLOW, *options)

    def copying(self) -> bool:
        """Whether a backup job is there."""
        return any(j["device"].startswith("incbak-") for j in backup_jobs(self.guest.qmp))

    def waiting(self) -> bool:
        """Whether the job does not get on."""
        offsets = []
        for _ in range(2):
            offsets += [j["offset"] for j in backup_jobs(self.guest.qmp)]
            time.sleep(1)
        return len(offsets) == 2 and offsets[0] == offsets[1]

    def io_status(self) -> list[str]:
        """Of each job."""
        return [j["io-status"] for j in backup_jobs(self.guest.qmp)]

    def good_again(self) -> None:
        """The guest goes on, the next incremental is one, holds everything, and leaves nothing behind."""
        unharmed(self.guest, "w")
        disk = self.chain.back_up(self.guest)["vda-dev"]
        assert (disk["kind"], disk["reason"]) == ("incremental", None)
        assert ours_in(self.guest) == []
        assert bitmaps_of(self.guest, "vda") == [disk["bitmap"]]
        ident, acknowledged = list(self.chain.acknowledged.items())[-1]
        WRITES.check(self.chain.restore(ident), acknowledged)
        assert self.guest.figures("w")["max"] < LONGEST_WRITE


@pytest.fixture(scope="module", params=["plain", "iothread"])
def vm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    need_guest()
    made = Vm(tmp_path_factory.mktemp(request.param), request.param == "iothread")
    yield made
    made.guest.kill()


def test_the_runner_is_killed_at_each_step(vm: Vm) -> None:
    """Row 13 of the faults: whatever step it is, the guest does not notice."""
    incbak = vm.chain.incbak
    for step in STEPS if vm.iothread else [s for s in STEPS if s not in IN_THE_WINDOW]:
        ran = incbak.run("full", f"qmp:{vm.guest.monitor}", "--name", "vm", env={"INCBAK_CRASH_AT": step})
        assert ran.code == -signal.SIGKILL, (step, ran)
        unharmed(vm.guest, "w")
    vm.good_again()
    for step in AFTER:
        ran = incbak.run("incremental", f"qmp:{vm.guest.monitor}", "--name", "vm", env={"INCBAK_CRASH_AT": step})
        assert ran.code == -signal.SIGKILL, (step, ran)
    vm.good_again()


def _told(vm: Vm, command: str) -> str:
    """What ``doctor`` or ``status`` says of leftovers."""
    ran = vm.chain.incbak.run(command, f"qmp:{vm.guest.monitor}", "--name", "vm")
    return next((line for line in (ran.out + ran.err).splitlines() if "killed has left" in line), "")


def test_what_a_killed_run_has_left_is_told_and_taken_out(vm: Vm) -> None:
    """Without a backup; the bitmaps stay, so the chain goes on, and the guest does not notice."""
    incbak, source = vm.chain.incbak, f"qmp:{vm.guest.monitor}"
    assert (_told(vm, "doctor"), _told(vm, "status")) == ("", "")
    assert "nothing of incbak" in incbak("clean", source, "--name", "vm").out
    for step in ("qemu.copying", "runner.committed"):
        kind = "full" if step == "qemu.copying" else "incremental"
        ran = incbak.run(kind, source, "--name", "vm", env={"INCBAK_CRASH_AT": step})
        assert ran.code == -signal.SIGKILL
        left = step == "qemu.copying"
        assert bool(ours_in(vm.guest)) == left
        if left:
            eventually(lambda: _told(vm, "doctor"), 20, "the job meets the end of its target")
            named = f"{ours_in(vm.guest)[0].rpartition('-')[0]}-0123abcd"  # as the bitmap of one disk of that run
            vm.guest.qmp("block-dirty-bitmap-add", node="vda", name=named)
        assert bool(_told(vm, "status")) == left
        before = bitmaps_of(vm.guest, "vda")
        assert len(before) >= 2
        ran = incbak("clean", source, "--name", "vm")
        assert ("still in use" in ran.err, bool(ran.out.strip())) == (False, True)
        assert (ours_in(vm.guest), bitmaps_of(vm.guest, "vda")) == ([], before)
        unharmed(vm.guest, "w")
    assert (_told(vm, "doctor"), _told(vm, "status")) == ("", "")
    vm.good_again()


def test_what_a_run_into_a_repository_that_is_gone_has_left(vm: Vm, tmp_path: Path) -> None:
    """Only after a question; a run that is at work is not touched, neither one of the repository at hand."""
    if vm.iothread:
        return
    source, other = f"qmp:{vm.guest.monitor}", Incbak(tmp_path)
    other("init")
    other_id = json.loads((other.repo / "config").read_text())["id"][:8]
    ran = other.run("full", source, "--name", "vm", env={"INCBAK_CRASH_AT": "qemu.copying"})
    assert ran.code == -signal.SIGKILL
    incbak = vm.chain.incbak
    eventually(lambda: _told(vm, "doctor"), 20, "the job meets the end of its target")
    ran = incbak.run("full", source, "--name", "vm")
    assert (ran.code, "a run into another repository" in ran.err, "incbak clean" in ran.err) == (1, True, True), ran
    ran = incbak.run("clean", source, "--name", "vm")
    assert (ran.code, "not at hand" in ran.err, "--yes" in ran.err) == (2, True, True), ran
    assert ours_in(vm.guest)
    unharmed(vm.guest, "w")
    incbak("clean", source, "--name", "vm", "--yes")
    assert ours_in(vm.guest) == []
    process = vm.start()
    eventually(vm.copying, 20, "a job")
    (job,) = (j["device"] for j in backup_jobs(vm.guest.qmp))
    vm.guest.qmp("block-job-set-speed", device=job, speed=1)  # so that it is at work, however slow the machine is
    for paused in (False, True):
        if paused:
            vm.guest.qmp("block-job-pause", device=job)
        ran = incbak.run("clean", f"qmp:{vm.second}", "--name", "vm", "--yes")
        assert ran.code == 11, ran
        ran = other.run("clean", f"qmp:{vm.second}", "--name", "vm", "--yes")
        assert (ran.code, "a backup is at work" in ran.err) == (11, True), ran
    vm.guest.qmp("block-job-resume", device=job)
    vm.guest.qmp("block-job-set-speed", device=job, speed=0)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    (gone,) = {b["name"] for b in incbak("--json", "bitmap", "list", source).objects() if b["repository"] == other_id}
    incbak("bitmap", "remove", source, gone, "--yes")
    vm.good_again()


def test_the_runner_is_killed_at_any_moment(vm: Vm) -> None:
    dice = random.Random(seed := random.randrange(1 << 30))
    for _ in range(4):
        process = vm.start(dice.choice(["full", "incremental"]))
        time.sleep(dice.uniform(0.6, 3.0))
        process.kill()
        process.communicate()
        unharmed(vm.guest, "w")
    print(f"seed {seed}")
    vm.good_again()


def test_an_interrupt_leaves_nothing_behind(vm: Vm) -> None:
    process = vm.start()
    eventually(vm.copying, 20, "a job")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in err) == (130, False), err
    assert ours_in(vm.guest) == []
    vm.good_again()


def test_a_runner_that_is_stopped_stalls_nothing(vm: Vm) -> None:
    process = vm.start()
    eventually(vm.copying, 20, "a job")
    process.send_signal(signal.SIGSTOP)
    vm.guest.figures("w")
    end = time.monotonic() + 4
    while time.monotonic() < end:
        vm.guest.wait_more("w", 10, 10)
    assert vm.guest.figures("w")["max"] < LONGEST_WRITE
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    vm.good_again()


def test_a_runner_that_is_stopped_for_long_is_cut_off(vm: Vm) -> None:
    """So that nothing that drains QEMU's disks has to wait for it: a stop, a reset.

    Somebody's ``cont`` makes QEMU forget that the job has met an error, before the runner could ask.
    """
    if not vm.iothread:
        return  # one of the two is enough
    process = vm.start()
    eventually(vm.copying, 20, "a job")
    process.send_signal(signal.SIGSTOP)
    eventually(vm.waiting, 20, "the job waits for answers")
    begun = time.monotonic()
    vm.guest.qmp("stop", 40)
    assert time.monotonic() - begun < 25
    eventually(lambda: vm.io_status() == ["failed"], 20, "the job has met the error")
    vm.guest.qmp("cont")
    assert vm.io_status() == ["ok"]
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "no backup was made" in err
    assert "Traceback" not in err
    vm.guest.figures("w")
    vm.good_again()


@pytest.mark.parametrize("how", ["100 kB/s", "1 B/s", "paused"])
def test_a_copy_that_never_ends_is_ended_by_the_longest_duration(vm: Vm, how: str) -> None:
    """Another client of QEMU slows the job down, to a trickle that is progress, or to none; nothing of ours stays."""
    if vm.iothread == (how == "1 B/s"):
        return
    vm.guest.figures("w")
    base = bitmaps_of(vm.guest, "vda")
    process = vm.start("full", "--max-duration", "5s")
    eventually(vm.copying, 20, "a job")
    (job,) = (j["device"] for j in backup_jobs(vm.guest.qmp))
    if how == "paused":
        vm.guest.qmp("block-job-pause", device=job)
    else:
        vm.guest.qmp("block-job-set-speed", device=job, speed=1 if how == "1 B/s" else 100_000)
    _, err = process.communicate(timeout=40)
    assert process.returncode == 1, err
    assert "took longer than 5.00 s" in err
    assert "--max-duration TIME" in err
    assert "Traceback" not in err
    assert ours_in(vm.guest) == []
    assert vm.guest.failures == []
    assert bitmaps_of(vm.guest, "vda") == base
    vm.good_again()


def test_a_full_scratch_file_breaks_the_backup_only(vm: Vm) -> None:
    process = vm.start("full", "--scratch-limit", "4M", "--speed-limit", "4M")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert "the scratch file was full" in err
    assert "Traceback" not in err
    assert ours_in(vm.guest) == []
    vm.good_again()


def test_a_monitor_that_somebody_holds_is_busy(vm: Vm) -> None:
    with Qmp(vm.guest.monitor):
        begun = time.monotonic()
        ran = vm.chain.incbak.run("incremental", f"qmp:{vm.guest.monitor}", "--monitor-wait", "2")
        assert 2 < time.monotonic() - begun < 10
    assert ran.code == 1
    assert "is busy: no greeting within 2 s" in ran.err
    assert "-qmp socket" in ran.err
    vm.good_again()


def test_what_others_have_in_qemu_stays(vm: Vm) -> None:
    qmp = vm.guest.qmp
    bitmap = {"node": "vda", "name": "incbak-0badcafe-00000001"}
    qmp("block-dirty-bitmap-add", **bitmap)
    for name in ("theirs", "from", "incbak-0badcafe-t"):
        qmp("blockdev-add", 20, driver="null-co", node_name=name, size=1 << 30, read_zeroes=True)
    job = {"job_id": "copy", "device": "from", "target": "theirs", "sync": "full", "speed": 65536}
    qmp("blockdev-backup", 20, **job)
    vm.chain.back_up(vm.guest, "full")
    disk = vm.chain.back_up(vm.guest)["vda-dev"]
    assert bitmaps_of(vm.guest, "vda") == sorted([bitmap["name"], disk["bitmap"]])
    assert [j["id"] for j in qmp("query-jobs")] == ["copy"]
    assert {"theirs", "from", "incbak-0badcafe-t"} <= {n["node-name"] for n in qmp("query-named-block-nodes")}
    qmp("job-cancel", 20, id="copy")
    eventually(lambda: not qmp("query-jobs"), 10, "the end of the job")
    for name in ("theirs", "from", "incbak-0badcafe-t"):
        qmp("blockdev-del", 20, node_name=name)
    qmp("block-dirty-bitmap-remove", **bitmap)
    vm.good_again()

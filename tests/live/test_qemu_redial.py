"""Runners stop and die while other clients use the same QEMU: what belongs to others is never touched."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.kit.cli import Incbak
from tests.kit.guest import accelerator, need_guest
from tests.kit.live import backup_jobs, eventually
from tests.kit.qmp import Qmp, QmpFailed
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SIZE = 8 << 20
OTHERS = 4


class Vm:
    """A QEMU whose processors run (nothing is booted), with monitors for others."""

    def __init__(self, root: Path) -> None:
        self.root, self.incbak = root, Incbak(root)
        self.incbak("init")
        image = raw_image(root / "a.raw", SIZE, random.Random(1).randbytes(SIZE))
        command = ["qemu-system-x86_64", "-accel", accelerator(), "-m", "64", "-nodefaults", "-display", "none"]
        command += [
            "-object",
            "iothread,id=io",
            "-blockdev",
            f"driver=raw,node-name=d,file.driver=file,file.filename={image}",
        ]
        command += ["-device", "virtio-blk-pci,drive=d,id=v,iothread=io"]
        for name in ("qmp", *(f"other{n}" for n in range(OTHERS))):
            command += ["-qmp", f"unix:{root}/{name},server=on,wait=off"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        self.keeper = Qmp(root / "other0")

    def start(self) -> subprocess.Popen[str]:
        """Begin a full; return when its job copies."""
        process = self.incbak.popen("full", f"qmp:{self.root}/qmp", "--name", "vm", "--speed-limit", "1M")
        eventually(lambda: backup_jobs(self.keeper), 20, "a job")
        return process

    def guards(self, runner: int) -> list[int]:
        """The processes that a runner has begun."""
        return [int(pid) for pid in Path(f"/proc/{runner}/task/{runner}/children").read_text().split()]


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    need_guest()
    made = Vm(tmp_path)
    yield made
    made.process.kill()
    made.process.wait()
    made.keeper.close()


def test_a_target_that_was_cut_is_never_dialled_again(vm: Vm) -> None:
    """The runner dies, alone or with its guard; others connect, get free descriptor numbers, and make the job go on."""
    for with_guard in (False, True):
        process = vm.start()
        guards = vm.guards(process.pid)
        (job,) = vm.keeper("query-jobs")
        process.send_signal(signal.SIGSTOP)
        for pid in guards if with_guard else []:
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.communicate()
        for _ in range(3):
            eventually(lambda: backup_jobs(vm.keeper)[0]["io-status"] == "failed", 20, "the job meets the cut")
            others = [Qmp(vm.root / f"other{n}") for n in range(1, OTHERS)]
            vm.keeper("job-resume", 20, id=job["id"])  # a request for the target: the first makes QEMU close its socket
            for other in others * 3:
                assert other("query-status")["running"]
            with suppress(QmpFailed):
                vm.keeper("human-monitor-command", 20, command_line=f"qemu-io {job['id']}t flush")
            for other in others:
                assert other("query-jobs")
                other.close()
    vm.incbak("full", f"qmp:{vm.root}/qmp", "--name", "vm")
    assert [n["node-name"] for n in vm.keeper("query-named-block-nodes") if n["node-name"].startswith("incbak")] == []

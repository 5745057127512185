"""The guest's file systems are frozen at the point in time, and thawed whatever happens.

The agent is one of ours, on the host: what it is told it has the guest do to a real ext4 file system.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cli import Incbak
from tests.kit.guest import Guest, GuestDisk, GuestFailed, Target, need_guest
from tests.kit.live import ours_in, unharmed
from tests.kit.need import need
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm


class FakeAgent:
    """Speaks the guest agent's protocol, one client at a time. ``delay`` seconds before each answer."""

    def __init__(self, path: Path, guest: Guest) -> None:
        self.path, self.guest, self.delay = path, guest, 0.0
        self.asked: list[str] = []
        self.frozen = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(4)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with sock, sock.makefile("rb") as lines:
                try:
                    for line in lines:
                        sock.sendall(json.dumps(self._answer(line.strip(b"\xff\n"))).encode() + b"\n")
                except OSError:
                    continue

    def _answer(self, line: bytes) -> dict[str, object]:
        request = json.loads(line)
        self.asked.append(request["execute"])
        time.sleep(self.delay)
        if request["execute"] == "guest-sync":
            return {"return": request["arguments"]["id"]}
        freeze = request["execute"].endswith("freeze")
        if freeze == self.frozen:
            return {"return": 0}
        try:
            self.guest("frozen", directory="/mnt", freeze=freeze)
        except GuestFailed as e:
            return {"error": {"class": "GenericError", "desc": str(e)}}
        self.frozen = freeze
        return {"return": 1}

    def close(self) -> None:
        self._listener.close()


class Vm:
    """A guest that writes to a file on ext4."""

    def __init__(self, root: Path) -> None:
        self.incbak = Incbak(root)
        self.incbak("init")
        image = raw_image(root / "vda.raw", 64 << 20)
        subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True)
        self.guest = Guest(root / "guest", [GuestDisk("vda", image)])
        self.agent = FakeAgent(self.guest.monitor.with_name("agent"), self.guest)
        self.guest("mount", disk="vda", directory="/mnt")
        self.guest.start_writer("w", 6, [Target(file="/mnt/records")], pause=0.01)
        self.guest.wait_acked("w", 5)
        self.options = ("--name", "vm", "--quiesce", "--agent-socket", str(self.agent.path))

    def notes(self, *options: str) -> list[str]:
        """Of a full backup that succeeds."""
        made = self.incbak("--json", "full", f"qmp:{self.guest.monitor}", *self.options, *options).objects()
        return list(made[0]["notes"])

    def needs_recovery(self) -> bool:
        """Whether the file system in the newest backup was in use."""
        restored = self.incbak.root / "restored.raw"
        self.incbak("-q", "restore", "latest", restored, "--force")
        said = subprocess.run(["dumpe2fs", "-h", restored], check=True, capture_output=True, text=True).stdout
        return "needs_recovery" in said

    def thawed(self, timeout: float) -> None:
        """The guest writes again."""
        unharmed(self.guest, "w", timeout)
        assert not self.agent.frozen


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    need_guest()
    need("mkfs.ext4", "dumpe2fs")
    made = Vm(tmp_path_factory.mktemp("quiesce"))
    yield made
    made.agent.close()
    made.guest.kill()


@pytest.fixture(autouse=True)
def _quick(vm: Vm) -> Iterator[None]:
    vm.agent.asked.clear()
    yield
    vm.agent.delay = 0.0


def test_a_frozen_file_system_needs_no_recovery(vm: Vm) -> None:
    assert "the guest's file systems were frozen" in vm.notes()
    assert not vm.needs_recovery()
    assert vm.agent.asked.count("guest-fsfreeze-freeze") == 1
    vm.thawed(5)
    vm.incbak("-q", "full", f"qmp:{vm.guest.monitor}", "--name", "vm")
    assert vm.needs_recovery()  # what the freeze is good for


def test_a_runner_that_is_killed_leaves_nothing_frozen(vm: Vm) -> None:
    ran = vm.incbak.run("full", f"qmp:{vm.guest.monitor}", *vm.options, env={"INCBAK_CRASH_AT": "agent.frozen"})
    assert ran.code == -signal.SIGKILL
    vm.thawed(5)
    vm.notes()
    assert ours_in(vm.guest) == []


def test_a_runner_that_is_stopped_leaves_nothing_frozen_for_long(vm: Vm) -> None:
    vm.agent.delay = 1.0
    process = vm.incbak.popen("full", f"qmp:{vm.guest.monitor}", *vm.options)
    deadline = time.monotonic() + 30
    while not vm.agent.frozen:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    vm.thawed(30)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 1)  # the guard may have cut the sink off meanwhile, too
    assert "had to be thawed before" in err


def test_an_agent_that_does_not_answer_costs_the_freeze_only(vm: Vm) -> None:
    vm.agent.delay = 7.0
    assert "the guest was not frozen" in vm.notes()
    vm.agent.delay = 0.0
    vm.thawed(20)


def test_no_agent_at_all(vm: Vm) -> None:
    command = ["full", f"qmp:{vm.guest.monitor}", "--name", "vm", "--quiesce"]
    ran = vm.incbak.run(*command, "--agent-socket", "/nonexistent")
    assert ran.code == 0
    assert "the guest was not frozen: cannot connect to guest agent /nonexistent" in ran.err
    assert vm.incbak.run(*command).code == 2

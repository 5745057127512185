"""Which states of a QEMU allow a backup, and what is resumed after the point in time."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import threading
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest

from incbak.engine import guard
from incbak.engine.qemu_guard import Guard
from incbak.engine.qemu_window import stopped
from incbak.engine.run_state import RunState, judge
from incbak.engine.session import EngineSilent, Session
from incbak.errors import RunStateError

REFUSED = {"inmigrate", "finish-migrate", "postmigrate", "save-vm", "restore-vm", "colo", "preconfig"}


def refused(status: str, migration: str) -> bool:
    try:
        judge(status, migration)
    except RunStateError:
        return True
    return False


def test_each_state_is_decided() -> None:
    assert {state.value for state in RunState if refused(state, "")} == REFUSED
    assert refused("a-state-of-qemu-99", "")
    assert refused("", "")


@pytest.mark.parametrize("status", ["setup", "active", "postcopy-active", "pre-switchover", "device", "unheard-of"])
def test_a_migration_wins_over_the_state(status: str) -> None:
    assert refused("running", status)
    assert refused("paused", status)


@pytest.mark.parametrize("status", ["", "none", "failed", "cancelled", "completed"])
def test_a_migration_that_is_over_decides_nothing(status: str) -> None:
    assert judge("running", status).running
    assert judge("paused", status).notes


class Qemu:
    """Stops when it is told to, and is in state ``then`` when it is asked after that."""

    def __init__(self, then: str) -> None:
        self.then, self.status = then, "running"
        self.told: list[str] = []

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, **_: Any) -> Any:
        if command == "query-status":
            return {"status": self.status, "running": self.status == "running"}
        self.told.append(command)
        self.status = self.then if command == "stop" else "running"
        return {}


class Watching:
    """A guard that has nothing to do."""

    def stopping(self) -> None:
        pass

    async def running(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("then", "told"),
    [
        ("paused", ["stop", "cont"]),
        ("postmigrate", ["stop"]),
        ("finish-migrate", ["stop"]),
        ("shutdown", ["stop"]),
        ("running", ["stop"]),
    ],
)
def test_only_a_stop_of_our_own_is_resumed(then: str, told: list[str]) -> None:
    """After ``postmigrate``, ``cont`` would start a second copy of the VM."""
    qemu = Qemu(then)

    async def window() -> None:
        async with stopped(cast(Session, qemu), cast(Guard, Watching())):
            pass

    asyncio.run(window())
    assert qemu.told == told


class Monitor:
    """QEMU's end of a monitor: notes commands in ``told``, and answers all but the first ``deaf`` of them."""

    def __init__(self, status: str, deaf: int = 0) -> None:
        self.told: list[str] = []
        self._status, self._deaf = status, deaf
        self._ours, self.theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._answer)

    def __enter__(self) -> Monitor:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Until nobody has the other end."""
        self.theirs.close()
        self._thread.join()
        self._ours.close()

    def _answer(self) -> None:
        rest = b""
        while data := self._ours.recv(4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                command = json.loads(line.lstrip(b"\xff"))
                self.told.append(command["execute"])
                if len(self.told) > self._deaf:
                    self._reply(command)

    def _reply(self, command: Mapping[str, str]) -> None:
        state = {"status": self._status} if command["execute"] == "query-status" else {}
        if command["execute"] == "cont":
            self._status = "running"
        self._ours.sendall(json.dumps({"event": "X"}).encode() + b"\r\n")
        self._ours.sendall(json.dumps({"return": state, "id": command["id"]}).encode() + b"\r\n")


def _orphaned(monitor: Monitor, byte: bytes, *, resumed: bool = False, sinks: Sequence[socket.socket] = ()) -> None:
    """A guard whose owner said ``byte`` and is gone; ``resumed``: it has given ``cont`` to the owner's stop before.

    ``sinks``: the connections to targets that it has accepted.
    """
    control, owner = socket.socketpair()
    with control, owner, monitor:
        watch = guard.Watch(control, monitor.theirs, None, None, 60, 60, 60)
        watch._resumed = resumed
        watch._sinks.extend(sinks)
        owner.sendall(byte)
        owner.shutdown(socket.SHUT_WR)
        watch.run()


@pytest.mark.parametrize(("status", "resumed"), [("paused", True), ("postmigrate", False), ("running", False)])
def test_the_guard_of_a_dead_runner_resumes_only_its_stop(status: str, resumed: bool) -> None:
    monitor = Monitor(status)
    _orphaned(monitor, b"s")
    assert monitor.told == ["query-status", *(["cont"] if resumed else [])]


@pytest.mark.parametrize("resumed", [True, False])
def test_the_guard_stays_until_qemu_says_that_the_vm_runs(monkeypatch: pytest.MonkeyPatch, resumed: bool) -> None:
    """QEMU is busy with the stop, and drops what a monitor had said that is closed meanwhile.

    Also where the guard gave ``cont`` while the owner lived, and nobody knows whether that was carried out.
    """
    monkeypatch.setattr(guard, "_ANSWER_SECONDS", 0.01)
    monitor = Monitor("paused", deaf=3)
    _orphaned(monitor, b"h" if resumed else b"s", resumed=resumed)
    assert "cont" in monitor.told[3:]


class Silent:
    """A QEMU that does not answer a ``stop``, nor anything after it."""

    stopped = False

    async def execute(self, command: str, *_: Any, **__: Any) -> Any:
        self.stopped = self.stopped or command == "stop"
        if self.stopped:
            raise EngineSilent("no answer")
        return {"status": "running", "running": True}


def test_a_runner_that_gives_up_leaves_the_vm_to_the_guard() -> None:
    """It ends without knowing whether its stop will be carried out, and does not tell the guard to end."""
    monitor = Monitor("paused")

    async def run() -> None:
        async with Guard(monitor.theirs.dup(), []) as watching, stopped(cast(Session, Silent()), watching):
            pass

    with monitor, pytest.raises(EngineSilent):
        asyncio.run(run())
    assert monitor.told == ["query-status", "cont"]


def test_the_guard_of_a_process_with_many_files_takes_their_numbers() -> None:
    ours, theirs = socket.socketpair()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = 5000
    with ours, theirs:
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number + 1), hard))
        try:
            os.dup2(theirs.fileno(), number)
            try:
                assert guard._ready([number], 0) == []
                ours.send(b"x")
                assert guard._ready([number], 60) == [number]
            finally:
                os.close(number)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_guard_cuts_targets_before_it_asks_qemu() -> None:
    """What QEMU is busy with may wait for a target, and its answer with it."""
    ours, sink = socket.socketpair()
    found: list[str] = []

    class Waiting(Monitor):
        def _reply(self, command: Mapping[str, str]) -> None:
            try:
                found.append(f"{command['execute']}: {sink.recv(1, socket.MSG_DONTWAIT)!r}")
            except BlockingIOError:
                found.append("not cut")
            super()._reply(command)

    with ours, sink:
        _orphaned(Waiting("paused"), b"s", sinks=[ours])
    assert found == ["query-status: b''", "cont: b''"]

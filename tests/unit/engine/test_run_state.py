"""Which states of a QEMU allow a backup, and what is resumed after the point in time."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Mapping
from typing import Any, cast

import pytest

from incbak.engine import guard
from incbak.engine.qemu_guard import Guard
from incbak.engine.qemu_window import stopped
from incbak.engine.run_state import RunState, judge
from incbak.engine.session import Session
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


@pytest.mark.parametrize(("status", "resumed"), [("paused", True), ("postmigrate", False), ("running", False)])
def test_the_guard_of_a_dead_runner_resumes_only_its_stop(status: str, resumed: bool) -> None:
    ours, monitor = socket.socketpair()
    control, owner = socket.socketpair()
    told: list[str] = []

    def answer() -> None:
        rest = b""
        while data := ours.recv(4096):
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                command = json.loads(line.lstrip(b"\xff"))
                told.append(command["execute"])
                state = {"status": status} if command["execute"] == "query-status" else {}
                ours.sendall(json.dumps({"event": "X"}).encode() + b"\r\n")
                ours.sendall(json.dumps({"return": state, "id": command["id"]}).encode() + b"\r\n")

    thread = threading.Thread(target=answer)
    thread.start()
    owner.sendall(b"s")
    owner.shutdown(socket.SHUT_WR)
    guard.Watch(control, monitor, None, None, 60, 60, 60).run()
    monitor.close()
    thread.join()
    assert told == ["query-status", *(["cont"] if resumed else [])]
    for sock in (ours, control, owner):
        sock.close()

"""Waiting for a job in QEMU that pauses when it meets an error, whoever gives commands meanwhile."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from incbak.engine.qemu_jobs import CopyJob

IDENT = "incbak-job"


class Events:
    """What was heard and not looked at yet."""

    def __init__(self, *waiting: dict[str, Any]) -> None:
        self.waiting = list(waiting)

    def clear(self) -> list[dict[str, Any]]:
        heard, self.waiting = self.waiting, []
        return heard

    async def get(self) -> dict[str, Any]:
        while not self.waiting:
            await asyncio.sleep(3600)
        return self.waiting.pop(0)


class Qemu:
    """One job; ``status`` and ``io_status`` are what it says until it is cancelled."""

    def __init__(self, status: str, io_status: str, *events: dict[str, Any]) -> None:
        self.status, self.io_status, self.events = status, io_status, Events(*events)
        self.told: list[str] = []

    def listen(self, *_names: str) -> Events:
        return self.events

    def forget(self, _events: Events) -> None:
        pass

    async def execute(self, command: str, arguments: dict[str, Any] | None = None) -> object:
        if command == "query-jobs":
            return [{"id": IDENT, "status": self.status, "current-progress": 1, "total-progress": 2}]
        if command == "query-block-jobs":
            return [{"device": IDENT, "io-status": self.io_status}]
        self.told.append(command)
        if command == "job-cancel":
            self.status = "concluded"
        return {}


def error(operation: str, device: str = IDENT) -> dict[str, Any]:
    return {"event": "BLOCK_JOB_ERROR", "data": {"device": device, "operation": operation, "action": "stop"}}


def waited(qemu: Qemu, seconds: float = 20) -> str | None:
    """The error with which it ended."""

    async def wait() -> str | None:
        async with asyncio.timeout(seconds):
            result = await CopyJob(qemu, IDENT, "vda").wait(lambda *_: None)  # type: ignore[arg-type]
        assert qemu.told == ["job-cancel", "job-dismiss"]
        return result.error

    return asyncio.run(wait())


@pytest.mark.parametrize("io_status", ["failed", "nospace", "ok"])
@pytest.mark.parametrize(
    ("operation", "why"), [("write", "the target failed or is gone"), ("read", "the point in time cannot be read")]
)
def test_a_job_that_met_an_error_is_ended(io_status: str, operation: str, why: str) -> None:
    """Also where somebody's ``cont`` has set its io-status to ``ok`` again before we asked: it stays paused."""
    assert waited(Qemu("paused", io_status, error(operation))) == why


def test_one_whose_event_was_not_heard_is_ended_too() -> None:
    assert waited(Qemu("paused", "failed")) == "an I/O error"


def test_one_that_somebody_else_has_paused_is_left_alone() -> None:
    qemu = Qemu("paused", "ok", error("write", "another"))
    with pytest.raises(TimeoutError):
        waited(qemu, 1.5)
    assert qemu.told == []

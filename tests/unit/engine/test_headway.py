"""A copy that counts on is not one that gets on."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from incbak.engine import headway, jobs
from incbak.engine.headway import SLOWEST, Headway
from incbak.engine.session import EngineSilent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(headway, "_now", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("rate", "speed", "stalled"),
    [
        (0, 0, True),
        (1, 0, True),
        (SLOWEST // 2, 0, True),
        (SLOWEST * 2, 0, False),
        (1, 4096, True),
        (4096, 4096, False),
    ],
)
def test_what_is_slower_than_anything_stands_still(clock: list[float], rate: int, speed: int, stalled: bool) -> None:
    copy = Headway(120, speed)
    copy.begin()
    seen = False
    for second in range(600):
        clock[0] += 1
        copy.took(rate * second)
        seen = seen or copy.stalled
    assert seen is stalled
    copy.end()
    assert not copy.stalled


def test_one_that_counts_back_does_not_get_on(clock: list[float]) -> None:
    copy = Headway(10)
    copy.begin()
    for second in range(20):
        clock[0] += 1
        copy.took((1 << 30) * (1 + second % 2))
    assert copy.stalled


class Trickling:
    """An engine whose job grows by one byte whenever somebody looks."""

    def __init__(self, clock: list[float]) -> None:
        self.clock, self.done = clock, 0

    def listen(self, *_: str) -> Any:
        class Events:
            async def get(_) -> Any:
                return {}

        return Events()

    def forget(self, _: Any) -> None:
        pass

    async def execute(self, command: str) -> Any:
        assert command == "query-jobs"
        assert self.clock[0] < 10_000, "waited for ever"
        self.clock[0] += 1
        self.done += 1
        return [{"id": "j", "status": "running", "current-progress": self.done, "total-progress": 1 << 40}]


def test_jobs_that_trickle_are_given_up(clock: list[float]) -> None:
    waiting = jobs.wait_for_jobs(Trickling(clock), {"j": "vda"}, lambda *_: None)  # type: ignore[arg-type]
    with pytest.raises(EngineSilent, match="did not get on for 600 s"):
        asyncio.run(waiting)

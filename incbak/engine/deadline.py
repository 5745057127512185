"""A deadline that blames a peer only for time in which this process ran.

A runner that was stopped (SIGSTOP, a frozen cgroup, a host that had no processor for it) finds, when it goes on, both
the answer of its peer and a timer that has run out; `asyncio.timeout` lets the timer win, since an answer takes a few
turns of the loop to reach who waits for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

_LATE = 0.25  # seconds; a timer of a loop that runs is never that late


@asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """As `asyncio.timeout`. If the loop did not run when the time was up, the time begins anew, once."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    timer: asyncio.TimerHandle

    def up(again: bool) -> None:
        nonlocal timer
        if again and loop.time() - due > _LATE:
            timer = loop.call_later(seconds, up, False)
        else:
            timeout.reschedule(loop.time())

    timer = loop.call_at(due, up, True)
    try:
        async with asyncio.timeout(None) as timeout:
            yield
    finally:
        timer.cancel()

"""Whether a copy gets on, or only pretends to."""

from __future__ import annotations

import asyncio
import math

STALL_SECONDS = 120.0
LONG_STALL_SECONDS = 600.0  # where no guest waits for the copy
SLOWEST = 8 << 10
"""Bytes per second, on the average of a stall's time. What is slower stands still: a peer that counts on by one byte a
second would hold the repository's locks for ever."""


class Headway:
    """Of one copy, limited to ``speed`` bytes per second (0: not at all). It stalls when `done` stops for ``stall``
    seconds, or grows by less than `SLOWEST` meanwhile."""

    def __init__(self, stall: float, speed: int = 0) -> None:
        self._stall = stall
        self._least = max(1, int(stall * (min(SLOWEST, speed / 4) if speed else SLOWEST)))
        self._since, self._mark = math.inf, 0

    def begin(self) -> None:
        """From now on it is expected to get on."""
        self._since, self._mark = _now(), 0

    def end(self) -> None:
        """Nothing is expected any more."""
        self._since = math.inf

    def took(self, done: int) -> None:
        """So many bytes were copied in all."""
        if done - self._mark >= self._least:
            self._since, self._mark = _now(), done

    @property
    def stalled(self) -> bool:
        """Whether it has not got on for too long."""
        return _now() - self._since > self._stall

    def __str__(self) -> str:
        return f"the copy did not get on for {self._stall:g} s"


def _now() -> float:
    return asyncio.get_running_loop().time()

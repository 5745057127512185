"""Tell whether a copy makes progress, or only pretends to."""

from __future__ import annotations

import asyncio
import math

STALL_SECONDS = 120.0
LONG_STALL_SECONDS = 600.0  # where no guest waits for the copy
SLOWEST = 8 << 10
"""Bytes per second, averaged over the time of a stall. What is slower counts as stalled: a peer that reports one byte
more each second would hold the repository's locks for ever."""


class Headway:
    """The progress of one copy that is limited to ``speed`` bytes per second (0: no limit). It stalls when it makes
    none for ``stall`` seconds, or less than `SLOWEST` on average."""

    def __init__(self, stall: float, speed: int = 0) -> None:
        self._stall = stall
        self._least = max(1, int(stall * (min(SLOWEST, speed / 4) if speed else SLOWEST)))
        self._since, self._mark = math.inf, 0

    def begin(self) -> None:
        """Expect progress from now on."""
        self._since, self._mark = _now(), 0

    def end(self) -> None:
        """Expect nothing any more."""
        self._since = math.inf

    def took(self, done: int) -> None:
        """Note that so many bytes were copied in all."""
        if done - self._mark >= self._least:
            self._since, self._mark = _now(), done

    @property
    def stalled(self) -> bool:
        """Tell whether there was no progress for too long."""
        return _now() - self._since > self._stall

    def __str__(self) -> str:
        return f"the copy did not get on for {self._stall:g} s"


def _now() -> float:
    return asyncio.get_running_loop().time()

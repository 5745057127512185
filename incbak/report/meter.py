"""How far something is, how fast it goes, and when it will be done: one line of text, from events and a clock."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from incbak.events import Progress
from incbak.units import format_duration, format_size

WINDOW = 15.0
"""Seconds over which the rate is taken: long enough to be steady, short enough to follow."""
SOON = 1.0
"""No rate is said before so many seconds have passed."""
_STEP = 0.25


class Meter:
    """Takes `Progress`, of several disks at once; another ``what`` begins anew. ``clock``: seconds. One thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._what: tuple[str, str] = ("", "")
        self._disks: dict[str, tuple[int, int]] = {}
        self._seen: deque[tuple[float, int]] = deque()

    def take(self, event: Progress) -> None:
        """Note how far ``event.disk`` is."""
        if (event.what, event.unit) != self._what:
            self._what = (event.what, event.unit)
            self._disks.clear()
            self._seen.clear()
        self._disks[event.disk] = (event.done, event.total)
        now, done = self._clock(), self._sums()[0]
        if not self._seen or now >= self._seen[-1][0] + _STEP:
            self._seen.append((now, done))
        while len(self._seen) > 2 and self._seen[1][0] < now - WINDOW:
            self._seen.popleft()

    def _sums(self) -> tuple[int, int]:
        done, total = (sum(column) for column in zip(*self._disks.values(), strict=True))
        return done, total if all(t for _, t in self._disks.values()) else 0

    def line(self) -> str:
        """`` 42% 3.4 GiB of 8.0 GiB, 510.3 MiB/s, 9.2 s left``; without what is not known (yet)."""
        if not self._disks:
            return ""
        done, total = self._sums()
        what, unit = self._what
        text = f"{what}: " if what else ""
        if total:
            text += f"{min(100 * done // total, 100):3}% {_amount(done, unit)} of {_amount(total, unit)}"
        else:
            text += _amount(done, unit)
        text += f" {unit}" if unit else ""
        if (rate := self._rate(done)) is not None:
            text += f", {_amount(rate, unit)}/s"
            if total and rate > 0:
                text += f", {format_duration(max(total - done, 0) / rate)} left"
        return text

    def _rate(self, done: int) -> float | None:
        """Of the last `WINDOW` seconds; nothing before `SOON`."""
        then, before = self._seen[0]
        passed = self._clock() - then
        return max(done - before, 0) / passed if passed >= SOON else None


def _amount(count: float, unit: str) -> str:
    if not unit:
        return format_size(count)
    return f"{count:.0f}" if count >= 10 or count == int(count) else f"{count:.1f}"

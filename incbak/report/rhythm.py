"""When the next backup of a VM is to be expected, judged by when the last ones were made."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

from incbak.units import format_duration

_LOOKED_AT = 9
_LEAST = 3


def due_in(finished: Sequence[float], now: float) -> float | None:
    """Seconds until the next backup, if they go on as they came: the newest, and the median of the last gaps.

    ``finished``: seconds since 1970, oldest first. Negative when it is late; ``None`` with fewer than three backups.
    """
    if len(finished) < _LEAST:
        return None
    last = finished[-_LOOKED_AT:]
    gaps = [max(b - a, 0.0) for a, b in pairwise(last)]
    return last[-1] + statistics.median(gaps) - now


def due_column(seconds: float | None) -> str:
    """``in 23h00m``, ``2h05m late``, or nothing where it is not known."""
    if seconds is None:
        return ""
    return f"in {format_duration(seconds)}" if seconds >= 0 else f"{format_duration(-seconds)} late"

"""Sizes, durations and rates: from what a user types, and into what a user reads."""

from __future__ import annotations

import math
import re

from incbak.errors import UsageError

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)(?:i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|w)?", re.IGNORECASE)
_LARGEST = 1 << 63
_LONGEST = 1e9
"""Seconds, some 30 years: what the system's clocks and waits can still do."""
_RETENTION = re.compile(r"(?:(\d{1,9})y)?(?:(\d{1,9})m)?(?:(\d{1,9})w)?(?:(\d{1,9})d)?(?:(\d{1,9})h)?", re.IGNORECASE)
_RETENTION_SECONDS = (366 * 86400, 31 * 86400, 604800, 86400, 3600)
"""Of a year, a month, a week, a day and an hour: the longest that each can be, since a longer time keeps more."""
_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}


def parse_size(text: str) -> int:
    """Bytes from ``65536``, ``64k``, ``64KiB``, ``1.5G`` (powers of 1024). Raises `UsageError`."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise UsageError(f"not a size: {text!r}", hint="Write bytes, or a number with K, M, G or T.")
    power = " kmgtp".index(match[2].lower() or " ")
    size = float(match[1]) * 1024**power
    if size >= _LARGEST:
        raise UsageError(f"too large a size: {text[:100]!r}")
    return int(size) if "." in match[1] else int(match[1]) << (10 * power)


def parse_duration(text: str) -> float:
    """Seconds from ``90``, ``90s``, ``5m``, ``2h``, ``7d``, ``1w``. Raises `UsageError`."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise UsageError(f"not a duration: {text!r}", hint="Write seconds, or a number with s, m, h, d or w.")
    seconds = float(match[1]) * _SECONDS[(match[2] or "s").lower()]
    if seconds > _LONGEST:
        raise UsageError(f"too long a duration: {text[:100]!r}")
    return seconds


def parse_retention(text: str) -> float:
    """Return the seconds of a time to keep backups for: ``1y6m``, ``6m``, ``2w``, ``7d12h``, in restic's units.

    ``m`` is a month of 31 days and ``y`` a year of 366 days. A bare number and minutes are refused: in `parse_duration`
    they mean seconds and minutes, and a policy that was meant otherwise would remove backups. Raises `UsageError`.
    """
    match = _RETENTION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        raise UsageError(
            f"not a time to keep backups for: {text[:100]!r}",
            hint="Write numbers with y (years), m (months), w, d or h in this order, as in 1y6m or 14d.",
        )
    seconds = sum(int(count or 0) * unit for count, unit in zip(match.groups(), _RETENTION_SECONDS, strict=True))
    if seconds > _LONGEST:
        raise UsageError(f"too long a time to keep backups for: {text[:100]!r}", hint="Write 30y or less.")
    return float(seconds)


def parse_share(text: str) -> int:
    """Into how many slices a percentage cuts a whole: 100 for ``1%`` or ``1``, 0 for ``0``. Raises `UsageError`."""
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1
    if not (percent == 0 or 0.001 <= percent <= 100):
        raise UsageError(f"not a percentage: {text!r}", hint="Write a number from 0.001 to 100, as in 1%.")
    return math.ceil(100 / percent) if percent else 0


def format_size(count: float) -> str:
    """``1536`` as ``1.5 KiB``."""
    unit = "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(count) < 1024 or unit == "PiB":
            break
        count /= 1024
    return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"


def format_duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3m05s``, ``2h07m``."""
    if seconds < 60:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}m{rest:02d}s"
    return f"{minutes // 60}h{minutes % 60:02d}m"


def counted(count: int, noun: str, plural: str = "") -> str:
    """``1 backup``, ``2 backups``; ``plural`` where it is not the noun with an s."""
    return f"{count} {noun if count == 1 else plural or noun + 's'}"

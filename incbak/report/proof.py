"""What proves that the backups are good, as text and as JSON: what checks have read, and how the last drills went."""

from __future__ import annotations

import math
from datetime import UTC, datetime
from typing import Any

from incbak.repo.verified import Coverage
from incbak.units import format_duration, format_size


def coverage_text(found: Coverage) -> str:
    """One line: how much of the data was read within which time."""
    if found.within is None:
        return "no data was read yet" if found.packs else "there is no data yet"
    when = f"within the last {_days(found.within)}"
    damaged = f"; {found.damaged} packs have damage" if found.damaged else ""
    if found.complete:
        return f"all data was read {when}{damaged}"
    part = f"{format_size(found.read_size)} of {format_size(found.size)}"
    return f"{part} ({found.read_packs} of {found.packs} packs) were read {when}, the rest never{damaged}"


def coverage_json(found: Coverage) -> dict[str, Any]:
    """Sizes in bytes, ages in seconds; ``within`` is null while nothing was read."""
    last = found.last
    return {
        "packs": found.packs,
        "size": found.size,
        "read_packs": found.read_packs,
        "read_size": found.read_size,
        "damaged_packs": found.damaged,
        "complete": found.complete,
        "within": found.within,
        "last": last
        and {"at": iso(last.at), "age": max(found.now - last.at, 0.0), "read": last.read, "packs": last.packs,
             "problems": last.problems},
    }  # fmt: skip


def last_check_text(found: Coverage) -> str:
    """One line for ``status``."""
    last = found.last
    if last is None:
        return "no check has read data yet"
    how = f", {last.problems} problems" if last.problems else ", no problems"
    ago = ago_text(found.now - last.at)
    return f"last check of data {ago}, {format_size(last.read)} read{how}; {coverage_text(found)}"


def ago_text(seconds: float) -> str:
    """``3 days ago``."""
    return f"{_days(seconds)} ago"


def _days(seconds: float) -> str:
    """Rounded up, so that nothing is said to be newer than it is."""
    seconds = max(seconds, 0.0)
    for size, unit in ((86400, "day"), (3600, "hour")):
        if seconds > size:
            count = int(-(-seconds // size))
            return f"{count} {unit}{'s' if count > 1 else ''}"
    return format_duration(math.ceil(seconds) if seconds > 10 else seconds)


def iso(at: float) -> str:
    """Seconds since 1970 as ISO 8601 in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")

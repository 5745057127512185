"""What proves that the backups are good, as text and as JSON: what checks have read, and how the last drills went."""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from msgspec import to_builtins

from incbak.repo.drills import Drill, Drills
from incbak.repo.verified import Coverage
from incbak.units import counted, format_duration, format_size


def coverage_text(found: Coverage) -> str:
    """One line: how much of the data was read within which time."""
    if found.within is None:
        return "no data was read yet" if found.packs else "there is no data yet"
    when = f"within the last {_days(found.within)}"
    damaged = f"; the last reading found damage in {counted(found.damaged, 'pack')}" if found.damaged else ""
    if found.complete:
        return f"all data was read {when}{damaged}"
    part = f"{format_size(found.read_size)} of {format_size(found.size)}"
    return f"{part} ({found.read_packs} of {counted(found.packs, 'pack')}) were read {when}, the rest never{damaged}"


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
    how = f", {counted(last.problems, 'problem')}" if last.problems else ", no problems"
    ago = ago_text(found.now - last.at)
    return f"last check of data {ago}, {format_size(last.read)} read{how}; {coverage_text(found)}"


def drills_text(found: Drills, now: float) -> str:
    """One sentence on the drills of a VM, without its full stop."""
    last, good = found.last, found.good
    if last is None:
        return "no drill yet"
    what = f"last drill {ago_text(now - last.at)}, of backup {last.backup[:8]} ({_depth(last)})"
    if last.good:
        return f"{what}: good"
    then = f"the last good one {ago_text(now - good.at)}" if good else "none was good"
    return f"{what}: failed: {last.problems[0] if last.problems else 'no reason is known'}; {then}"


def _depth(drill: Drill) -> str:
    restored = "all of it" if drill.sample >= 100 else f"a sample of {drill.sample:g} %"
    systems = sum(each.state != "unchecked" for each in drill.systems)
    parts = [restored, *([f"{systems} file systems"] if systems else []), *(["a boot"] if drill.boot else [])]
    return ", ".join(parts)


def drill_column(found: Mapping[str, Any] | None) -> str:
    """Of `drills_json`: how long the last good drill is ago, and whether a later one failed."""
    if found is None:
        return "never"
    if found["good"]:
        return _days(found["age"])
    return f"FAILED, good {ago_text(found['last_good']['age'])}" if found["last_good"] else "FAILED"


def verified_column(found: Mapping[str, Any]) -> str:
    """Of `coverage_json`: within which time all that is stored was read, or a part."""
    if found["within"] is None:
        return "never"
    return _days(found["within"]) if found["complete"] else f"a part, {_days(found['within'])}"


def drills_json(found: Drills, now: float) -> dict[str, Any] | None:
    """The last drill and the last good one; ages in seconds. None while there was none."""
    if found.last is None:
        return None
    last = drill_json(found.last) | {"age": max(now - found.last.at, 0.0)}
    good = found.good
    last["last_good"] = good and {"at": iso(good.at), "age": max(now - good.at, 0.0), "backup": good.backup}
    return last


def drill_json(drill: Drill) -> dict[str, Any]:
    """One drill."""
    return {
        "vm": drill.vm,
        "backup": drill.backup,
        "at": iso(drill.at),
        "good": drill.good,
        "exit_code": drill.exit_code,
        "seconds": drill.seconds,
        "sample": drill.sample,
        "seed": drill.seed,
        "disks": [to_builtins(each) for each in drill.disks],
        "systems": [to_builtins(each) for each in drill.systems],
        "boot": to_builtins(drill.boot),
        "problems": list(drill.problems),
    }


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

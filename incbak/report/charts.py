"""The drawings of the report, each in a box some 360 units wide, so that a phone shows them at their own size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import pairwise

from incbak.repo.record import Record
from incbak.report.history import DiskMap
from incbak.report.markup import Markup, el, join, svg
from incbak.units import KiB, format_size

WIDTH = 360
WEEKS = 25
_CELL, _LEFT, _TOP = 13, 26, 16
_KINDS = ("incremental", "full", "fallback", "incomplete")
"""Of a day with several backups the last of these is shown."""
POINTS = 200
"""So many of the newest backups are in a chart."""
_COLUMNS = 32
_SHADES = 5


def kind_of(record: Record) -> str:
    """``incremental``, ``full``, ``fallback`` (a disk was read whole although it need not) or ``incomplete``."""
    if record.incomplete:
        return "incomplete"
    return "fallback" if any(d.reason for d in record.disks) else record.kind


def finished(record: Record) -> datetime | None:
    """When; nothing if that is no time."""
    try:
        found = datetime.fromisoformat(record.finished)
        return (found if found.tzinfo else found.replace(tzinfo=UTC)).astimezone(UTC)
    except (ValueError, OverflowError):
        return None


def calendar(records: Sequence[Record], today: date) -> tuple[Markup, int]:
    """A column for each of the last `WEEKS` weeks, and how many backups have a date that is not in them."""
    first = today - timedelta(days=today.weekday(), weeks=WEEKS - 1)
    days: dict[date, list[str]] = {}
    outside = 0
    for record in records:
        when = finished(record)
        if when is None or not first <= when.date() <= today:
            outside += 1
        else:
            days.setdefault(when.date(), []).append(kind_of(record))
    parts = [el("text", name, x=0, y=_TOP + _CELL * row + 10) for row, name in ((0, "Mon"), (2, "Wed"), (4, "Fri"))]
    for week in range(WEEKS):
        monday = first + timedelta(weeks=week)
        if week != 1 and (week == 0 or monday.month != (monday - timedelta(weeks=1)).month):
            parts.append(el("text", f"{monday:%b}", x=_LEFT + _CELL * week, y=10))
        parts += [_day(week, monday + timedelta(days=n), days) for n in range(7) if monday + timedelta(days=n) <= today]
    label = f"Calendar of {sum(map(len, days.values()))} backups on {len(days)} days"
    return svg(_LEFT + _CELL * WEEKS, _TOP + _CELL * 7, label, *parts), outside


def _day(week: int, day: date, days: dict[date, list[str]]) -> Markup:
    kinds = days.get(day, [])
    shown = max(kinds, key=_KINDS.index) if kinds else "none"
    x, y = _LEFT + _CELL * week, _TOP + _CELL * day.weekday()
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in _KINDS if kind in kinds)
    box = el("rect", x=x, y=y, width=_CELL - 2, height=_CELL - 2, rx=2, class_=f"day {shown}")
    if not kinds:
        return box
    mark = el("circle", cx=x + 5.5, cy=y + 5.5, r=2, class_="mark") if shown in ("fallback", "incomplete") else ""
    return el("g", el("title", f"{day.isoformat()}: {counts}"), box, mark)


def traffic(records: Sequence[Record]) -> Markup:
    """Read and stored bytes of each backup, in their order, on a logarithmic scale from 1 KiB on."""
    shown = records[-POINTS:]
    read = [sum(d.read for d in r.disks) for r in shown]
    stored = [sum(d.stored for d in r.disks) for r in shown]
    top = max(math.ceil(math.log2(max([*read, *stored, 64 * KiB]) / KiB)), 1)
    height, left, right, above, below = 170, 52, WIDTH - 8, 8, 150

    def y(value: int) -> float:
        return below - (below - above) * max(math.log2(max(value, KiB) / KiB), 0) / top

    def x(number: int) -> float:
        return left + (right - left) * ((number + 0.5) / len(shown))

    parts = []
    for power in range(0, top + 1, 5 if top <= 20 else 10):
        at = round(y(KiB << power), 1)
        parts.append(el("line", x1=left, x2=right, y1=at, y2=at, class_="grid"))
        parts.append(el("text", format_size(KiB << power).replace(".0 ", " "), x=left - 5, y=at + 4, class_="end"))
    for name, values in (("read", read), ("stored", stored)):
        points = [(round(x(n), 1), round(y(v), 1)) for n, v in enumerate(values)]
        if len(points) > 1:
            line = " ".join(f"{px},{py}" for px, py in points)
            parts.append(el("polyline", points=line, class_=f"series {name}"))
        for record, value, (px, py) in zip(shown, values, points, strict=True):
            told = f"{record.id[:8]}, {record.finished[:16]}: {format_size(value)} {name}"
            parts.append(el("circle", el("title", told), cx=px, cy=py, r=2.2, class_=f"dot {name}"))
    parts += _span(shown, left, right, height)
    return svg(WIDTH, height, f"Bytes read and stored by {len(shown)} backups", *parts)


def _span(shown: Sequence[Record], left: int, right: int, height: int) -> list[Markup]:
    ends = [el("text", shown[0].finished[:10], x=left, y=height - 6)]
    return [*ends, el("text", shown[-1].finished[:10], x=right, y=height - 6, class_="end")]


def growth(records: Sequence[Record]) -> Markup:
    """What the backups have added to the repository, summed up in their order."""
    total, sums = 0, []
    for record in records:
        total += sum(d.stored for d in record.disks)
        sums.append(total)
    step = max(len(sums) // POINTS, 1)
    kept = sorted({*range(0, len(sums), step), len(sums) - 1})
    height, left, right, above, below = 150, 62, WIDTH - 8, 10, 128
    most = max(total, 1)

    def at(number: int) -> tuple[float, float]:
        x = left + (right - left) * number / max(len(sums) - 1, 1)
        return round(x, 1), round(below - (below - above) * sums[number] / most, 1)

    points = [at(n) for n in kept]
    points = [(float(left), points[0][1]), *points, (float(right), points[-1][1])]
    line = " ".join(f"{x},{y}" for x, y in points)
    parts = [
        el("polyline", points=f"{left},{below} {line} {right},{below}", class_="area"),
        el("polyline", points=line, class_="series stored"),
    ]
    for share in (0, 0.5, 1):
        y = below - (below - above) * share
        parts.append(el("line", x1=left, x2=right, y1=y, y2=y, class_="grid"))
        parts.append(el("text", format_size(total * share), x=left - 5, y=y + 4, class_="end"))
    parts += _span(records, left, right, height)
    return svg(WIDTH, height, f"Growth of the repository to {format_size(total)}", *parts)


def heat(found: DiskMap) -> Markup:
    """A part of the disk in each cell, row by row: the stronger, the more backups found it changed."""
    side = 11
    rows = -(-len(found.times) // _COLUMNS)
    parts = []
    times = found.times.tolist()
    edges = [found.size * n // len(times) for n in range(len(times) + 1)]
    for number, (count, (start, end)) in enumerate(zip(times, pairwise(edges), strict=True)):
        shade = -(-count * _SHADES // found.pairs)
        row, column = divmod(number, _COLUMNS)
        place = {"x": column * side, "y": row * side, "width": side - 1, "height": side - 1}
        box = el("rect", class_=f"q{shade}", **place)
        told = f"{format_size(start)} to {format_size(end)}: {count} of {found.pairs}"
        parts.append(el("g", el("title", told), box) if count else box)
    changed = sum(1 for count in times if count)
    label = f"Map of the disk: {changed} of {len(times)} parts changed"
    return svg(_COLUMNS * side, rows * side, label, *parts)


def shades() -> Markup:
    """The legend of `heat`."""
    side = 11
    boxes = [el("rect", x=n * side, y=0, width=side - 1, height=side - 1, class_=f"q{n}") for n in range(_SHADES + 1)]
    size = {"viewBox": f"0 0 {(_SHADES + 1) * side} {side}", "class_": "key", "aria_hidden": "true"}
    return el("svg", join(boxes), **size)

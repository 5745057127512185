"""Which backups stay: a pure function of the records of one VM and a policy, in the manner of restic.

The order of backups is the repository's own sequence, never a clock. Rules look at them from the newest to the oldest:

- ``last``: the newest N.
- ``hourly`` to ``yearly``: the newest backup of each of the newest N hours (days, ISO weeks ...) in UTC that have one.
  A new hour begins where the time's hour is another than that of the backup last kept by the rule.
- ``within``: what is less than DURATION older than the newest backup. Nothing is compared with the time of the day.
- ``tag``: what has one of the tags.

**Clocks may be wrong**, for one backup or for a month, backwards or forwards, and a record's time may be forged. So no
rule sorts by time, and none compares the times of backups that are far apart:

- A calendar rule compares a backup with the one that it kept before, so one wrong time changes nothing for newer
  backups, and costs the rule at most two of the older ones that it would keep. A clock that was a year ahead for a
  month leaves that month's backups in periods of their own.
- ``within`` adds up the gaps between neighbours. A gap counts for nothing when it is negative and for half of DURATION
  at most, so one backup from the future makes the others no older than that, whatever year it claims. A time that
  cannot be read makes no gap, and a period of its own.

**A backup dated ahead of the clock counts for no rule** and stays: N of them, from a clock that was wrong or forged,
would else fill ``daily`` N and remove every real one. It is counted again when its time has come; until then it can be
removed by name only. A clock of the pruning host that is behind makes all backups look dated ahead, and all stay.

What stays whatever the policy says: a pinned backup, the newest one that is good, and the newest good one in which no
disk failed. A VM without a good one loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from incbak.repo.record import Record, order

AHEAD = 3600.0
"""Seconds by which the clocks of two hosts may differ before a backup is dated ahead."""


@dataclass(frozen=True)
class Policy:
    """How many to keep by each rule, 0 for none; ``within`` in seconds; ``tags``: any of them is enough."""

    last: int = 0
    hourly: int = 0
    daily: int = 0
    weekly: int = 0
    monthly: int = 0
    yearly: int = 0
    within: float = 0.0
    tags: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether it would keep nothing."""
        return not any((self.last, self.hourly, self.daily, self.weekly, self.monthly, self.yearly, self.within)) and (
            not self.tags
        )


@dataclass(frozen=True)
class Decision:
    """``reasons``: the rules that keep the backup; none: it is removed."""

    record: Record
    reasons: tuple[str, ...]

    @property
    def keep(self) -> bool:
        """Whether it stays."""
        return bool(self.reasons)


_PERIODS: dict[str, Callable[[datetime], tuple[int, ...]]] = {
    "hourly": lambda t: (t.year, t.month, t.day, t.hour),
    "daily": lambda t: (t.year, t.month, t.day),
    "weekly": lambda t: t.isocalendar()[:2],
    "monthly": lambda t: (t.year, t.month),
    "yearly": lambda t: (t.year,),
}


def plan(
    records: Sequence[Record],
    policy: Policy,
    pinned: Collection[str],
    good: Collection[str],
    now: float | None = None,
) -> list[Decision]:
    """Return one decision per record of one VM, oldest first.

    ``good``: the ids of its good backups that must stay. ``now``: seconds since 1970, by which backups that are dated
    ahead are left out of the rules; ``None`` leaves none out.
    """
    newest_first = sorted(records, key=order, reverse=True)
    kept: dict[str, list[str]] = {r.id: [] for r in newest_first}
    counted = [r for r in newest_first if now is None or not dated_ahead(r.started, now)]
    for rule, numbers in _rules(counted, [time_of(r) for r in counted], policy):
        for number in numbers:
            kept[counted[number].id].append(rule)
    ahead = kept.keys() - {r.id for r in counted}
    for record in newest_first:
        if record.id in ahead:
            kept[record.id].append("dated ahead")
        if record.id in pinned:
            kept[record.id].append("pinned")
        if record.id in good:
            kept[record.id].append("last good")
        if not good:
            kept[record.id].append("no good backup")
    return [Decision(r, tuple(kept[r.id])) for r in reversed(newest_first)]


def _rules(
    records: Sequence[Record], times: Sequence[datetime | None], policy: Policy
) -> Iterator[tuple[str, Sequence[int]]]:
    """Each rule with the numbers of the records that it keeps; the newest is number 0."""
    yield "last", range(min(policy.last, len(records)))
    for rule, period in _PERIODS.items():
        yield rule, _by_period(times, period, getattr(policy, rule))
    if policy.within:
        yield "within", _within(times, policy.within)
    for tag in dict.fromkeys(policy.tags):
        yield f"tag {tag}", [i for i, r in enumerate(records) if tag in r.tags]


def _by_period(
    times: Sequence[datetime | None], period: Callable[[datetime], tuple[int, ...]], count: int
) -> list[int]:
    kept: list[int] = []
    before: object = None
    for number, time in enumerate(times):
        if len(kept) >= count:
            break
        now = period(time) if time else number
        if now != before:
            kept.append(number)
            before = now
    return kept


def _within(times: Sequence[datetime | None], duration: float) -> list[int]:
    kept: list[int] = []
    age = 0.0
    newer: datetime | None = None
    for number, time in enumerate(times):
        if time and newer:
            age += min(max((newer - time).total_seconds(), 0.0), duration / 2)
        newer = time or newer
        if age >= duration:
            break
        kept.append(number)
    return kept


def time_of(record: Record) -> datetime | None:
    """When a backup began, in UTC; ``None`` where the record does not say it in a form that can be read."""
    return _moment(record.started)


def dated_ahead(time: str, now: float) -> bool:
    """Return whether a record's time lies more than `AHEAD` after ``now`` (seconds since 1970).

    A time that cannot be read does not.
    """
    moment = _moment(time)
    return moment is not None and moment.timestamp() > now + AHEAD


def _moment(time: str) -> datetime | None:
    try:
        found = datetime.fromisoformat(time)
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except (ValueError, OverflowError):
        return None

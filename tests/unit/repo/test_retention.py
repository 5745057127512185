"""Which backups stay: the rules of restic where clocks are right, and no harm where they are not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import groupby

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.repo.record import Record
from incbak.repo.retention import AHEAD, Decision, Policy, dated_ahead, plan, time_of

COUNTS = ("last", "hourly", "daily", "weekly", "monthly", "yearly")
PERIODS = {
    "hourly": "%Y-%m-%d %H",
    "daily": "%Y-%m-%d",
    "weekly": "%G-%V",
    "monthly": "%Y-%m",
    "yearly": "%Y",
}
BEGIN = datetime(2026, 1, 1, tzinfo=UTC)
times = st.datetimes(datetime(1970, 1, 1), datetime(2199, 1, 1)).map(lambda t: t.isoformat() + "Z")
broken = st.sampled_from(["", "yesterday", "2026-13-01T00:00:00Z", "9999-12-31T23:59:59-14:00"])


def _record(seq: int, started: str, *tags: str) -> Record:
    return Record(
        id=f"{seq:032x}", seq=seq, vm="vm", kind="full", base=None, started=started, finished=started,
        cluster_size=65536, disks=(), engine="test", tags=tags,
    )  # fmt: skip


def _series(*gaps: timedelta) -> list[Record]:
    """Backups, oldest first, with these gaps between them."""
    moments = [BEGIN]
    for gap in gaps:
        moments.append(moments[-1] + gap)
    return [_record(i + 1, m.isoformat()) for i, m in enumerate(moments)]


def _kept(decisions: list[Decision], rule: str) -> list[int]:
    """The sequence numbers of what a rule keeps, newest first."""
    return [d.record.seq for d in reversed(decisions) if rule in d.reasons]


gaps = st.lists(st.integers(0, 5 * 86400).map(lambda s: timedelta(seconds=s)), max_size=40)
records = st.lists(times | broken, min_size=1, max_size=40).map(
    lambda ts: [_record(i + 1, t) for i, t in enumerate(ts)]
)
policies = st.builds(
    Policy,
    **{rule: st.integers(0, 5) for rule in COUNTS},  # type: ignore[arg-type]
    within=st.sampled_from([0.0, 3600.0, 10 * 86400.0]),
    tags=st.sampled_from([(), ("a",)]),
)


@given(gaps, st.sampled_from(sorted(PERIODS)), st.integers(1, 8))
@settings(deadline=None)
def test_a_calendar_rule_keeps_the_newest_of_each_of_the_newest_periods(
    gaps: list[timedelta], rule: str, count: int
) -> None:
    made = list(reversed(_series(*gaps)))
    by_period = [next(iter(group)).seq for _, group in groupby(made, lambda r: f"{time_of(r):{PERIODS[rule]}}")]
    assert _kept(plan(made, Policy(**{rule: count}), (), ["x"]), rule) == by_period[:count]  # type: ignore[arg-type]


@given(gaps, st.integers(1, 30))
@settings(deadline=None)
def test_within_is_counted_from_the_newest_backup(gaps: list[timedelta], days: int) -> None:
    """Of backups that come often enough: those less than so many days older than the newest; the time of the day
    that it is now plays no part."""
    duration = timedelta(days=days)
    if any(gap > duration / 2 for gap in gaps):
        gaps = [min(gap, duration / 2) for gap in gaps]
    made = _series(*gaps)
    newest = time_of(made[-1])
    assert newest
    wanted = [r.seq for r in reversed(made) if (t := time_of(r)) and newest - t < duration]
    assert _kept(plan(made, Policy(within=duration.total_seconds()), (), ["x"]), "within") == wanted


@given(records, policies, st.sets(st.integers(1, 40)), st.sets(st.integers(1, 40)))
@settings(max_examples=200, deadline=None)
def test_whatever_the_clocks_said(made: list[Record], policy: Policy, pinned: set[int], good: set[int]) -> None:
    """faults row 52: pins and good backups stay, no rule keeps more than it may, and the newest stay."""
    pins, sound = ({f"{seq:032x}" for seq in some} for some in (pinned, good))
    decisions = plan(made, policy, pins, sound)
    assert [d.record.seq for d in decisions] == [r.seq for r in made]
    assert {d.record.id for d in decisions if d.keep} >= {r.id for r in made if r.id in pins | sound}
    assert _kept(decisions, "last") == [r.seq for r in reversed(made)][: policy.last]
    for rule in PERIODS:
        kept, count = _kept(decisions, rule), getattr(policy, rule)
        assert len(kept) <= count
        assert not count or kept[0] == made[-1].seq
    if policy.within:
        assert _kept(decisions, "within")[0] == made[-1].seq
    if not sound:
        assert all(d.keep for d in decisions)


@given(records, st.data())
@settings(deadline=None)
def test_the_order_is_the_sequence_whatever_order_they_come_in(made: list[Record], data: st.DataObject) -> None:
    policy = Policy(last=3, daily=2, within=86400.0)
    assert plan(data.draw(st.permutations(made)), policy, (), ["x"]) == plan(made, policy, (), ["x"])


@given(records, times | broken, st.data())
@settings(max_examples=300, deadline=None)
def test_one_forged_time_costs_a_calendar_rule_two_older_backups_at_most(
    made: list[Record], forged: str, data: st.DataObject
) -> None:
    """faults rows 52, 79."""
    at = data.draw(st.integers(0, len(made) - 1))
    other = [msgspec.structs.replace(r, started=forged) if i == at else r for i, r in enumerate(made)]
    for rule in PERIODS:
        policy = Policy(**{rule: 6})  # type: ignore[arg-type]
        before, after = (set(_kept(plan(some, policy, (), ["x"]), rule)) for some in (made, other))
        lost = before - after - {at + 1}
        assert len(lost) <= 2
        assert all(seq < at + 1 for seq in lost), "no newer backup is lost"


@given(st.lists(st.integers(0, 86400), min_size=1, max_size=40), times | broken, st.data())
@settings(deadline=None)
def test_one_forged_time_ages_the_others_by_half_of_the_duration_at_most(
    seconds: list[int], forged: str, data: st.DataObject
) -> None:
    """A backup from the future, or from 1970, does not make the rest look old."""
    made = _series(*(timedelta(seconds=s) for s in seconds))
    at = data.draw(st.integers(0, len(made) - 1))
    other = [msgspec.structs.replace(r, started=forged) if i == at else r for i, r in enumerate(made)]
    duration = 10 * 86400.0
    half = set(_kept(plan(made, Policy(within=duration / 2), (), ["x"]), "within"))
    assert half <= set(_kept(plan(other, Policy(within=duration), (), ["x"]), "within"))


def test_a_clock_that_was_wrong_for_long_leaves_the_newest_and_the_older() -> None:
    """A month a year ahead; a month that was lived twice; a clock that begins in 1970 at each start."""
    day = timedelta(days=1)
    normal = [BEGIN + i * day for i in range(30)]
    ahead = [t + timedelta(days=365) for t in normal]
    lived_again = [t + timedelta(hours=1) for t in normal]
    for second in (ahead, lived_again, [datetime(1970, 1, 1, tzinfo=UTC) + i * day for i in range(30)]):
        for moments in (normal + second, second + normal):
            made = [_record(i + 1, t.isoformat()) for i, t in enumerate(moments)]
            assert len(_kept(plan(made, Policy(daily=60), (), ["x"]), "daily")) == 60
            assert _kept(plan(made, Policy(daily=7), (), ["x"]), "daily") == list(range(60, 53, -1))


@pytest.mark.parametrize("wrong", ["2099-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "never"])
def test_the_newest_backup_has_a_wrong_time(wrong: str) -> None:
    made = [*_series(*[timedelta(days=1)] * 29), _record(31, wrong)]
    decisions = plan(made, Policy(daily=7, within=14 * 86400.0), (), ["x"])
    assert {d.record.seq for d in decisions if d.keep} >= set(range(25, 32))


def test_reasons_are_told() -> None:
    made = [_record(1, "2026-01-01T00:00:00Z", "gold", "x"), _record(2, "2026-01-02T00:00:00Z"), *[
        _record(n, "2026-01-03T00:00:00Z") for n in (3, 4)
    ]]  # fmt: skip
    decisions = plan(made, Policy(last=1, daily=2, tags=("gold",)), {made[2].id}, {made[3].id})
    assert [d.reasons for d in decisions] == [("tag gold",), ("daily",), ("pinned",), ("last", "daily", "last good")]


def test_a_policy_without_a_rule_is_empty() -> None:
    assert Policy().empty
    for rule in COUNTS:
        assert not Policy(**{rule: 1}).empty  # type: ignore[arg-type]
    assert not Policy(within=1.0).empty
    assert not Policy(tags=("",)).empty


@pytest.mark.parametrize("rule", COUNTS)
@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_backups_dated_ahead_push_no_real_one_out(rule: str, order: slice) -> None:
    """Whichever came first: the rule keeps what it would keep without them, and they stay too."""
    days = 400 if rule == "yearly" else 31
    real = [BEGIN + timedelta(days=i * days) for i in range(8)]
    now = real[-1].timestamp()
    ahead = [real[-1] + timedelta(days=(i + 1) * days) for i in range(8)]
    moments = [m for group in (real, ahead)[order] for m in group]
    made = [_record(i + 1, m.isoformat()) for i, m in enumerate(moments)]
    policy = Policy(**{rule: 3})  # type: ignore[arg-type]
    decisions = plan(made, policy, (), ["x"], now)
    assert [d.record.started for d in decisions if rule in d.reasons] == [m.isoformat() for m in real[-3:]]
    assert [d.record.started for d in decisions if d.reasons == ("dated ahead",)] == [m.isoformat() for m in ahead]


@given(records, policies, st.floats(0, 7e9))
@settings(deadline=None)
def test_backups_dated_ahead_do_not_change_what_stays_of_the_others(
    made: list[Record], policy: Policy, now: float
) -> None:
    real = [r for r in made if not dated_ahead(r.started, now)]
    decisions = plan(made, policy, (), ["x"], now)
    others = [d for d in decisions if "dated ahead" not in d.reasons]
    assert others == plan(real, policy, (), ["x"])
    assert all(d.keep for d in decisions if d.record not in real)


def test_the_clocks_of_two_hosts_may_differ_a_little() -> None:
    """And what cannot be read is not ahead."""
    now = BEGIN.timestamp()
    moments = [BEGIN + timedelta(seconds=AHEAD + more) for more in (-1, 0, 1)]
    assert [dated_ahead(m.isoformat(), now) for m in moments] == [False, False, True]
    assert not dated_ahead("yesterday", now)

"""When the next backup is expected."""

from __future__ import annotations

import pytest

from incbak.report.rhythm import due_column, due_in

DAY = 86400.0


@pytest.mark.parametrize(
    ("finished", "now", "due"),
    [
        ([], 0.0, None),
        ([0.0, DAY], DAY, None),
        ([0.0, DAY, 2 * DAY], 2.5 * DAY, DAY / 2),
        ([0.0, DAY, 2 * DAY], 4 * DAY, -DAY),
        ([0.0, DAY, 2 * DAY, 2 * DAY + 60, 3 * DAY], 3 * DAY, DAY - 30),  # one made by hand in between
        ([0.0, *(1000 * DAY + n * 3600.0 for n in range(9))], 1000 * DAY + 8 * 3600, 3600.0),  # a pause of long ago
        ([3 * DAY, 0.0, 2 * DAY], 2 * DAY, DAY),  # a clock that was put back
    ],
)
def test_the_next_is_due_as_the_last_ones_came(finished: list[float], now: float, due: float | None) -> None:
    assert due_in(finished, now) == due


def test_it_is_told_in_words() -> None:
    assert [due_column(s) for s in (None, 7200.0, -7200.0)] == ["", "in 2h00m", "2h00m late"]

"""Planted faults: what removes backups, and what looks at their age."""

from torturelib.planted import Fault, unit

FAULTS = [
    Fault(
        "keep-within-minutes",
        "incbak/units.py",
        "(366 * 86400, 31 * 86400, 604800, 86400, 3600)",
        "(366 * 86400, 60, 604800, 86400, 3600)",
        unit("test_ground", "test_a_time_to_keep_backups_for_is_read_as_restic_reads_it"),
    ),
    Fault(
        "keep-within-bare-number",
        "incbak/units.py",
        "if not match or not any(match.groups()):",
        "if text.strip().isdigit():\n        return float(text)\n    if not match or not any(match.groups()):",
        unit("test_ground", "test_a_time_to_keep_backups_for_that_could_mean_another_is_refused"),
    ),
    Fault(
        "retention-counts-dated-ahead",
        "incbak/repo/retention.py",
        "if now is None or not dated_ahead(r.started, now)]",
        "if True]",
        unit("repo/test_retention", "test_backups_dated_ahead_push_no_real_one_out"),
    ),
    Fault(
        "retention-removes-dated-ahead",
        "incbak/repo/retention.py",
        "        if record.id in ahead:\n",
        "        if False:\n",
        unit("repo/test_retention", "test_backups_dated_ahead_push_no_real_one_out"),
    ),
    Fault(
        "status-dated-ahead-is-young",
        "incbak/cli/status.py",
        "if dated_ahead(finished, now.timestamp()):",
        "if False:",
        ("tests/story/test_prune.py::test_backups_from_a_clock_that_is_ahead_take_no_place_and_are_not_young",),
    ),
]

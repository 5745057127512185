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
    Fault(
        "remove-pinned",
        "incbak/repo/remove.py",
        "if ident in pins]:",
        "if False]:",
        unit("repo/test_remove", "test_one_pinned_among_them_and_none_is_removed"),
    ),
    Fault(
        "remove-pins-unlocked",
        "incbak/repo/remove.py",
        "pins = stack.enter_context(pins_held(repo.storage))",
        "with pins_held(repo.storage) as pins:\n            pass",
        unit("repo/test_remove", "test_a_pin_that_is_set_meanwhile_waits_for_the_removal"),
    ),
    Fault(
        "remove-beside-prune",
        "incbak/repo/remove.py",
        "stack.enter_context(repo.storage.lock(name, exclusive=exclusive, wait=options.lock_wait))",
        "pass",
        unit("repo/test_remove", "test_beside_a_prune_or_a_rebuild_nothing_is_removed"),
    ),
    Fault(
        "remove-ambiguous",
        "incbak/repo/remove.py",
        "if len(matches) != 1:",
        "if not matches:",
        unit("repo/test_remove", "test_a_prefix_of_two_is_refused_and_two_names_of_one_are_one"),
    ),
    Fault(
        "remove-unconfirmed",
        "incbak/cli/remove.py",
        "        if not yes:\n            _confirm",
        "        if False:\n            _confirm",
        ("tests/story/test_prune.py::test_a_backup_is_removed_on_purpose_also_the_newest",),
    ),
    Fault(
        "remove-alarms",
        "incbak/cli/remove.py",
        "        note_removed(here, repo, done.removed)\n",
        "",
        ("tests/story/test_prune.py::test_all_of_a_vm_is_removed_and_raises_no_alarm",),
    ),
    Fault(
        "backup-without-longest-duration",
        "incbak/cli/backup.py",
        "limit = asyncio.timeout(seconds)",
        "limit = asyncio.timeout(None)",
        ("tests/story/test_options.py::test_a_backup_that_takes_too_long_is_ended_and_leaves_nothing",),
    ),
    Fault(
        "systemd-ends-backups-early",
        "incbak/fleet/schedule.py",
        "turns = -(-len(limits) // _JOBS)",
        "turns = 1",
        ("tests/story/test_fleet.py::test_systemd_ends_no_backup_before_its_own_limit_does",),
    ),
    Fault(
        "state-forgets-the-format",
        "incbak/bitmap/store.py",
        "format=form or found.format)",
        "format=form)",
        unit("bitmap/test_look", "test_the_format_of_a_disk_stays_when_its_image_moves"),
    ),
]

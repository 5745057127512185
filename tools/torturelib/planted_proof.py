"""Faults in what proves that backups are good: checks that go on where the last one stopped, and drills."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_VERIFIED, _READING, _CHECK = (f"incbak/repo/{name}.py" for name in ("verified", "reading", "check"))


def _verified(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_verified", *tests)


_CHECKS = (
    Fault(
        "check-order",
        _VERIFIED,
        "key=lambda name: (self.read_at(name), name)",
        "key=lambda name: name",
        _verified("test_each_night_the_pack_that_was_read_longest_ago"),
    ),
    Fault(
        "check-marks-what-time-did-not-reach",
        _READING,
        "            return None\n        at, file",
        '            return PackRead(name, [], 0, clock(), verified.look(name) if verified else "")\n        at, file',
        _verified("test_each_night_the_pack_that_was_read_longest_ago"),
    ),
    Fault(
        "check-marks-damage-as-whole",
        _READING,
        "            if verified and not found.bad:\n",
        "            if verified:\n",
        _verified("test_a_damaged_pack_is_marked_after_its_damage_is_noted"),
    ),
    Fault(
        "check-forgets-known-damage",
        _CHECK,
        "    if not whole:\n",
        "    if False:\n",
        _verified("test_a_pack_with_damage_is_not_whole_and_no_night_forgets_it"),
    ),
    Fault(
        "check-removes-a-note-it-has-not-seen",
        _CHECK,
        "replace_notes(repo.storage, found.damaged, backups, old)",
        "replace_notes(repo.storage, found.damaged, backups, notes(repo.storage))",
        _verified("test_a_note_that_came_meanwhile_stays"),
    ),
    Fault(
        "check-believes-a-copy",
        _VERIFIED,
        " or mark.file != self.look(pack)",
        "",
        _verified("test_a_copied_repository_was_not_read", "test_a_pack_that_was_put_back_was_not_read"),
    ),
    Fault(
        "check-believes-the-future",
        _VERIFIED,
        "mark is None or not 0 < mark.at <= self._clock() or",
        "mark is None or",
        _verified("test_a_time_in_the_future_counts_for_nothing"),
    ),
    Fault(
        "check-believes-garbage",
        _VERIFIED,
        '    body = verified_body(data, f"verified {name}")\n',
        "    body = data.partition(b'\\n')[2]\n",
        _verified("test_one_flipped_bit_is_garbage"),
    ),
    Fault(
        "check-saves-nothing-when-interrupted",
        _READING,
        "        if verified and done:\n",
        "        if False:\n",
        _verified("test_an_interrupted_check_keeps_what_it_has_read"),
    ),
    Fault(
        "check-marks-what-has-no-table",
        _READING,
        'is not read: {e}"))\n            return None\n',
        'is not read: {e}"))\n            entries = np.zeros(0, dtype=pack.ENTRY)\n',
        unit("repo/test_large", "test_a_pack_whose_table_is_gone_by_its_turn_was_not_read"),
    ),
    Fault(
        "check-many-in-another-order",
        "incbak/repo/index.py",
        "found[order[here]] = True",
        "found[np.flatnonzero(here)] = True",
        unit("repo/test_large", "test_many_are_found_as_few_are"),
    ),
    Fault(
        "check-removes-before-it-writes",
        _VERIFIED,
        "        self._storage.write(KIND, fresh, digested(body))\n"
        "        self._storage.remove_all(KIND, self._replaces)\n",
        "        self._storage.remove_all(KIND, self._replaces)\n"
        "        self._storage.write(KIND, fresh, digested(body))\n",
        ("tests/story/test_check.py::test_killed_at_any_step_it_goes_on",),
    ),
)

_STORY, _DRILLS_FILE = "tests/story/test_drill.py", "incbak/repo/drills.py"
_DATA, _FSCK, _BOOT, _DRILL = (f"incbak/drill/{name}.py" for name in ("data", "fsck", "boot", "drill"))


def _drill(name: str, *tests: str) -> tuple[str, ...]:
    return unit(f"drill/test_{name}", *tests)


_DRILLS = (
    Fault(
        "drill-root-not-compared",
        _DATA,
        "    elif (root := target.root().hex()) != disk.root:\n",
        "    elif (root := target.root().hex()) is None:\n",
        _drill("data", "test_a_restore_that_goes_wrong_is_noticed"),
    ),
    Fault(
        "drill-damage-passed-over",
        _DATA,
        "    if done.damaged:\n",
        "    if False:\n",
        _drill("data", "test_damage_is_told_noted_and_stored_again"),
    ),
    Fault(
        "drill-damage-not-noted",
        _DRILL,
        "        add_note(repo.storage, damaged, {record.id})\n",
        "        pass\n",
        _drill("data", "test_damage_is_told_noted_and_stored_again"),
    ),
    Fault(
        "drill-sample-not-compared",
        _DATA,
        '    return "" if seal.digest(content) == digest else "it does not match its digest"\n',
        '    return ""\n',
        _drill("data", "test_a_sample_finds_what_it_reads"),
    ),
    Fault(
        "drill-lacks-a-disk",
        _DRILL,
        "for note in record.notes if record.incomplete]",
        "for note in record.notes if False]",
        _drill("data", "test_an_incomplete_backup_is_no_good_drill"),
    ),
    Fault(
        "drill-of-some-disks-counts",
        _DRILL,
        "    return made if options.disks else add_drill(",
        "    return add_drill(",
        _drill("data", "test_some_disks_are_no_drill_of_the_vm"),
    ),
    Fault(
        "drill-believes-a-copy",
        _DRILLS_FILE,
        "drill.repository == here and ",
        "",
        unit("repo/test_drills", "test_nobody_has_tried_to_restore_a_copy"),
    ),
    Fault(
        "drill-believes-the-future",
        _DRILLS_FILE,
        "0 < drill.at <= now",
        "0 < drill.at",
        unit("repo/test_drills", "test_the_future_counts_for_nothing"),
    ),
    Fault(
        "drill-believes-garbage",
        _DRILLS_FILE,
        '    body = verified_body(data, f"drill {name}")\n',
        "    body = data.partition(b'\\n')[2]\n",
        unit("repo/test_drills", "test_what_cannot_be_a_drill_is_passed_over_and_left_alone"),
    ),
    Fault(
        "drill-last-good-one-goes",
        _DRILLS_FILE,
        "if name != last_good]",
        "if name]",
        unit("repo/test_drills", "test_old_ones_go_but_for_the_last_good_one"),
    ),
    Fault(
        "drill-no-replay",
        _FSCK,
        '["e2fsck", "-p", scratch.path]',
        '["e2fsck", "-n", scratch.path]',
        _drill("fsck", "test_ext4_in_use_is_no_damage"),
    ),
    Fault(
        "drill-damaged-file-system-is-good",
        _FSCK,
        'return Verdict(BAD, f"e2fsck -fn exits with {code}: {said}") if code else Verdict(GOOD)',
        "return Verdict(GOOD)",
        _drill("fsck", "test_ext4_with_damage"),
    ),
    Fault(
        "drill-tools-as-root",
        _FSCK,
        "        user=NOBODY if root else None,\n",
        "",
        _drill("fsck", "test_tools_are_nobody"),
    ),
    Fault(
        "drill-tools-without-end",
        _FSCK,
        "        timeout=deadline,\n",
        "        timeout=None,\n",
        _drill("fsck", "test_a_tool_that_does_not_end_is_ended"),
    ),
    Fault(
        "drill-fills-the-disk",
        "incbak/drill/contents.py",
        "        if needs > self._left and self._directory.is_dir():\n",
        "        if False:\n",
        _drill("fsck", "test_what_there_is_no_room_for_is_not_checked"),
    ),
    Fault(
        "drill-believes-a-table",
        "incbak/drill/partitions.py",
        " or count * each > _MOST_ENTRIES or at * sector + count * each > size:\n",
        ":\n",
        _drill("partitions", "test_a_gpt_whose_numbers_cannot_be"),
    ),
    Fault(
        "drill-boots-with-a-network",
        _BOOT,
        '["-nic", "none", *wanted.arguments]',
        "wanted.arguments",
        _drill("boot", "test_a_guest_has_no_network_and_what_the_user_says_wins"),
    ),
    Fault(
        "drill-boots-damage",
        _DRILL,
        "    if options.boot and not any(each.problems for each in found.proved):\n",
        "    if options.boot:\n",
        _drill("boot", "test_what_is_damaged_is_not_booted"),
    ),
    Fault(
        "drill-leaves-qemu",
        "incbak/drill/guard.py",
        "    if ended not in ready:\n        child.kill()\n",
        "",
        (f"{_STORY}::test_qemu_ends_with_us",),
    ),
)

FAULTS = (*_CHECKS, *_DRILLS)

"""Planted faults: what cannot be read is taken for absent; other programs stop a run; a number is given twice."""

from torturelib.planted import Fault, unit

_PROGRAMS, _NUMBERS, _DAMAGE = "incbak/programs.py", "incbak/repo/numbers.py", "incbak/repo/damage.py"


def _unknown(test: str) -> tuple[str, ...]:
    return unit("repo/test_unknown", test)


def _programs(test: str) -> tuple[str, ...]:
    return unit("test_programs", test)


def _numbers(test: str) -> tuple[str, ...]:
    return unit("repo/test_numbers", test)


FAULTS = [
    Fault(
        "unknown: a note that cannot be read covers no content",
        _DAMAGE,
        "        return bool(self.unknown) or digest in self.digests\n",
        "        return digest in self.digests\n",
        _unknown("test_a_note_of_damage_may_be_of_anything"),
    ),
    Fault(
        "unknown: a note that cannot be read is of no content",
        _DAMAGE,
        "        return bool(self.digests or self.unknown)\n",
        "        return bool(self.digests)\n",
        _unknown("test_a_note_of_damage_may_be_of_anything"),
    ),
    Fault(
        "unknown: a note that cannot be read is of no backup",
        _DAMAGE,
        "        return frozenset(backups) if self.unknown else self.backups.intersection(backups)\n",
        "        return self.backups.intersection(backups)\n",
        (
            *_unknown("test_a_note_of_damage_may_be_of_anything"),
            *_unknown("test_no_policy_removes_a_backup_while_a_note_is_unknown"),
        ),
    ),
    Fault(
        "unknown: a check does not tell of a note that it cannot read",
        "incbak/repo/check.py",
        "    _unknown_notes(known, found, set(before) if whole else set())\n",
        "",
        _unknown("test_a_note_of_damage_may_be_of_anything"),
    ),
    Fault(
        "unknown: what is no plain file is not listed",
        "incbak/repo/storage/local.py",
        "found[entry.name] = info.st_size if stat.S_ISREG(info.st_mode) else 0",
        "found.update({entry.name: info.st_size} if stat.S_ISREG(info.st_mode) else {})",
        (
            *_unknown("test_nothing_is_freed_that_a_record_may_need"),
            *_unknown("test_a_pin_is_a_pin_whatever_it_is"),
        ),
    ),
    Fault(
        "unknown: what is no plain file has the size of a file",
        "incbak/repo/storage/local.py",
        "info.st_size if stat.S_ISREG(info.st_mode) else 0",
        "info.st_size",
        unit("repo/test_formats", "test_links_and_other_oddities_are_not_followed"),
    ),
    Fault(
        "keys: a key of another repository counts as one that stays",
        "incbak/repo/keys.py",
        "    ours = [key for key in found if key.repository == repository]\n",
        "    ours = list(found)\n",
        unit("repo/test_cipher", "test_keys_of_other_repositories_are_not_tried"),
    ),
    Fault(
        "keys: the key that stays need not hold the master key",
        "incbak/repo/keys.py",
        "passphrase)) is not None and proves(master):\n",
        "passphrase)) is not None:\n",
        unit("repo/test_cipher", "test_a_key_that_opens_nothing_is_no_key_that_stays"),
    ),
    Fault(
        "programs: what a program leaves behind is waited for",
        _PROGRAMS,
        "                elif key.fd == ended:\n",
        "                elif key.fd == ended and len(selector.get_map()) == 1:\n",
        _programs("test_what_it_leaves_behind_is_not_waited_for"),
    ),
    Fault(
        "programs: what is left behind may print for ever",
        _PROGRAMS,
        "        while done < _DRAINED and (count",
        "        while (count",
        _programs("test_what_is_left_behind_may_print_for_ever"),
    ),
    Fault(
        "programs: all that is printed is kept",
        _PROGRAMS,
        "            self._behind -= len(self._tail.popleft())\n",
        "            break\n",
        _programs("test_no_more_is_kept_on_the_way"),
    ),
    Fault(
        "programs: what it has started goes on when it is ended",
        _PROGRAMS,
        "            os.killpg(process.pid, number) if group else os.kill(process.pid, number)\n",
        "            os.kill(process.pid, number)\n",
        _programs("test_what_it_has_started_can_end_in_peace"),
    ),
    Fault(
        "programs: who does not hear SIGTERM goes on",
        _PROGRAMS,
        "                os.killpg(process.pid, signal.SIGKILL)  # whoever has not heard SIGTERM\n",
        "                pass\n",
        _programs("test_it_is_ended_with_all_that_it_has_started"),
    ),
    Fault(
        "programs: an interrupt leaves it running",
        _PROGRAMS,
        "            _end(process, group=not terminal)\n            raise\n",
        "            raise\n",
        _programs("test_an_interrupt_ends_it"),
    ),
    Fault(
        "numbers: that of a removed backup is given again",
        _NUMBERS,
        "*removed_numbers(storage).values()), default=0)",
        "), default=0)",
        (*_numbers("test_a_number_is_not_given_again"), *_numbers("test_a_sync_goes_on_after_the_newest_was_removed")),
    ),
    Fault(
        "numbers: the record goes first",
        _NUMBERS,
        "    try:\n        note_removal(storage, records, going)\n",
        '    storage.remove_all("backups", going)\n    try:\n        note_removal(storage, records, going)\n',
        _numbers("test_the_number_is_durable_before_the_record_is_gone"),
    ),
    Fault(
        "numbers: a full disk keeps a backup that was removed",
        _NUMBERS,
        "    except DurabilityError as e:\n",
        "    except ZeroDivisionError as e:\n",
        _numbers("test_on_a_full_disk_the_backup_is_removed_all_the_same"),
    ),
    Fault(
        "sync: a removed newest backup looks as if the source was put back",
        "incbak/sync/plan.py",
        "    if max(removed, *by_seq) < newest.origin.seq:\n",
        "    if max(by_seq) < newest.origin.seq:\n",
        (
            *unit("sync/test_plan", "test_what_was_removed_from_the_source_is_no_sign_that_it_was_put_back"),
            *_numbers("test_a_sync_goes_on_after_the_newest_was_removed"),
        ),
    ),
    Fault(
        "drill: how it went is lost where it cannot be written down",
        "incbak/drill/drill.py",
        "        raise NotWrittenError(made, e) from e\n",
        "        raise\n",
        ("tests/story/test_drill.py::test_it_tells_how_it_went_where_it_cannot_be_written_down",),
    ),
    Fault(
        "restore: a read-only device is found out by the first write",
        "incbak/restore/targets.py",
        "            if _read_only(self._guard):\n",
        "            if False:\n",
        unit("restore/test_device", "test_a_read_only_device_is_refused_before_it_is_written"),
    ),
    Fault(
        "outputs: a file takes the place of a pipe",
        "incbak/newfile.py",
        "    if not stat.S_ISREG(mode):\n        raise UsageError(f\"{path} is no regular file, and is not replaced\"",
        "    if False:\n        raise UsageError(f\"{path} is no regular file, and is not replaced\"",
        unit("test_opening", "test_metrics_replace_metrics_only"),
    ),
    Fault(
        "outputs: a file takes the place of a device's name",
        "incbak/newfile.py",
        "    if _below(parent, _DEVICES) and not _below(parent, _MEMORY):\n",
        "    if False:\n",
        unit("cli/test_streams", "test_a_file_behind_stdout_is_no_file_to_replace"),
    ),
    Fault(
        "programs: a signal interrupts its start",
        _PROGRAMS,
        "    with _Held() as signals:\n",
        "    signals = _Held()\n    if True:\n",
        _programs("test_a_signal_disturbs_neither_the_start_nor_the_end"),
    ),
    Fault(
        "programs: a signal that came is not looked at",
        _PROGRAMS,
        "            look()\n",
        "",
        _programs("test_a_signal_disturbs_neither_the_start_nor_the_end"),
    ),
    Fault(
        "programs: a signal that came at its end is forgotten",
        _PROGRAMS,
        "            signal.raise_signal(number)\n",
        "            pass\n",
        _programs("test_a_signal_at_its_end_is_not_lost"),
    ),
    Fault(
        "programs: who has many descriptors leaves it running",
        _PROGRAMS,
        "                os.killpg(process.pid, signal.SIGKILL) if group else process.kill()\n",
        "                pass\n",
        _programs("test_without_a_descriptor_it_is_killed"),
    ),
    Fault(
        "programs: its time is one wait",
        _PROGRAMS,
        "selector.select(_LOOK if left is None else min(left, _LOOK))",
        "selector.select(left)",
        _programs("test_its_time_may_be_long"),
    ),
    Fault(
        "hooks: they go on when we are ended",
        "incbak/cli/surroundings.py",
        "        with interruptible():  # a hook is ended when we are\n",
        "        if True:\n",
        ("tests/story/test_fleet.py::test_a_hook_ends_with_us",),
    ),
    Fault(
        "unknown: a folder cannot be removed",
        "incbak/repo/storage/local.py",
        "                    try:\n                        path.rmdir()\n",
        "                    try:\n                        raise OSError\n",
        _unknown("test_a_folder_in_the_place_of_a_file_can_be_got_rid_of"),
    ),
    Fault(
        "unknown: a folder that holds something cannot be removed",
        "incbak/repo/storage/local.py",
        "                        path.rename(path.with_name(",
        "                        print(path.with_name(",
        _unknown("test_a_folder_in_the_place_of_a_file_can_be_got_rid_of"),
    ),
    Fault(
        "unknown: a note is called replaced that stays",
        "incbak/repo/check.py",
        "        _unknown_notes(known, found, set())\n",
        "        _unknown_notes(known, found, set(before))\n",
        _unknown("test_a_note_that_cannot_be_removed_stays_unknown"),
    ),
    Fault(
        "unknown: what is no pack of any index is damage",
        "incbak/repo/check.py",
        "            if not size and name not in _named(repo):\n",
        "            if False:\n",
        _unknown("test_what_is_no_pack_and_named_by_nothing_does_no_harm"),
    ),
    Fault(
        "numbers: any number is believed",
        _NUMBERS,
        "all(0 <= number < _LARGEST for number in found.numbers.values())",
        "True",
        _numbers("test_what_cannot_be_read_says_nothing_and_stays"),
    ),
    Fault(
        "numbers: a newer form is read as this one",
        _NUMBERS,
        "    sound = found.version == VERSION and ",
        "    sound = ",
        _numbers("test_what_cannot_be_read_says_nothing_and_stays"),
    ),
    Fault(
        "numbers: what cannot be read is replaced",
        _NUMBERS,
        "    old = list(_files(storage))\n",
        "    old = list(storage.list(KIND))\n",
        _numbers("test_what_cannot_be_read_says_nothing_and_stays"),
    ),
]  # fmt: skip

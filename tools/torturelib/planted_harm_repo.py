"""Planted faults of what a repository must not lose, believe or stop for."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_STORY = "tests/story/test_encryption.py::"

_PLACE = (
    Fault(
        "repo-init-among-remains",
        "incbak/repo/repository.py",
        "        refuse_remains(path)\n        if passphrase is not None",
        "        if passphrase is not None",
        unit("repo/test_place", "test_one_file_of_any_kind_is_enough"),
    ),
    Fault(
        "repo-lost-config-told-to-init",
        "incbak/repo/repository.py",
        "            refuse_remains(path)\n            what =",
        "            what =",
        unit("repo/test_place", "test_a_repository_without_its_config_is_left_as_it_is"),
    ),
    Fault(
        "repo-address-made-a-directory",
        "incbak/repo/place.py",
        '    if _ADDRESS.match(str(path)) and not (path / "config").is_file():\n',
        "    if False:\n",
        unit("repo/test_place", "test_an_address_is_no_directory"),
    ),
)

_FITTING = (
    Fault(
        "repo-record-not-decoded-again",
        "incbak/repo/fitting.py",
        "        if records.encode(records.decode(made.id, data)) != data:\n",
        "        if False:\n",
        unit("repo/test_fitting", "test_what_nobody_could_read_is_not_committed"),
    ),
    Fault(
        "repo-record-of-any-size",
        "incbak/repo/fitting.py",
        "        if len(data) > records.LIMIT:\n",
        "        if False:\n",
        unit("repo/test_fitting", "test_what_nobody_could_read_is_not_committed"),
    ),
    Fault(
        "repo-left-out-of-the-record-in-silence",
        "incbak/repo/fitting.py",
        "        notes=(*notes, *lost),\n",
        "        notes=tuple(notes),\n",
        unit("repo/test_fitting", "test_a_part_that_is_too_large_is_left_out_loudly"),
    ),
)

_ENCRYPTION = (
    Fault(
        "repo-plain-taken-with-a-passphrase",
        "incbak/cli/settings.py",
        "        if not config.cipher and (source := passphrase.source):\n",
        '        if not config.cipher and (source := ""):\n',
        (_STORY + "test_a_plain_one_is_not_used_where_a_passphrase_is_configured",),
    ),
    Fault(
        "repo-reading-is-not-remembered",
        "incbak/cli/settings.py",
        "                self.memory.note_place(path, config, repo.key)\n",
        "                pass\n",
        (_STORY + "test_who_has_only_read_it_notices_too",),
    ),
    Fault(
        "repo-planted-keys-first",
        "incbak/repo/keys.py",
        "key=lambda key: (key.id != first, key.cost.work))",
        "key=lambda key: key.created)",
        unit("repo/test_cipher", "test_planted_keys_that_cost_more_are_not_tried_before_ours"),
    ),
    Fault(
        "repo-planted-keys-hide-ours",
        "incbak/repo/keys.py",
        "    for name in sorted(storage.list(KIND), key=lambda n: (n != first, n))[:_MAX_READ]:\n",
        "    for name in sorted(storage.list(KIND))[:_MAX_READ]:\n",
        unit("repo/test_cipher", "test_the_key_that_opened_it_last_is_tried_first"),
    ),
    Fault(
        "repo-all-planted-keys-tried",
        "incbak/repo/keys.py",
        "key.cost.work))[:MAX_KEYS]",
        "key.cost.work))",
        unit("repo/test_cipher", "test_only_so_many_keys_are_tried"),
    ),
    Fault(
        "repo-a-guess-takes-a-gibibyte",
        "incbak/repo/keys.py",
        "_MAX_MEMORY = 256 << 20\n",
        "_MAX_MEMORY = 1 << 30\n",
        unit("repo/test_cipher", "test_a_guess_takes_256_mib_and_four_passes_at_most"),
    ),
)

_SYNC = (
    Fault(
        "repo-sync-forgets-what-it-missed",
        "incbak/sync/copy.py",
        "                    self._missed.add(record.id)\n",
        "",
        unit("sync/test_copy", "test_what_was_missed_is_copied_when_it_can_be_read"),
    ),
    Fault(
        "repo-sync-never-tries-again",
        "incbak/sync/plan.py",
        "(r.seq > reached or r.id in missed or _late(r, reached))",
        "(r.seq > reached)",
        unit("sync/test_copy", "test_a_record_that_could_not_be_read_is_copied_later"),
    ),
    Fault(
        "repo-sync-late-is-latest",
        "incbak/sync/copy.py",
        "seq=self._number(record),",
        "seq=self._seq + 1,",
        unit("sync/test_copy", "test_what_was_missed_is_copied_when_it_can_be_read"),
    ),
)

_DURABLE, _LOCAL = "incbak/durable.py", "incbak/repo/storage/local.py"

_STORAGE = (
    Fault(
        "repo-rename-replaces",
        _DURABLE,
        "    if os.path.lexists(path):\n",
        "    if False:\n",
        unit("test_durable", "test_without_hard_links_it_is_renamed_and_nothing_is_replaced"),
    ),
    Fault(
        "repo-no-links-no-names",
        _DURABLE,
        "            if e.errno not in (*_NOT_SUPPORTED, errno.EPERM, errno.EMLINK):\n",
        "            if True:\n",
        unit("test_durable", "test_without_hard_links_it_is_renamed_and_nothing_is_replaced"),
    ),
    Fault(
        "repo-failed-directory-sync-passed-over",
        _DURABLE,
        "        if e.errno not in _NOT_SUPPORTED:\n            raise DurabilityError(",
        "        if False:\n            raise DurabilityError(",
        unit("test_durable", "test_only_a_directory_that_cannot_be_synced_at_all_is_passed_over"),
    ),
    Fault(
        "repo-temporary-not-held",
        _DURABLE,
        "            fcntl.flock(fd, fcntl.LOCK_EX)\n",
        "            pass\n",
        unit("test_durable", "test_a_temporary_file_is_removed_only_when_its_process_is_dead"),
    ),
    Fault(
        "repo-temporary-removed-before-it-is-held",
        _DURABLE,
        "        if os.path.lexists(temporary):\n            return fd\n",
        "        return fd\n",
        unit("test_durable", "test_one_that_is_removed_before_it_is_held_is_made_again"),
    ),
    Fault(
        "repo-dead-runs-leave-files",
        _LOCAL,
        "                    if path.name.endswith(durable.HELD) and durable.remove_abandoned(path):\n",
        "                    if False:\n",
        unit("repo/test_formats", "test_temporary_files_of_dead_runs_are_swept_at_once"),
    ),
    Fault(
        "repo-lost-folder-is-empty",
        _LOCAL,
        "        if not self.root.is_dir() or any((self.root / other).is_dir() for other in theirs):\n",
        "        if not self.root.is_dir():\n",
        unit("repo/test_formats", "test_a_folder_of_content_that_is_missing_beside_others_is_damage"),
    ),
    Fault(
        "repo-open-files-not-bounded",
        _LOCAL,
        "            if len(self._files) >= _open_files():\n",
        "            if len(self._files) >= _OPEN_FILES:\n",
        unit("repo/test_formats", "test_as_many_files_stay_open_as_the_process_may_have"),
    ),
)

_PRUNE, _INDEX, _CHECK = (f"incbak/repo/{name}.py" for name in ("prune", "index", "check"))


def _lived(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_lived_with", *tests)


_DAMAGE = (
    Fault(
        "repo-content-of-unreadable-records-goes",
        _PRUNE,
        "            if self._unsure:\n                raise self._unsure\n",
        "",
        _lived("test_an_unreadable_record_keeps_all_content_and_stops_no_other_vm"),
    ),
    Fault(
        "repo-backups-of-a-hurt-vm-go",
        _PRUNE,
        'replace(d, reasons=d.reasons or ("not whole",)) if d.record.vm in held else d',
        "d",
        _lived("test_an_older_backup_stays_beside_one_that_is_hurt"),
    ),
    Fault(
        "repo-healed-never-forgotten",
        _PRUNE,
        "{*self._mostly_garbage(), *self._hurt()}",
        "{*self._mostly_garbage()}",
        _lived("test_what_was_healed_is_forgotten"),
    ),
    Fault(
        "repo-full-disk-stays-full",
        _PRUNE,
        "            if self._options.grace or not _is_full(e):\n",
        "            if True:\n",
        _lived("test_a_disk_without_room_for_a_condemnation_is_freed"),
    ),
    Fault(
        "repo-no-grace-on-a-full-disk",
        _PRUNE,
        "            if self._options.grace or not _is_full(e):\n",
        "            if not _is_full(e):\n",
        _lived("test_with_a_grace_it_waits_for_room"),
    ),
    Fault(
        "repo-lost-index-not-doubted",
        _INDEX,
        'return f"{len(self.unnamed)} packs are there that no index names" if self.unnamed else ""',
        'return ""',
        _lived("test_a_lost_index_is_called_that_and_made_anew"),
    ),
    Fault(
        "repo-index-damaged-for-ever",
        _INDEX,
        "        self.why = {name: why for name, why in self.why.items() if name in names}\n",
        "",
        _lived("test_a_lost_index_is_called_that_and_made_anew"),
    ),
    Fault(
        "repo-unreadable-index-mapped",
        "incbak/repo/mapping.py",
        "            found = StoredBytes(fd, kind, name, hint)\n",
        "            found = np.memmap(path, dtype=np.uint8, mode='r')\n",
        _lived("test_an_index_that_the_storage_cannot_read_is_an_error_and_not_a_signal"),
    ),
    Fault(
        "repo-damage-not-told-where-it-cannot-be-noted",
        _CHECK,
        "        raise NotNotedError(found, e) from e\n",
        "        raise\n",
        _lived("test_damage_is_in_the_error_where_it_cannot_be_noted"),
    ),
)

_OTHERS = (
    Fault(
        "repo-older-taken-for-the-latest-in-silence",
        "incbak/repo/repository.py",
        "            for why in self.unreadable.values():\n                log",
        "            for why in ():\n                log",
        _lived("test_what_may_not_be_the_latest_is_told"),
    ),
    Fault(
        "repo-stray-record-stops-a-prune",
        _PRUNE,
        'ids(self._storage.list("backups")).keys() - self._needs.counted',
        'self._storage.list("backups").keys() - self._needs.counted',
        _lived("test_stray_files_stop_nothing_and_stay"),
    ),
    Fault(
        "repo-one-record-stops-all",
        "incbak/repo/repository.py",
        '            raise DamagedError(f"the record of backup {name} cannot be read: {e.strerror}") from e\n',
        "            raise\n",
        _lived("test_a_record_that_the_storage_cannot_read_is_one_of_many"),
    ),
    Fault(
        "repo-hurt-target-of-one-vm-synced",
        "incbak/sync/copy.py",
        "        planned.copy.pop(vm, None)\n",
        "",
        unit("sync/test_copy", "test_a_record_that_cannot_be_read_in_the_target_stops_its_vm_only"),
    ),
)

FAULTS = (*_PLACE, *_FITTING, *_ENCRYPTION, *_SYNC, *_STORAGE, *_DAMAGE, *_OTHERS)

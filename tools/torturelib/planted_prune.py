"""Faults in pruning: what keeps a backup, what keeps content, and in which order they go."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_PRUNE, _RETENTION, _GOOD, _REPACK, _PINS, _CONDEMNED, _INDEX, _MERGE, _CHECK, _READER, _WRITER, _REPOSITORY = (
    f"incbak/repo/{name}.py"
    for name in (
        *("prune", "retention", "good", "repack", "pins", "condemned"),
        *("index", "merge", "check", "reader", "writer", "repository"),
    )
)
_BESIDE = "tests/unit/backup/test_prune_beside.py::"


def _prune(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_prune", *tests)


def _kills(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_prune_kills", *tests)


def _rule(*tests: str) -> tuple[str, ...]:
    return unit("repo/test_retention", *tests)


_BACKUPS = (
    Fault(
        "prune-pinned",
        _RETENTION,
        "        if record.id in pinned:\n",
        "        if False:\n",
        _rule("test_whatever_the_clocks_said"),
    ),
    Fault(
        "prune-pinned-meanwhile",
        _PRUNE,
        "[ident for ident in going if ident not in pins]",
        "going",
        _prune("test_a_backup_that_is_pinned_at_the_last_moment_stays"),
    ),
    Fault(
        "prune-pins-not-locked",
        _PINS,
        '    with storage.lock("pins.lock", exclusive=True, wait=_WAIT):\n        yield',
        "    if True:\n        yield",
        _prune("test_a_pin_and_a_prune_do_not_cross"),
    ),
    Fault(
        "prune-last-good",
        _RETENTION,
        "        if record.id in good:\n",
        "        if False:\n",
        _prune("test_the_last_good_backup_stays"),
    ),
    Fault(
        "prune-no-good-one-left",
        _RETENTION,
        "        if not good:\n",
        "        if False:\n",
        _rule("test_whatever_the_clocks_said"),
    ),
    Fault(
        "prune-noted-damage-is-good",
        _GOOD,
        "        if record.id in noted or (found and record.incomplete):\n",
        "        if found and record.incomplete:\n",
        _prune("test_the_last_good_backup_stays"),
    ),
    Fault(
        "prune-part-of-a-vm-is-good",
        _GOOD,
        "        if not record.incomplete:\n            break\n",
        "        break\n",
        _prune("test_the_last_backup_with_all_disks_stays"),
    ),
    Fault(
        "prune-by-the-clock",
        _RETENTION,
        "key=order, reverse=True)",
        "key=lambda r: (r.started, r.seq, r.id), reverse=True)",
        _rule("test_whatever_the_clocks_said"),
    ),
    Fault(
        "prune-one-from-the-future-ages-all",
        _RETENTION,
        "min(max((newer - time).total_seconds(), 0.0), duration / 2)",
        "max((newer - time).total_seconds(), 0.0)",
        _rule("test_one_forged_time_ages_the_others_by_half_of_the_duration_at_most"),
    ),
    Fault(
        "prune-a-rule-for-nothing",
        _PRUNE,
        "    if any(policy.empty for policy in ([rules] if isinstance(rules, Policy) else rules.values())):\n",
        "    if False:\n",
        _prune("test_each_vm_has_its_own"),
    ),
)

_DAMAGE = (
    Fault(
        "repo-one-copy-of-an-index-file",
        _INDEX,
        "                p = file.places[row]\n",
        "                p = file.places[row]\n"
        "                if found and found[-1].pack in file.names:\n                    break\n",
        unit("repo/test_damage", "test_every_copy_is_tried_where_one_index_file_names_them_all"),
    ),
    Fault(
        "prune-without-counting",
        _PRUNE,
        "        decisions = self._count_the_rest(decisions, broken)\n",
        "",
        _prune("test_where_anything_is_damaged_nothing_is_removed"),
    ),
    Fault(
        "prune-unreadable-records-passed-over",
        _PRUNE,
        "        if repo.unreadable:\n            why =",
        "        if False:\n            why =",
        _prune("test_where_anything_is_damaged_nothing_is_removed"),
    ),
    Fault(
        "prune-damaged-index-passed-over",
        _PRUNE,
        "        if repo.index.damaged:\n",
        "        if False:\n",
        _prune("test_where_anything_is_damaged_nothing_is_removed"),
    ),
    Fault(
        "prune-spare-copies-go",
        _PRUNE,
        "        return digests is not None and not self._needs.needed(digests).any()\n",
        "        return digests is not None\n",
        unit("repo/test_needs", "test_what_is_kept_of_packs_decides_nothing"),
    ),
    Fault(
        "prune-stray-copies-go",
        _PRUNE,
        "            if not (damage and any(damage.covers(d.tobytes()) for d in digests)):\n",
        "            if True:\n",
        _prune("test_a_stray_pack_with_a_copy_of_what_is_damaged_stays"),
    ),
    Fault(
        "prune-unknown-condemnations-passed-over",
        _INDEX,
        "n not in condemned.packs and not condemned.unknown for n",
        "n not in condemned.packs for n",
        _prune("test_a_condemnation_that_cannot_be_read_makes_backups_rely_on_nothing"),
    ),
    Fault(
        "prune-base-beside-unknown-condemnations",
        _INDEX,
        "        if self.damaged or self.condemned.unknown:\n",
        "        if self.damaged:\n",
        _prune("test_a_condemnation_that_cannot_be_read_makes_backups_rely_on_nothing"),
    ),
)

_BESIDE_OTHERS = (
    Fault(
        "prune-condemns-beside-a-backup",
        _PRUNE,
        "self._storage.lock(CONTENT_LOCK, exclusive=True, wait=wait)",
        "self._storage.lock(CONTENT_LOCK, exclusive=False, wait=wait)",
        (_BESIDE + "test_what_a_run_finds_there_stays_until_it_has_committed",),
    ),
    Fault(
        "prune-not-noticed-by-a-backup",
        _REPOSITORY,
        "            stack.enter_context(self.storage.lock(CONTENT_LOCK, exclusive=False, wait=moment))\n",
        "",
        (_BESIDE + "test_what_a_run_finds_there_stays_until_it_has_committed",),
    ),
    Fault(
        "prune-lock-not-looked-at-again",
        _REPOSITORY,
        "for n in (REPOSITORY_LOCK, name, CONTENT_LOCK)}",
        "for n in (REPOSITORY_LOCK, name)}",
        _prune("test_a_lock_file_that_goes_stops_the_backup"),
    ),
    Fault(
        "prune-backup-fails-in-the-moment",
        _REPOSITORY,
        "            moment = max(wait, _CONDEMNING)\n",
        "            moment = wait\n",
        _prune("test_a_backup_waits_for_the_moment_in_which_packs_are_condemned"),
    ),
    Fault(
        "prune-later-backups-not-counted",
        _PRUNE,
        "                if not fresh:\n",
        "                if True:\n",
        _prune("test_a_backup_that_is_made_meanwhile_keeps_what_it_uses"),
    ),
    Fault(
        "prune-later-needs-not-copied",
        _REPACK,
        "        return bool(np.isin(needed, copied).all())\n",
        "        return bool(np.isin(needed, copied).any())\n",
        _prune("test_a_backup_that_is_made_meanwhile_keeps_what_it_uses"),
    ),
    Fault(
        "prune-condemned-content-built-on",
        _WRITER,
        "found = self._index.have(digests, lasting=True)",
        "found = self._index.have(digests)",
        _prune("test_nothing_is_built_on_what_is_condemned"),
    ),
    Fault(
        "prune-two-at-once",
        _PRUNE,
        "(PRUNE_LOCK, True)",
        "(PRUNE_LOCK, False)",
        _prune("test_beside_another_prune_and_a_rebuild_of_the_index_it_is_refused"),
    ),
    Fault(
        "prune-beside-a-rebuild",
        _PRUNE,
        "((PRUNE_LOCK, True), (REPOSITORY_LOCK, False))",
        "((PRUNE_LOCK, True),)",
        _prune("test_beside_another_prune_and_a_rebuild_of_the_index_it_is_refused"),
    ),
    Fault(
        "prune-index-merged-meanwhile",
        _MERGE,
        "        with suppress(LockedError), storage.lock(_LOCK, exclusive=True, wait=0):\n",
        "        with suppress(LockedError):\n",
        _prune("test_index_files_are_not_merged_while_a_prune_replaces_them"),
    ),
    Fault(
        "prune-readers-do-not-look-again",
        _READER,
        "            if not self._index.stale():\n                raise\n",
        "            raise\n",
        _prune("test_mostly_garbage_is_repacked_and_readers_find_it"),
    ),
    Fault(
        "prune-is-a-loss-to-a-check",
        _CHECK,
        "        if not _pruned(repo, name):\n            found",
        "        if True:\n            found",
        _prune("test_a_check_sees_no_loss_where_a_prune_is_under_way"),
    ),
    Fault(
        "prune-of-blobs-is-a-loss-to-a-check",
        _CHECK,
        "            if _pruned(repo, name):\n                continue\n",
        "",
        _prune("test_a_check_that_is_overtaken_by_a_prune_sees_no_loss"),
    ),
    Fault(
        "prune-of-records-is-a-loss-to-a-check",
        _CHECK,
        '        if problem and record.id not in repo.storage.list("backups"):\n',
        "        if False:\n",
        _prune("test_a_check_that_is_overtaken_by_a_prune_sees_no_loss"),
    ),
    Fault(
        "prune-makes-the-index-look-incomplete",
        _INDEX,
        '            if {f.name for f in files} <= self._storage.list("index").keys():\n                break\n',
        "            break\n",
        _prune("test_an_index_read_while_a_prune_goes_by_is_complete"),
    ),
    Fault(
        "prune-grace",
        _CONDEMNED,
        "        return abs(now - self.at) >= grace\n",
        "        return True\n",
        _prune("test_content_goes_when_its_grace_is_over"),
    ),
)

_ORDER = (
    Fault(
        "prune-condemnation-goes-first",
        _PRUNE,
        '        self._storage.remove_all("packs", sorted(packs & there.keys()))\n',
        '        self._storage.remove_all("condemned", sorted(over))\n'
        '        self._storage.remove_all("packs", sorted(packs & there.keys()))\n',
        _kills("test_killed_anywhere_every_listed_backup_restores"),
    ),
    Fault(
        "prune-index-names-what-is-gone",
        _PRUNE,
        "        drop_packs(self._storage, packs)\n",
        "",
        _prune("test_all_that_only_removed_backups_had_is_gone"),
    ),
    Fault(
        "prune-old-index-goes-first",
        _MERGE,
        "                _write_without(storage, _file(storage, name, verify=True), packs)\n",
        "                file = _file(storage, name, verify=True)\n"
        '                storage.remove("index", name)\n'
        "                _write_without(storage, file, packs)\n",
        _kills("test_killed_anywhere_every_listed_backup_restores"),
    ),
    Fault(
        "prune-removal-not-synced",
        "incbak/durable.py",
        '        crash_point("durable.unlinked")\n    sync_dir(directory)\n',
        '        crash_point("durable.unlinked")\n',
        _prune("test_what_goes_is_gone_before_what_tells_of_it"),
    ),
    Fault(
        "prune-copies-not-indexed",
        _REPACK,
        "            writer.finish()\n",
        "",
        _prune("test_mostly_garbage_is_repacked_and_readers_find_it"),
    ),
    Fault(
        "prune-rotten-content-given-up",
        _REPACK,
        "                except (DamagedError, OSError) as e:\n",
        "                except (DamagedError, OSError) as e:\n                    copied[name] = self.table(name)\n",
        _prune("test_a_pack_of_which_something_needed_is_rotten_stays"),
    ),
    Fault(
        "prune-other-copy-not-read",
        _REPACK,
        "                reader.stored(digest, besides=besides)\n",
        "                if all(p.pack in besides for p in self._repo.index.places(digest)):\n"
        '                    raise DamagedError("no other copy")\n',
        _prune("test_a_copy_that_is_rotten_is_made_again"),
    ),
    Fault(
        "prune-copies-before-there-is-room",
        _PRUNE,
        "            self._condemn(done, self._garbage)\n            self._expire(done)\n",
        "            self._condemn(done, self._garbage)\n",
        _kills("test_on_a_full_disk_it_makes_room"),
    ),
    Fault(
        "prune-removed-packs-stay-open",
        "incbak/repo/storage/local.py",
        "        self._let_go(kind, gone)\n",
        "",
        unit("repo/test_formats", "test_what_is_removed_is_not_held_open"),
    ),
)

FAULTS = (*_BACKUPS, *_DAMAGE, *_BESIDE_OTHERS, *_ORDER)

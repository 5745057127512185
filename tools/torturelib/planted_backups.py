"""Faults on the way to the repository: durable files, packs, index and records, the runner, the sink."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_DURABLE = "incbak/durable.py"
_RUNNER, _PLAN, _SINK = (f"incbak/backup/{name}.py" for name in ("runner", "plan", "sink"))
_WRITER, _READER, _INDEX, _REPOSITORY = (
    f"incbak/repo/{name}.py" for name in ("writer", "reader", "index", "repository")
)


def _runner(test: str) -> tuple[str, ...]:
    return unit("backup/test_runner", test)


_REPO = (
    Fault(
        "durable-small-file-not-synced",
        _DURABLE,
        '            crash_point("durable.written")\n            os.fsync(fd)\n'
        '            crash_point("durable.synced")\n            _name(temporary, path, replace=replace)\n',
        '            crash_point("durable.written")\n'
        '            crash_point("durable.synced")\n            _name(temporary, path, replace=replace)\n',
        unit("test_durable", "test_the_order_is_file_sync_name_directory_sync"),
    ),
    Fault(
        "durable-large-file-not-synced",
        _DURABLE,
        '            os.fsync(fd)\n            crash_point("durable.synced")\n            if own:\n',
        '            crash_point("durable.synced")\n            if own:\n',
        unit("repo/test_writer", "test_the_order_of_the_steps"),
    ),
    Fault(
        "durable-directory-not-synced",
        _DURABLE,
        "    sync_dir(path.parent)\n    return count\n",
        "    return count\n",
        unit("test_durable", "test_the_order_is_file_sync_name_directory_sync"),
    ),
    Fault(
        "durable-failed-sync-ignored",
        _DURABLE,
        "    except OSError as e:\n        _forget(temporary)\n        raise DurabilityError(",
        "    except OSError as e:\n        _forget(temporary)\n        return 0\n        raise DurabilityError(",
        unit("test_durable", "test_a_failed_step_leaves_nothing_and_says_so"),
    ),
    Fault(
        "durable-replaces-unasked",
        _DURABLE,
        "            os.link(temporary, path)\n            os.unlink(temporary)\n",
        "            os.rename(temporary, path)\n",
        unit("test_durable", "test_an_existing_file_is_not_replaced_unasked"),
    ),
    Fault(
        "repo-record-before-content",
        _WRITER,
        "        self.finish()\n        self._still_locked()\n"
        '        durable.crash_point("repo.locks-checked")\n        try:\n'
        '            self._storage.write("backups", made.id, data)\n',
        "        self._still_locked()\n"
        '        durable.crash_point("repo.locks-checked")\n        try:\n'
        '            self._storage.write("backups", made.id, data)\n            self.finish()\n',
        unit("repo/test_writer", "test_killed_anywhere_the_repository_is_whole", "test_the_order_of_the_steps"),
    ),
    Fault(
        "repo-index-before-packs",
        _WRITER,
        "            for sealing, _stream in self._sealing:\n                sealing.result()\n"
        "            self._sealing = []\n            self._write_index()\n",
        "            self._write_index()\n",
        unit("repo/test_writer", "test_the_order_of_the_steps", "test_killed_anywhere_the_repository_is_whole"),
    ),
    Fault(
        "repo-commit-without-lock",
        _WRITER,
        "        self._still_locked()\n",
        "",
        unit("repo/test_writer", "test_a_lock_that_went_stops_the_commit"),
    ),
    Fault(
        "repo-first-failure-forgotten",
        _WRITER,
        "            self._failure = e\n            raise\n",
        "            raise\n",
        unit("repo/test_writer", "test_the_first_failure_is_final"),
    ),
    Fault(
        "repo-damaged-content-reused",
        _WRITER,
        "found[i] = not self._damage.covers(digest) or digest in self._new",
        "found[i] = True",
        unit("repo/test_writer", "test_content_noted_as_damaged_is_stored_again_once"),
    ),
    Fault(
        "repo-base-trusted-blindly",
        _WRITER,
        "return whole and not self._index.damaged and not self._damage",
        "return True",
        unit("repo/test_writer", "test_content_noted_as_damaged_is_stored_again_once"),
    ),
    Fault(
        "repo-digest-not-checked",
        _READER,
        "            raise DamagedError(\n"
        '                f"blob {digest.hex()} in pack {place.pack} does not match its digest",\n'
        '                hint="Run: incbak check --read-data",\n            )\n',
        "            return data\n",
        unit("restore/test_file", "test_what_does_not_verify_is_not_restored"),
    ),
    Fault(
        "repo-blobs-of-any-size",
        _READER,
        "        if place.raw > self.limit:\n",
        "        if False:\n",
        unit("repo/test_formats", "test_a_blob_that_is_larger_than_any_cluster_or_page_is_not_even_decoded"),
    ),
    Fault(
        "repo-one-copy-is-tried",
        _READER,
        "            except DamagedError as e:\n                failure = e\n",
        "            except DamagedError:\n                raise\n",
        unit("repo/test_damage", "test_a_damaged_copy_beside_a_whole_one_harms_nothing"),
    ),
    Fault(
        "repo-cut-packs-believed",
        _INDEX,
        "[there.get(n) == s for n, s in zip(self.names, self._sizes, strict=True)]",
        "[n in there for n, s in zip(self.names, self._sizes, strict=True)]",
        unit("repo/test_formats", "test_blobs_in_packs_that_are_missing_or_cut_are_not_there"),
    ),
    Fault(
        "repo-index-not-verified",
        _INDEX,
        " and _checked(data, seal) != digest:\n",
        " and _checked(data, seal) is None:\n",
        unit("repo/test_formats", "test_a_damaged_index_file_is_named_and_left_out"),
    ),
    Fault(
        "repo-record-not-verified",
        "incbak/repo/record.py",
        '    body = verified_body(data, f"the record of backup {name}")\n',
        "    body = data.partition(b'\\n')[2]\n",
        unit("repo/test_formats", "test_one_flipped_bit_of_a_record_is_noticed"),
    ),
    Fault(
        "repo-record-under-any-name",
        "incbak/repo/record.py",
        "    if record.id != name or not is_id(name):\n",
        "    if not is_id(name):\n",
        unit("repo/test_damage", "test_records_that_were_swapped_are_no_backups"),
    ),
    Fault(
        "repo-merge-removes-first",
        "incbak/repo/merge.py",
        '    storage.write("index", new_id(), _merged(chosen, storage.seal))\n    for file in chosen:\n'
        '        storage.remove("index", file.name)\n',
        "    merged = _merged(chosen, storage.seal)\n    for file in chosen:\n"
        '        storage.remove("index", file.name)\n    storage.write("index", new_id(), merged)\n',
        unit("repo/test_formats", "test_a_merge_that_fails_loses_no_index"),
    ),
    Fault(
        "repo-rebuild-removes-first",
        "incbak/repo/check.py",
        '    _write(repo, packs, parts)\n    for name in old:\n        repo.storage.remove("index", name)\n',
        '    for name in old:\n        repo.storage.remove("index", name)\n    _write(repo, packs, parts)\n',
        unit("repo/test_damage", "test_an_index_that_cannot_be_made_anew_stays"),
    ),
    Fault(
        "repo-bitmaps-share-a-name",
        _REPOSITORY,
        "        while (fresh := new_id())[:8] in taken:\n            pass\n",
        "        fresh = new_id()\n",
        unit("repo/test_writer", "test_no_two_backups_have_bitmaps_of_one_name"),
    ),
    Fault(
        "repo-two-runs-of-one-vm",
        _REPOSITORY,
        "self.storage.lock(name, exclusive=True, wait=wait)",
        "self.storage.lock(name, exclusive=False, wait=wait)",
        unit("repo/test_writer", "test_one_run_per_vm_and_several_vms_at_once"),
    ),
    Fault(
        "repo-rebuild-beside-backup",
        _REPOSITORY,
        "            stack.enter_context(self.storage.lock(REPOSITORY_LOCK, exclusive=False, wait=wait))\n",
        "            self.storage.lock(REPOSITORY_LOCK, exclusive=False, wait=wait)\n",
        unit("repo/test_writer", "test_the_index_is_not_made_anew_beside_a_backup"),
    ),
)

_BACKUP = (
    Fault(
        "runner-base-given-up-before-commit",
        _RUNNER,
        "            await to_the_end(asyncio.to_thread(writer.commit, record))\n",
        "            await self._engine.commit(plans)\n"
        "            await to_the_end(asyncio.to_thread(writer.commit, record))\n",
        _runner("test_the_backup_is_listed_before_its_base_is_given_up"),
    ),
    Fault(
        "runner-bytes-not-counted",
        _RUNNER,
        "        elif sink.counts.received != copy.copied:\n",
        "        elif False:\n",
        _runner("test_a_copy_that_is_not_proven_whole_is_no_backup"),
    ),
    Fault(
        "runner-job-error-ignored",
        _RUNNER,
        "        if copy.error:\n",
        "        if False:\n",
        _runner("test_a_copy_that_is_not_proven_whole_is_no_backup"),
    ),
    Fault(
        "runner-new-bitmap-left-behind",
        _RUNNER,
        "            if not committed:\n                await to_the_end(self._roll_back(plans))\n",
        "            pass\n",
        _runner("test_an_interrupt_during_the_copy_takes_the_new_bitmap_with_it"),
    ),
    Fault(
        "runner-failed-disk-loses-its-base",
        _RUNNER,
        "await self._engine.commit([p.plan for p in self._planned if p.name in done])",
        "await self._engine.commit([p.plan for p in self._planned])",
        _runner("test_one_disk_that_fails_is_left_out_and_goes_on_later"),
    ),
    Fault(
        "runner-without-lock",
        _RUNNER,
        "locked(repo, vm, options.lock_wait) as still_locked:\n",
        'locked(repo, f"{vm} {id(engine)}", options.lock_wait) as still_locked:\n',
        _runner("test_a_second_run_of_the_vm_touches_nothing"),
    ),
    Fault(
        "runner-damaged-base-used-again",
        _RUNNER,
        "                distrusted |= bases\n",
        "                raise\n",
        _runner("test_a_base_that_turns_out_damaged_is_given_up_and_the_run_begins_again"),
    ),
    Fault(
        "runner-lost-packs-not-seen",
        "incbak/repo/repository.py",
        "        return noted | {r.id for r in records if not self.is_whole(r, seen)}\n",
        "        return noted\n",
        _runner("test_a_base_whose_pages_are_whole_and_whose_clusters_are_lost_is_none"),
    ),
    Fault(
        "runner-only-the-newest-looked-at",
        "incbak/repo/repository.py",
        "        return noted | {r.id for r in records if not",
        "        return noted | {r.id for r in records[-1:] if not",
        _runner("test_an_older_backup_that_is_damaged_too_is_no_base_either"),
    ),
    Fault(
        "runner-others-bitmaps-are-leftovers",
        _RUNNER,
        "keep = {known.run(ident) for ident in (*(r.id for r in all_backups), *known.unreadable)}",
        "keep = {known.run(r.id) for r in known.records}",
        _runner("test_a_failed_run_under_another_name_costs_nothing"),
    ),
    Fault(
        "runner-interrupt-cuts-the-commit",
        "incbak/backup/uncancelled.py",
        "            await asyncio.shield(task)\n",
        "            await task\n",
        _runner("test_an_interrupt_during_the_commit_comes_too_late"),
    ),
    Fault(
        "plan-damaged-base",
        _PLAN,
        " and r.id not in known.damaged]",
        "]",
        unit("backup/test_plan", "test_a_damaged_base_is_passed_over_for_an_older_one"),
    ),
    Fault(
        "plan-resized-disk",
        _PLAN,
        "    if before.size != disk.size:\n        return Reason.RESIZED\n",
        "",
        unit("backup/test_plan", "test_no_backup_can_be_the_base"),
    ),
    Fault(
        "plan-bitmap-not-looked-at",
        _PLAN,
        "        return bitmap.trouble(known.cluster_size, sampling=known.sampling)\n",
        "        return None\n",
        unit("backup/test_plan", "test_a_bitmap_that_cannot_be_believed"),
    ),
    Fault(
        "sink-without-flush",
        _SINK,
        "        if not self.counts.flushes:\n",
        "        if False:\n",
        unit("backup/test_sink", "test_a_full_that_is_not_whole_is_no_backup"),
    ),
    Fault(
        "sink-full-with-gaps",
        _SINK,
        "        if self.full and (came := kernels.count(self._covered)) != self.clusters:\n",
        "        if (came := kernels.count(self._covered)) < 0:\n",
        unit("backup/test_sink", "test_a_full_that_is_not_whole_is_no_backup"),
    ),
    Fault(
        "sink-zeroes-not-laid-over",
        _SINK,
        "        if self.full and not again:\n",
        "        if not again:\n",
        unit("backup/test_sink", "test_an_incremental_lays_any_writes_over_its_base"),
    ),
    Fault(
        "sink-damaged-base-believed",
        _SINK,
        "base is not None and base.size == size and writer.trusts_bases",
        "base is not None and base.size == size",
        unit("backup/test_sink", "test_where_anything_is_damaged_clusters_as_in_the_base_are_looked_up"),
    ),
    Fault(
        "sink-two-writes-race",
        _SINK,
        "            if kernels.any_in_range(self._covered, first, last):\n",
        "            if False:\n",
        unit("backup/test_sink", "test_an_earlier_write_that_is_slow_does_not_win"),
    ),
    Fault(
        "content-not-decoded-again",
        "incbak/repo/writer.py",
        "        if self.seal.digest(self.seal.decode(digest, codec, stored, len(data))) != digest:\n",
        "        if False:\n",
        unit("backup/test_sink", "test_a_cluster_that_does_not_decompress_to_itself_stops_the_run"),
    ),
    Fault(
        "page-not-decoded-again",
        "incbak/repo/writer.py",
        "            self.add_content(digest, data)\n",
        "            self.add(digest, *self.seal.encode(digest, data, self.level), len(data))\n",
        unit("repo/test_writer", "test_a_page_that_does_not_decode_to_itself_stops_the_backup"),
    ),
)

_DEADLINE = "incbak/engine/deadline.py"
_QEMU = (
    Fault(
        "qemu-error-hidden-by-cont",
        "incbak/engine/qemu_jobs.py",
        "            elif self._error or await self._paused_by_error():\n",
        "            elif await self._paused_by_error():\n",
        unit("engine/test_qemu_jobs", "test_a_job_that_met_an_error_is_ended"),
    ),
    Fault(
        "deadline-counts-a-stop",
        _DEADLINE,
        "if again and loop.time() - due > _LATE:",
        "if False:",
        unit("engine/test_deadline", "test_after_a_stop_the_peer_has_the_time_anew"),
    ),
    Fault(
        "deadline-without-end",
        _DEADLINE,
        "timer = loop.call_later(seconds, up, False)",
        "timer = loop.call_later(seconds, up, True)",
        unit("engine/test_deadline", "test_a_silent_peer_is_given_up_however_often_the_loop_is_stopped"),
    ),
)

_ALL = (
    Fault(
        "all-signal-while-starting",
        "incbak/cli/configured.py",
        "        try:\n            for name in names:\n                work.append(pool.submit(one, name))\n",
        "        for name in names:\n            work.append(pool.submit(one, name))\n        try:\n",
        ("tests/story/test_fleet.py::test_a_signal_while_they_are_started_ends_all_of_them",),
    ),
)

FAULTS = (*_REPO, *_BACKUP, *_QEMU, *_ALL)

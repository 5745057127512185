"""Faults on the path of a guest's request: the tracker, copy-before-write, jobs, NBD, image locks."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_TRACKER, _CBW, _GATE, _EXPORT = (f"incbak/serve/{name}.py" for name in ("tracker", "cbw", "gate", "export"))
_TRANSACTION, _JOB, _OPENING = (f"incbak/serve/{name}.py" for name in ("transaction", "backup_job", "opening"))
_CONNECTION, _PROTOCOL = "incbak/nbd/connection.py", "incbak/nbd/protocol.py"
_LOCKS, _DISK = "incbak/disk/locks.py", "incbak/disk/file.py"

_FILE_TARGET = "incbak/serve/file_target.py"
_SERVE = (
    Fault(
        "job-always-without-the-disks-flush",
        _JOB,
        "            refused = self.target.settle() + self._sending\n            self._flush_disk()\n",
        "            refused = self.target.settle() + self._sending\n",
        unit("serve/test_jobs", "test_always_gives_up_nothing_where_the_disk_cannot_be_flushed"),
    ),
    Fault(
        "job-calls-it-flushed-too-early",
        _JOB,
        "            self._flush_disk()\n            self._all_flushed = True\n",
        "            self._all_flushed = True\n            self._flush_disk()\n",
        unit("serve/test_jobs", "test_always_gives_up_nothing_where_the_disk_cannot_be_flushed"),
    ),
    Fault(
        "job-always-believes-a-second-flush",
        "incbak/serve/targets.py",
        "        if any(not length for _offset, length in refused):\n",
        "        if False:\n",
        unit("serve/test_jobs", "test_always_gives_up_nothing_after_a_flush_that_failed"),
    ),
    Fault(
        "drive-backup-empties-too-early",
        _FILE_TARGET,
        "        self.size = size if self._anew else self._disk.size\n",
        "        self.size = size if self._anew else self._disk.size\n        self.begin()\n",
        unit("serve/test_drive_backup", "test_in_a_transaction_that_does_not_happen"),
    ),
    Fault(
        "drive-backup-without-lock",
        _FILE_TARGET,
        "open_disk(path)\n",
        "open_disk(path, lock=False)\n",
        unit("serve/test_drive_backup", "test_a_file_whose_users_cannot_be_seen_is_no_target"),
    ),
    Fault(
        "drive-backup-name-not-durable",
        _FILE_TARGET,
        "            durable.sync_dir(self.path.absolute().parent)\n",
        "",
        unit("serve/test_drive_backup", "test_a_new_file_has_a_durable_name_before_the_job_is_done"),
    ),
    Fault(
        "drive-backup-not-flushed",
        _FILE_TARGET,
        "        self._try(self._disk.flush)\n",
        "",
        unit("serve/test_drive_backup", "test_a_new_file_has_a_durable_name_before_the_job_is_done"),
    ),
    Fault(
        "job-ends-while-paused",
        "incbak/serve/jobs.py",
        "            self._wait_paused()\n",
        "",
        unit("serve/test_drive_backup", "test_a_job_is_not_done_while_it_is_paused"),
    ),
    Fault(
        "job-always-forgets-what-was-refused",
        _JOB,
        "        for offset, length in refused:\n            kernels.set_range(left, offset // self.granularity, "
        "(offset + length - 1) // self.granularity)\n",
        "",
        unit("serve/test_jobs", "test_always_keeps_what_the_target_refused"),
    ),
    Fault(
        "job-always-forgets-what-was-not-sent",
        _JOB,
        "self.target.settle() + self._sending",
        "self.target.settle()",
        unit("serve/test_jobs", "test_always_keeps_what_the_target_refused"),
    ),
    Fault(
        "tracker-write-before-bit",
        _EXPORT,
        "                    self.tracked.before_write(offset, len(buf))\n"
        "                    self._disk.write(buf, offset)\n                finally:",
        "                    self._disk.write(buf, offset)\n"
        "                    self.tracked.before_write(offset, len(buf))\n                finally:",
        unit("serve/test_tracker", "test_bits_are_set_and_regions_durable_before_the_disk_is_changed"),
    ),
    Fault(
        "tracker-worker-write-before-bit",
        _EXPORT,
        "                with self.tracked.gate.joined():\n"
        "                    self.tracked.before_write(offset, len(buf))\n"
        "                    self._disk.write(buf, offset)\n",
        "                with self.tracked.gate.joined():\n"
        "                    self._disk.write(buf, offset)\n"
        "                    self.tracked.before_write(offset, len(buf))\n",
        unit("serve/test_tracker", "test_a_worker_that_finds_the_slot_taken_records_first_too"),
    ),
    Fault(
        "tracker-trim-and-zeroes-not-recorded",
        _EXPORT,
        "                self.tracked.before_write(offset, part, spent)\n",
        "",
        unit("serve/test_tracker", "test_bits_are_set_and_regions_durable_before_the_disk_is_changed"),
    ),
    Fault(
        "tracker-unrecorded-write-goes-out",
        _TRACKER,
        '                raise OSError(errno.EIO, f"cannot record a write in bitmap {bitmap.name}") from e\n',
        "                return\n",
        unit("serve/test_tracker", "test_a_write_is_refused_when_not_even_that_can_be_made_durable"),
    ),
    Fault(
        "tracker-settled-before-saved",
        _TRACKER,
        "        for copy in self._copies:\n            copy.before_write(offset, length, spent)\n"
        "        self.settled.settle(offset, length)\n",
        "        self.settled.settle(offset, length)\n"
        "        for copy in self._copies:\n            copy.before_write(offset, length, spent)\n",
        unit("serve/test_tracker", "test_a_write_whose_old_content_cannot_be_saved_is_not_settled"),
    ),
    Fault(
        "tracker-settled-map-kept",
        _TRACKER,
        "        self.settled = SettledMap(self.size, finest, self._served)\n        self._noted",
        "        self._noted",
        unit("serve/test_tracker", "test_a_new_bitmap_records_what_was_settled_before_it_came"),
    ),
    Fault(
        "export-tells-invalid-bitmaps",
        _EXPORT,
        "            if bitmap is None or bitmap.state is State.INVALID:\n",
        "            if bitmap is None:\n",
        unit("serve/test_tracker", "test_a_bitmap_that_is_invalid_is_not_on_offer"),
    ),
    Fault(
        "export-offers-invalid-bitmaps",
        _EXPORT,
        "valid = [b.name for b in list(self.tracked.bitmaps.values()) if b.state is not State.INVALID]",
        "valid = [b.name for b in list(self.tracked.bitmaps.values())]",
        unit("serve/test_tracker", "test_a_bitmap_that_is_invalid_is_not_on_offer"),
    ),
    Fault(
        "gate-open-for-workers",
        _GATE,
        "            if not self._changed.wait_for(lambda: not self._inside, max(deadline - time.monotonic(), 0)):\n"
        "                raise self._late()\n",
        "            pass\n",
        unit("serve/test_tracker", "test_the_gate_waits_for_a_change_in_flight_and_holds_new_ones_back"),
    ),
    Fault(
        "transaction-without-drain",
        _TRANSACTION,
        "with drain_all([d.gate for d in disks], DRAIN_TIMEOUT):",
        "with drain_all([], DRAIN_TIMEOUT):",
        unit("serve/test_transaction", "test_a_write_in_flight_that_does_not_end_fails_the_transaction"),
    ),
    Fault(
        "transaction-drains-one-disk",
        _TRANSACTION,
        "with drain_all([d.gate for d in disks], DRAIN_TIMEOUT):",
        "with drain_all([d.gate for d in disks][:1], DRAIN_TIMEOUT):",
        unit("serve/test_transaction", "test_a_write_in_flight_that_does_not_end_fails_the_transaction"),
    ),
    Fault(
        "transaction-keeps-the-settled-map",
        _TRANSACTION,
        "                old += [d.refresh() for d in disks]\n",
        "                pass\n",
        unit("serve/test_jobs", "test_a_full_copies_everything_at_one_instant_while_the_guest_writes"),
    ),
    Fault(
        "transaction-not-undone",
        _TRANSACTION,
        "                for action in reversed(begun):\n                    action.undo()\n                raise\n",
        "                raise\n",
        unit("serve/test_transaction", "test_two_backups_of_which_the_second_cannot_begin"),
    ),
    Fault(
        "cbw-old-content-not-saved",
        _TRACKER,
        "        for copy in self._copies:\n            copy.before_write(offset, length, spent)\n",
        "",
        unit("serve/test_jobs", "test_a_full_copies_everything_at_one_instant_while_the_guest_writes"),
    ),
    Fault(
        "cbw-cleared-though-not-read",
        _CBW,
        "                if found is not None:\n                    kernels.clear_range",
        "                if True:\n                    kernels.clear_range",
        unit("serve/test_cbw", "test_a_write_that_was_refused_leaves_the_point_in_time_as_it_was"),
    ),
    Fault(
        "cbw-guest-passes-the-job",
        _CBW,
        "                if self._claim_on(cluster) is None:\n                    run = self._claim(cluster, last + 1",
        "                if True:\n                    run = self._claim(cluster, last + 1",
        unit("serve/test_cbw", "test_a_write_waits_for_the_job_to_read_its_run_and_no_more"),
    ),
    Fault(
        "cbw-job-passes-the-guest",
        _CBW,
        "            if self._claim_on(cluster) is None:\n                saved",
        "            if True:\n                saved",
        unit("serve/test_cbw", "test_the_job_keeps_off_what_a_write_is_saving"),
    ),
    Fault(
        "cbw-claims-overlap",
        _CBW,
        ", *(c.first for c in self._claims if c.first > first)])",
        "])",
        unit("serve/test_cbw", "test_the_job_keeps_off_what_a_write_is_saving"),
    ),
    Fault(
        "cbw-broken-is-mended",
        _CBW,
        "                if self._broken:\n                    raise self._broken\n                if run :=",
        "                if run :=",
        unit("serve/test_cbw", "test_trouble_breaks_the_backup_and_not_the_guest"),
    ),
    Fault(
        "cbw-broken-while-read",
        _CBW,
        "            if self._broken:\n                raise self._broken\n            kernels.clear_range(self._todo",
        "            kernels.clear_range(self._todo",
        unit("serve/test_cbw", "test_a_stalled_read_of_the_job_holds_a_guest_write_no_longer_than_the_bound"),
    ),
    Fault(
        "cbw-guest-suffers",
        _CBW,
        "            if self._on_error is OnCbwError.BREAK_GUEST_WRITE:\n                raise\n",
        "            raise\n",
        unit("serve/test_cbw", "test_trouble_breaks_the_backup_and_not_the_guest"),
    ),
    Fault(
        "cbw-guest-waits-for-ever",
        _CBW,
        "                if not self._changed.wait(deadline - time.monotonic()):\n"
        "                    raise self._late()\n",
        "                if not self._changed.wait(60):\n                    raise self._late()\n",
        unit("serve/test_cbw", "test_a_stalled_read_of_the_job_holds_a_guest_write_no_longer_than_the_bound"),
    ),
    Fault(
        "job-lets-go-before-it-reads",
        _JOB,
        "                self._copy.read_into(run, data)\n        except OSError",
        "                self._copy.done(run)\n                self._copy.read_into(run, data)\n        except OSError",
        unit("serve/test_jobs", "test_the_guest_waits_until_the_job_has_read"),
    ),
    Fault(
        "job-takes-holes-for-old-content",
        _JOB,
        "holes = 0 if run.saved else self._holes(run)",
        "holes = self._holes(run)",
        unit("serve/test_jobs", "test_what_the_guest_discards_is_copied_as_it_was"),
    ),
    Fault(
        "job-ends-beside-writes",
        _JOB,
        "        with self.tracked.gate.drained(_END_DRAIN):\n",
        "        if True:\n",
        unit("serve/test_jobs", "test_a_job_that_ends_waits_for_a_write_in_flight"),
    ),
    Fault(
        "job-without-flush",
        _JOB,
        "            self._copy_all(self._copy)\n            self.target.flush()\n",
        "            self._copy_all(self._copy)\n",
        unit("serve/test_jobs", "test_a_job_is_done_only_when_the_target_has_flushed"),
    ),
    Fault(
        "serve-image-not-noted",
        _OPENING,
        "        store.note_image(path)\n",
        "",
        unit("serve/test_opening", "test_an_image_that_was_served_is_known_by_its_path"),
    ),
    Fault(
        "serve-bitmap-believed-after-all",
        _OPENING,
        "                store.give_up(lost, reason)\n",
        "                pass\n",
        unit("serve/test_opening", "test_a_bitmap_that_was_not_believed_once_never_is_again"),
    ),
    Fault(
        "serve-end-without-flush",
        _OPENING,
        "        if not tracked.read_only:\n            tracked.disk.flush_times()\n",
        "",
        unit("serve/test_daemon", "test_the_disk_is_flushed_before_the_flag_is_set"),
    ),
    Fault(
        "serve-end-with-writes-in-flight",
        _OPENING,
        "        tracked.gate.shut(timeout)\n",
        "",
        unit("serve/test_daemon", "test_the_disk_is_flushed_before_the_flag_is_set"),
    ),
)

_WIRE = (
    Fault(
        "nbd-bounds-of-requests",
        _PROTOCOL,
        "    if offset + length > size:\n",
        "    if offset > size:\n",
        unit("nbd/test_transmission", "test_refused_and_the_next_one_works"),
    ),
    Fault(
        "nbd-bounds-of-plain-writes",
        _CONNECTION,
        "                    and offset + length <= size\n",
        "",
        unit("nbd/test_transmission", "test_the_payload_of_a_refused_write_is_drained"),
    ),
    Fault(
        "nbd-payload-not-drained",
        _CONNECTION,
        "            if command == p.WRITE or (",
        "            if command == p.WRITE and writable and offset + length <= size or (",
        unit("nbd/test_transmission", "test_the_payload_of_a_refused_write_is_drained"),
    ),
    Fault(
        "nbd-payload-without-limit",
        _CONNECTION,
        "                if length > p.MAX_PAYLOAD:\n",
        "                if False:\n",
        unit("nbd/test_transmission", "test_an_oversized_write_ends_the_connection_and_allocates_nothing"),
    ),
    Fault(
        "nbd-read-without-limit",
        _PROTOCOL,
        "    if command == READ and length > MAX_PAYLOAD:\n        return errno.EOVERFLOW\n",
        "",
        unit("nbd/test_transmission", "test_an_oversized_read_is_refused_and_allocates_nothing"),
    ),
    Fault(
        "nbd-writes-to-read-only",
        _PROTOCOL,
        "    if read_only and command in _CHANGES:\n        return errno.EPERM\n",
        "",
        unit("nbd/test_transmission", "test_read_only"),
    ),
    Fault(
        "nbd-fua-not-flushed",
        _CONNECTION,
        "            self.device.write(data, offset)\n            if flags & p.CMD_FUA:\n"
        "                self.device.flush()\n",
        "            self.device.write(data, offset)\n",
        unit("nbd/test_transmission", "test_fua_flushes_before_the_reply"),
    ),
    Fault(
        "nbd-slow-write-shares-its-buffer",
        _CONNECTION,
        "data = memoryview(bytes(payload))",
        "data = payload",
        unit("nbd/test_transmission", "test_a_write_that_may_block_goes_to_a_worker"),
    ),
    Fault(
        "lock-does-not-look",
        _LOCKS,
        "    clash = any(_held_by_another(fd, UNSHARED_BASE + bit) for bit in wanted)\n",
        "    clash = False\n",
        ("tests/interop/test_locks.py::test_we_refuse_ourselves",),
    ),
    Fault(
        "lock-keeps-nobody-out",
        _LOCKS,
        "        for bit in refused:\n            _lock(fd, fcntl.F_RDLCK, UNSHARED_BASE + bit)\n",
        "",
        ("tests/interop/test_locks.py::test_qemu_io_is_refused_while_we_write",),
    ),
    Fault(
        "disk-failed-flush-forgotten",
        _DISK,
        "            self._flush_error = e\n            raise\n",
        "            raise\n",
        ("tests/contract/test_disk_contract.py",),
    ),
)

FAULTS = (*_SERVE, *_WIRE)

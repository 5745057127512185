"""Faults in what a monitor does to disks and jobs: groups, other sizes, added exports, policies on errors, targets."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_GROUP, _JOBS, _JOB = (f"incbak/serve/{name}.py" for name in ("group", "jobs", "backup_job"))
_RESIZE, _TRACKER, _MEMORY = (f"incbak/serve/{name}.py" for name in ("resize", "tracker", "memory_bitmap"))
_EXPORTS, _EXPORT, _CBW = (f"incbak/serve/{name}.py" for name in ("exports", "export", "cbw"))
_TARGETS, _IMAGE, _DISK = (f"incbak/serve/{name}.py" for name in ("targets", "image_target", "disk_target"))

_GROUPS = (
    Fault(
        "group-does-not-wait-for-all",
        _GROUP,
        "lambda: self._failed or self._gathered == len(self._members)",
        "lambda: True",
        unit("serve/test_groups", "test_none_counts_before_all_have_done_their_work"),
    ),
    Fault(
        "group-failure-is-one-jobs-own",
        _GROUP,
        "            self._failed = True\n",
        "            return\n",
        unit("serve/test_groups", "test_one_that_fails_takes_the_one_that_waits_with_it"),
    ),
    Fault(
        "group-others-go-on",
        _GROUP,
        "                other.abandon()\n",
        "                pass\n",
        unit("serve/test_groups", "test_one_that_fails_stops_the_one_that_copies"),
    ),
    Fault(
        "group-decides-twice",
        _GROUP,
        "            if self._decided or self._failed:\n                return\n",
        "            self._decided = False\n",
        unit("serve/test_groups", "test_what_is_decided_stays_so"),
    ),
    Fault(
        "group-one-begins-after-the-failure",
        _JOBS,
        "            if self._stop.is_set():\n                raise CancelledError\n            self.work()\n",
        "            self.work()\n",
        unit("serve/test_groups", "test_one_that_never_began_leaves_its_file_alone"),
    ),
)

_SIZES = (
    Fault(
        "resize-before-the-bitmap-is-invalid",
        _RESIZE,
        "            bitmap.invalidate(Reason.RESIZED)\n",
        "            pass\n",
        unit("serve/test_resize", "test_the_bitmap_is_durably_invalid_before_the_disk_has_another_size"),
    ),
    Fault(
        "resize-beside-a-write",
        _RESIZE,
        "    with tracked.gate.drained(_DRAIN_TIMEOUT):\n        old",
        "    if True:\n        old",
        unit("serve/test_resize", "test_a_write_in_flight_is_waited_for"),
    ),
    Fault(
        "resize-beside-a-job",
        _RESIZE,
        "    if tracked.copied or tracked.written_by is not None:\n",
        "    if tracked.written_by is not None:\n",
        unit("serve/test_resize", "test_not_while_a_job_runs"),
    ),
    Fault(
        "resize-not-durable",
        _RESIZE,
        "    tracked.disk.flush()\n",
        "",
        unit("serve/test_resize", "test_the_size_is_durable_before_the_answer"),
    ),
    Fault(
        "resize-new-end-clean",
        _MEMORY,
        "            kernels.set_range(bits, self.size >> self._shift, clusters - 1)\n",
        "            pass\n",
        unit("serve/test_resize", "test_what_was_cut_off_and_comes_again_counts_as_written"),
    ),
    Fault(
        "resize-write-beyond-the-end",
        _TRACKER,
        '            raise OSError(errno.ENOSPC, f"disk {self.name} has {self.size} bytes now")\n',
        "            pass\n",
        unit("serve/test_resize", "test_who_came_before_the_cut_reaches_nothing_beyond_it"),
    ),
    Fault(
        "resize-end-settled",
        _TRACKER,
        "        self._within = size >> self.shift if served > size else units\n",
        "        self._within = units\n",
        unit("serve/test_resize", "test_who_came_before_the_cut_reaches_nothing_beyond_it"),
    ),
)

_EXPORTED = (
    Fault(
        "export-gone-before-its-last-write",
        _EXPORTS,
        "            self.closing = True\n            over = not self.clients\n",
        "            self.closing = True\n            over = True\n",
        unit("serve/test_exports", "test_it_is_gone_when_the_last_write_is"),
    ),
    Fault(
        "export-opened-while-removed",
        _EXPORTS,
        "            if self.closing:\n                raise OSError(",
        "            if False:\n                raise OSError(",
        unit("serve/test_exports", "test_who_was_about_to_come_in_does_not"),
    ),
    Fault(
        "export-read-only-is-not",
        _EXPORTS,
        "super().__init__(export.tracked, read_only=export.read_only)",
        "super().__init__(export.tracked)",
        unit("serve/test_exports", "test_a_read_only_export_of_a_disk_that_is_not"),
    ),
    Fault(
        "export-bitmap-not-in-use",
        _EXPORTS,
        '            export.tracked.busy[name] = f"export {spec.id}"\n',
        "            pass\n",
        unit("serve/test_exports", "test_a_bitmap_on_offer_keeps_the_size"),
    ),
)

_POLICIES = (
    Fault(
        "job-skips-what-it-could-not-read",
        _JOB,
        "            self._copy.put_back(run)\n",
        "            self._copy.done(run)\n",
        unit("serve/test_on_error", "test_a_source_that_fails_stops_the_job_until_it_is_resumed"),
    ),
    Fault(
        "job-skips-what-was-not-taken",
        _JOB,
        '                self.mend("write", self.spec.on_target_error, e)\n',
        '                self.mend("write", self.spec.on_target_error, e)\n                return\n',
        unit("serve/test_on_error", "test_a_target_that_fails_stops_the_job_until_it_is_resumed"),
    ),
    Fault(
        "job-sends-again-too-late",
        _JOB,
        "                    self.target.confirm()\n",
        "                    pass\n",
        unit("serve/test_on_error", "test_a_target_that_fails_stops_the_job_until_it_is_resumed"),
    ),
    Fault(
        "io-error-not-told",
        _EXPORT,
        '            self.tracked.on_error("read", e)\n',
        "            pass\n",
        unit("serve/test_tracker", "test_a_guests_request_that_fails_is_told"),
    ),
)

_POINTS = (
    Fault(
        "live-job-copies-more-than-a-cluster-at-once",
        "incbak/engine/qemu_filter.py",
        '"max-chunk": JOB_CLUSTER}',
        '"max-chunk": 1 << 20}',
        ("tests/interop/test_snapshot_access.py::test_old_content_is_copied_where_the_guest_has_zeroed_it",),
    ),
    Fault(
        "point-read-is-not-claimed",
        _CBW,
        "                    return self._claim(cluster, self.clusters, limit, saved=saved)\n"
        "                if not self._changed.wait(deadline - time.monotonic()):\n"
        '                    raise OSError(errno.ETIMEDOUT, f"a cluster was in use',
        "                    run = self._claim(cluster, self.clusters, limit, saved=saved)\n"
        "                    self._claims[-1] = Run(0, 0, False)\n"
        "                    return run\n"
        "                if not self._changed.wait(deadline - time.monotonic()):\n"
        '                    raise OSError(errno.ETIMEDOUT, f"a cluster was in use',
        unit("serve/test_point_in_time", "test_a_guest_waits_for_who_reads_what_it_overwrites"),
    ),
    Fault(
        "point-hands-out-what-is-lost",
        _CBW,
        "            self._claims.remove(run)\n            self._changed.notify_all()\n"
        "            if self._broken:\n                raise self._broken\n\n",
        "            self._claims.remove(run)\n            self._changed.notify_all()\n\n",
        unit("serve/test_point_in_time", "test_what_was_read_while_it_got_lost_is_not_handed_out"),
    ),
    Fault(
        "point-scratch-closed-under-a-reader",
        "incbak/serve/point_in_time.py",
        "            unread = not self._readers\n",
        "            unread = True\n",
        unit("serve/test_point_in_time", "test_what_was_read_while_it_got_lost_is_not_handed_out"),
    ),
)

_WRITTEN = (
    Fault(
        "target-disk-open-to-guests",
        _TRACKER,
        '                raise OSError(errno.EBUSY, f"job {self.written_by} writes to disk {self.name}")\n',
        "                pass\n",
        unit("serve/test_targets", "test_guests_are_kept_out_while_it_is_a_target"),
    ),
    Fault(
        "target-disk-with-a-guest",
        _TRACKER,
        "            if self.writers:\n                raise QmpError",
        "            if False:\n                raise QmpError",
        unit("serve/test_targets", "test_guests_are_kept_out_while_it_is_a_target"),
    ),
    Fault(
        "target-disk-not-recorded",
        _DISK,
        "lambda device: device.write(data, offset)",
        "lambda device: device._disk.write(data, offset)",
        unit("serve/test_targets", "test_to_another_disk_whose_bitmaps_record_it"),
    ),
    Fault(
        "target-disk-not-flushed",
        _DISK,
        "        self._try(lambda device: device.flush())\n",
        "",
        unit("serve/test_targets", "test_a_target_disk_that_fails"),
    ),
    Fault(
        "target-image-replaces-too-early",
        _IMAGE,
        "                self._fd = _create(self._temporary, size)\n",
        "                self._fd = _create(self._temporary, size)\n                self.begin()\n",
        unit("serve/test_targets", "test_in_a_transaction_that_does_not_happen"),
    ),
    Fault(
        "target-image-in-use-replaced",
        _IMAGE,
        "    open_disk(path).close()\n    refuse_users",
        "    refuse_users",
        unit("serve/test_targets", "test_an_image_whose_users_cannot_be_seen_is_left_alone"),
    ),
    Fault(
        "target-image-name-not-durable",
        _IMAGE,
        "            durable.sync_dir(self.path.parent)\n",
        "",
        unit("serve/test_targets", "test_the_new_name_is_durable_before_the_job_is_done"),
    ),
    Fault(
        "target-image-child-outlives-the-job",
        _IMAGE,
        "            status = child.wait(_END_SECONDS)\n",
        "            status = 0\n",
        unit("serve/test_targets", "test_the_child_has_ended_when_the_target_is_let_go"),
    ),
    Fault(
        "target-uri-connection-kept",
        _TARGETS,
        '        """Close it."""\n        self.close()',
        '        """Close it."""',
        unit("serve/test_targets", "test_to_an_nbd_uri"),
    ),
)

FAULTS = (*_GROUPS, *_SIZES, *_EXPORTED, *_POLICIES, *_POINTS, *_WRITTEN)

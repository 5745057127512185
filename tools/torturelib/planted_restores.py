"""Faults on the way back: what a restore verifies, syncs and leaves alone."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_TARGETS, _RESTORE = "incbak/restore/targets.py", "incbak/restore/restore.py"


def _file(test: str) -> tuple[str, ...]:
    return unit("restore/test_file", test)


def _device(test: str) -> tuple[str, ...]:
    return unit("restore/test_device", test)


FAULTS = (
    Fault(
        "restore-flush-that-failed-passed-over",
        _TARGETS,
        "        self._flushing.finish()\n",
        "",
        _file("test_a_sync_on_the_way_that_fails_fails_the_restore"),
    ),
    Fault(
        "restore-flush-after-one-that-failed",
        "incbak/restore/flushing.py",
        "                self._raise()\n                self._count = 0\n",
        "                self._count = 0\n",
        _file("test_the_first_sync_on_the_way_that_fails_is_final"),
    ),
    Fault(
        "restore-name-before-sync",
        _TARGETS,
        "            durable.commit(self.temporary, self.path, replace=self._force, fd=self._fd)\n",
        "            os.rename(self.temporary, self.path)\n            durable.sync_dir(self.path.parent)\n",
        _file("test_it_is_synced_before_it_has_its_name"),
    ),
    Fault(
        "restore-under-its-name-at-once",
        _TARGETS,
        "self.temporary = self.path.with_name(self.path.name + INCOMPLETE)",
        "self.temporary = self.path",
        _file("test_killed_at_any_step_the_name_stands_for_a_whole_disk"),
    ),
    Fault(
        "restore-over-a-file",
        _TARGETS,
        "        if not self._force:\n            raise RestoreError(",
        "        if False:\n            raise RestoreError(",
        _file("test_a_file_that_is_there_is_left_alone"),
    ),
    Fault(
        "restore-over-an-image-in-use",
        _TARGETS,
        "        open_disk(self.path).close()\n",
        "",
        _file("test_an_image_that_is_in_use_is_not_replaced"),
    ),
    Fault(
        "restore-over-a-leftover",
        "incbak/newfile.py",
        "            os.unlink(path)\n            fd = create(path, mode)\n",
        "            fd = os.dup(left)\n",
        _file("test_what_an_earlier_restore_left_does_not_shine_through"),
    ),
    Fault(
        "restore-two-into-one-file",
        "incbak/newfile.py",
        "        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)\n",
        "        pass\n",
        _file("test_two_restores_to_one_file"),
    ),
    Fault(
        "restore-damage-passed-over",
        _RESTORE,
        "        if job.done.damaged and not salvage:\n",
        "        if False:\n",
        _file("test_what_does_not_verify_is_not_restored"),
    ),
    Fault(
        "restore-any-length",
        _RESTORE,
        "        if len(content) != min(self._step, self._disk.size - offset):\n",
        "        if False:\n",
        _file("test_a_cluster_of_another_length_is_damage"),
    ),
    Fault(
        "restore-zeroes-not-written",
        _RESTORE,
        "            if not self._target.blank:\n                self._zero(at, self._disk.size)\n",
        "",
        _device("test_zeroes_at_the_end_are_written_too"),
    ),
    Fault(
        "restore-holes-not-written",
        _RESTORE,
        "        if not self._target.blank:\n            for start, count in _gaps(there):\n",
        "        if False:\n            for start, count in _gaps(there):\n",
        _device("test_an_export_is_what_the_disk_was"),
    ),
    Fault(
        "restore-onto-a-small-device",
        _TARGETS,
        "            if self.disk.size < size:\n",
        "            if False:\n",
        _device("test_a_device_that_is_too_small_is_not_touched"),
    ),
    Fault(
        "restore-onto-a-small-export",
        _TARGETS,
        "            if self._client.size < size:\n",
        "            if False:\n",
        _device("test_an_export_that_is_too_small_is_not_touched"),
    ),
    Fault(
        "restore-onto-a-mounted-device",
        _TARGETS,
        "os.O_RDWR | os.O_EXCL | os.O_CLOEXEC",
        "os.O_RDWR | os.O_CLOEXEC",
        _device("test_a_device_in_use_is_not_touched"),
    ),
    Fault(
        "restore-device-not-synced",
        _TARGETS,
        "            self.disk.flush()\n",
        "            pass\n",
        _device("test_a_device_is_synced_before_it_is_said_to_be_done"),
    ),
    Fault(
        "restore-export-not-flushed",
        _TARGETS,
        "            self._client.flush()\n",
        "            pass\n",
        _device("test_an_export_that_fails_fails_the_restore"),
    ),
    Fault(
        "restore-replies-not-awaited",
        _TARGETS,
        "        self._client.drain()\n        if self._client.can(p.SEND_FLUSH):\n",
        "        if self._client.can(p.SEND_FLUSH):\n",
        _device("test_a_server_that_cannot_flush_is_asked_for_every_reply"),
    ),
    Fault(
        "restore-cannot-be-interrupted",
        _RESTORE,
        "            self._target.interrupt()\n",
        "            pass\n",
        _device("test_a_restore_to_a_server_that_stalls_can_be_interrupted"),
    ),
    Fault(
        "restore-bitmaps-of-a-device-kept",
        "incbak/cli/restore.py",
        "        _disown(here, opened, where)\n",
        "",
        _device("test_a_device_that_is_overwritten_loses_its_bitmaps"),
    ),
    Fault(
        "restore-all-follows-links",
        "incbak/restore/vm.py",
        "            if part.is_symlink():\n",
        "            if False:\n",
        unit("restore/test_vm", "test_no_link_is_followed"),
    ),
    Fault(
        "restore-all-over-files",
        "incbak/restore/vm.py",
        "    if taken and not force:\n",
        "    if False:\n",
        unit("restore/test_vm", "test_what_is_there_is_left_alone_before_anything_is_written"),
    ),
    Fault(
        "restore-all-names-as-paths",
        "incbak/restore/vm.py",
        "directory / ATTACHMENTS / component(name)",
        "directory / ATTACHMENTS / name",
        unit("restore/test_vm", "test_names_of_strangers_stay_inside"),
    ),
    Fault(
        "restore-all-hides-a-failure",
        "incbak/cli/restore.py",
        "    if done.failed:\n        what = ",
        "    if False:\n        what = ",
        ("tests/story/test_restore_all.py::test_one_disk_that_fails_does_not_stop_the_others",),
    ),
)

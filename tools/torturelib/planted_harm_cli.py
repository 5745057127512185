"""Faults in what new files and devices in use are protected from, and in the edges of the command line."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_NEWFILE, _DURABLE, _IMAGES = "incbak/newfile.py", "incbak/durable.py", "incbak/restore/images.py"


def _file(test: str) -> tuple[str, ...]:
    return unit("restore/test_file", test)


_CREATING = (
    Fault(
        "newfile-of-another-user-taken",
        _NEWFILE,
        "    if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():\n",
        "    if not stat.S_ISREG(info.st_mode):\n",
        _file("test_a_planted_file_of_another_user_is_refused_and_stays"),
    ),
    Fault(
        "newfile-leftover-filled",
        _NEWFILE,
        "            os.unlink(path)\n            fd = create(path, mode)\n",
        "            fd = os.dup(left)\n            os.ftruncate(fd, 0)\n",
        _file("test_whoever_has_a_leftover_open_sees_nothing_of_the_disk"),
    ),
    Fault(
        "newfile-below-dev",
        _NEWFILE,
        "    if not _below(parent, _DEVICES) or _below(parent, _MEMORY):\n        return\n",
        "    return\n",
        _file("test_no_file_is_made_below_dev"),
    ),
    Fault(
        "newfile-directory-below-dev",
        _DURABLE,
        "    newfile.refuse_below_dev(path)\n    make_dir(path.parent, mode)\n",
        "    make_dir(path.parent, mode)\n",
        _file("test_nothing_else_is_made_below_dev_either"),
    ),
    Fault(
        "newfile-through-anothers-link",
        _NEWFILE,
        "        if info.st_uid not in (0, os.geteuid()):\n",
        "        if False:\n",
        _file("test_a_link_of_another_user_is_not_followed"),
    ),
    Fault(
        "restore-through-anothers-link-to-a-device",
        "incbak/restore/targets.py",
        "    newfile.refuse_foreign_links(path)\n    try:\n",
        "    try:\n",
        _file("test_nor_is_one_to_a_device"),
    ),
    Fault(
        "drive-backup-through-anothers-link",
        "incbak/serve/file_target.py",
        "        _refuse_foreign_links(path)\n",
        "",
        unit("serve/test_drive_backup", "test_a_link_that_another_user_planted_is_not_followed"),
    ),
    Fault(
        "restore-name-for-another-file",
        _DURABLE,
        "                _must_name(temporary, fd)\n                _name(temporary, path, replace=replace)\n",
        "                _name(temporary, path, replace=replace)\n",
        _file("test_a_file_that_is_put_in_its_place_is_not_given_its_name"),
    ),
    Fault(
        "restore-image-by-its-name",
        _IMAGES,
        '"--cache=writeback", f"--socket={sock}", path]\n',
        '"--cache=writeback", f"--socket={sock}", str(self._file.temporary)]\n',
        unit("restore/test_images", "test_a_qcow2_image_is_made_through_the_open_file"),
    ),
    Fault(
        "restore-in-place-behind-a-loop-device",
        _IMAGES,
        "            refuse_users(path)\n",
        "            pass\n",
        unit("restore/test_device", "test_a_file_behind_a_loop_device_is_not_restored_in_place"),
    ),
    Fault(
        "restore-onto-a-device-that-others-write",
        "incbak/restore/targets.py",
        "                refuse_users(path)\n",
        "                pass\n",
        unit("restore/test_device", "test_a_device_that_a_process_may_write_to_is_not_touched"),
    ),
    Fault(
        "drive-backup-fills-a-planted-file",
        "incbak/serve/file_target.py",
        "            if not existing and not self._made:\n",
        "            if False:\n",
        unit("serve/test_drive_backup", "test_a_file_that_another_user_planted_is_not_filled"),
    ),
    Fault(
        "target-image-name-for-another-file",
        "incbak/serve/image_target.py",
        "            if not newfile.names(self.path, self._fd):\n",
        "            if False:\n",
        unit("serve/test_targets", "test_an_image_that_is_put_in_its_place_gets_nothing"),
    ),
)

_START, _STREAMS, _SIGNALS = (f"incbak/cli/{name}.py" for name in ("start", "streams", "signals"))


def _streams(test: str) -> tuple[str, ...]:
    return unit("cli/test_streams", test)


_PROCESS = (
    Fault(
        "cli-interrupt-while-importing",
        _START,
        "\n\nuntil_begun()\n",
        "\n",
        unit("cli/test_start", "test_an_interrupt_while_modules_are_imported"),
    ),
    Fault(
        "cli-closed-descriptors-left-closed",
        _STREAMS,
        "            os.open(os.devnull, os.O_RDWR)\n",
        "            pass\n",
        _streams("test_nothing_that_is_printed_gets_into_a_file"),
    ),
    Fault(
        "cli-lost-output-fails-a-backup",
        "incbak/cli/main.py",
        "            streams.output_is_beside_the_point()\n",
        "            pass\n",
        _streams("test_an_output_that_is_full_fails_only_what_prints"),
    ),
    Fault(
        "cli-ignored-hangup-handled",
        _SIGNALS,
        "() if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)",
        "(signal.SIGHUP,)",
        _streams("test_an_ignored_hangup_stays_ignored"),
    ),
    Fault(
        "cli-stream-into-a-closed-output",
        "incbak/cli/restore.py",
        "    if sys.stdout.fileno() in streams.CLOSED:\n",
        "    if False:\n",
        _streams("test_a_closed_output_is_no_place_for_a_stream"),
    ),
    Fault(
        "restore-stream-any-length",
        "incbak/restore/stream.py",
        "    if isinstance(content, DamagedError):\n        raise",
        "    if isinstance(content, DamagedError):\n        return bytes(length)\n        raise",
        ("tests/story/test_restore_forms.py::test_a_stream_ends_where_the_backup_is_damaged",),
    ),
    Fault(
        "restore-format-against-the-name",
        "incbak/cli/restore.py",
        '    return form or said or "raw"\n',
        '    return form or "raw"\n',
        ("tests/story/test_restore_forms.py::test_the_format_follows_the_name_or_the_option",),
    ),
)

_SMALL = "cli/test_small_faults"

_TOLD = (
    Fault(
        "private-directory-where-no-socket-can-be",
        "incbak/private.py",
        "    return length + _BELOW <= _SOCKET_PATH and ",
        "    return ",
        unit("test_private", "test_where_no_socket_can_be_it_is_elsewhere"),
    ),
    Fault(
        "cli-source-not-utf8",
        "incbak/cli/encodable.py",
        "            text.encode()\n",
        "            text.encode(errors='replace')\n",
        unit("cli/test_surroundings", "test_what_would_get_into_a_record_is_refused_before_anything_is_done"),
    ),
    Fault(
        "cli-units-written-through-links",
        "incbak/cli/fleet.py",
        "            durable.write_new(to / name, [text.encode()], replace=True, mode=0o644)\n",
        "            (to / name).write_text(text)\n",
        unit("cli/test_surroundings", "test_units_do_not_follow_a_link"),
    ),
    Fault(
        "status-as-they-end",
        "incbak/cli/status.py",
        "key=lambda done: order[done.vm]",
        "key=lambda done: 0",
        unit(_SMALL, "test_status_of_all_is_in_the_order_of_the_configuration"),
    ),
    Fault(
        "doctor-does-not-see-a-watch",
        "incbak/bitmap/look.py",
        "        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)\n",
        "        pass\n",
        unit(_SMALL, "test_doctor_knows_a_watch_that_runs"),
    ),
    Fault(
        "scratch-file-system-not-named",
        "incbak/engine/qemu.py",
        "    if disk.scratch_dir_full():\n",
        "    if False:\n",
        unit(_SMALL, "test_a_scratch_file_system_that_is_full_is_named"),
    ),
    Fault(
        "no-disk-without-reasons",
        "incbak/backup/plan.py",
        "    reasons += [",
        "    _ = [",
        unit("backup/test_plan", "test_that_there_is_no_disk_gives_the_reasons"),
    ),
)

FAULTS = _CREATING + _PROCESS + _TOLD

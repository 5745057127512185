"""Faults that would let a backup of an image that is off damage the image, its guest or another's data."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_DAEMON, _OFFLINE, _IMAGE = (f"incbak/engine/{name}.py" for name in ("private_daemon", "offline", "image"))
_QCOW2, _USERS, _FORMATS, _CHAIN = (f"incbak/disk/{name}.py" for name in ("qcow2", "users", "formats", "chain"))


def _off(*tests: str) -> tuple[str, ...]:
    return tuple(f"tests/interop/test_offline_harm.py::{test}" for test in tests)


def _users(*tests: str) -> tuple[str, ...]:
    return unit("disk/test_users", *tests)


FAULTS = (
    Fault(
        "off-dirty-image-has-bitmaps",
        _OFFLINE,
        "(why := await asyncio.to_thread(self._image.unwritable))",
        '(why := "")',
        _off("test_an_image_whose_refcounts_are_stale_is_read_and_not_written"),
    ),
    Fault(
        "off-dirty-image-is-cleaned-up",
        _OFFLINE,
        "if not disk.can_persist or not strays:",
        "if not strays:",
        _off("test_a_dirty_image_with_bitmaps_is_not_cleaned_up_either"),
    ),
    Fault(
        "off-corrupt-image-is-read",
        _OFFLINE,
        "        await asyncio.to_thread(image.check)\n",
        "",
        _off("test_a_corrupt_image_is_refused_unread"),
    ),
    Fault(
        "off-header-not-looked-at-again",
        _DAEMON,
        "if why := self._image.unwritable():",
        'if why := "":',
        _off("test_an_image_that_became_dirty_during_the_copy_is_not_written"),
    ),
    Fault(
        "off-changed-image-is-written",
        _DAEMON,
        "if self._image.changed():",
        "if False:",
        _off("test_an_image_that_was_written_during_the_copy_is_not_written"),
    ),
    Fault(
        "qcow2-dirty-bit-ignored",
        _QCOW2,
        "if self.features & Feature.DIRTY:",
        "if False:",
        unit("disk/test_qcow2", "test_an_image_with_a_dirty_or_corrupt_bit_is_not_written"),
    ),
    Fault(
        "qcow2-name-outside-of-the-header",
        _QCOW2,
        "if not 0 < length <= MAX_NAME or at + length > len(cluster):",
        "if False:",
        unit("disk/test_qcow2", "test_a_header_outside_of_its_limits_is_refused"),
    ),
    Fault(
        "off-users-not-looked-for",
        _DAEMON,
        "            refuse_writers(path, (self._daemon,))\n",
        "            pass\n",
        _off("test_an_image_that_a_qemu_without_locks_writes_is_refused"),
    ),
    Fault(
        "off-raw-users-not-looked-for",
        _IMAGE,
        "refuse_writers(path).doubt(path)",
        '""',
        _off("test_an_image_that_a_qemu_without_locks_writes_is_refused"),
    ),
    Fault(
        "off-readers-ignored",
        _DAEMON,
        "        return find_users(self.path, (self._daemon,)).unwritable()\n",
        '        return ""\n',
        _off("test_an_image_that_is_read_elsewhere_is_copied_and_not_written"),
    ),
    Fault(
        "off-no-look-before-the-commit",
        "incbak/backup/runner.py",
        "            await self._engine.confirm()\n",
        "",
        _off("test_a_writer_that_comes_during_the_copy_fails_the_backup"),
    ),
    Fault(
        "users-unseen-processes-ignored",
        _USERS,
        "        if not self.complete:\n",
        "        if False:\n",
        _off("test_where_not_all_processes_are_seen_nothing_is_written"),
    ),
    Fault(
        "users-mappings-not-looked-at",
        _USERS,
        "        uses += _mappings(pid, stack.keys)\n",
        "        pass\n",
        _users("test_a_process_is_found_by_its_descriptors_and_mappings"),
    ),
    Fault(
        "users-loop-devices-not-looked-at",
        "incbak/disk/stacking.py",
        "        for loop in self.loops:\n            if loop.backing == key",
        "        for loop in ():\n            if loop.backing == key",
        _users("test_a_loop_device_is_a_user_of_its_file"),
    ),
    Fault(
        "users-mounts-not-looked-at",
        _USERS,
        "        found += _mounts(pid, stack)\n",
        "        pass\n",
        _users("test_what_is_mounted"),
    ),
    Fault(
        "users-kernel-not-asked",
        _USERS,
        "            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)\n",
        "",
        _users("test_the_kernel_tells_of_a_writer_that_no_table_shows"),
    ),
    Fault(
        "restore-in-place-over-a-running-vm",
        "incbak/restore/images.py",
        "            refuse_users(path)\n",
        "            pass\n",
        unit("restore/test_images", "test_in_place_refuses_an_image_that_is_open_without_locks"),
    ),
    Fault(
        "formats-history-does-not-count",
        _FORMATS,
        "    if before.format and (before.same or not (asked or named_format(path))):\n",
        "    if False:\n",
        unit("disk/test_formats", "test_a_raw_disk_stays_raw_whatever_its_guest_wrote"),
    ),
    Fault(
        "formats-device-is-guessed",
        _FORMATS,
        "    if path.is_block_device():\n",
        "    if False:\n",
        unit("disk/test_formats", "test_a_block_device_is_raw_unless_it_is_said"),
    ),
    Fault(
        "formats-another-than-before",
        _FORMATS,
        "    if content != before.format:\n",
        "    if False:\n",
        unit("disk/test_formats", "test_a_contradiction_names_both"),
    ),
    Fault(
        "formats-records-not-asked",
        "incbak/cli/backup.py",
        "            known = replace(source, recorded=await asyncio.to_thread(recorded_format, repo, source))\n",
        "            known = source\n",
        ("tests/interop/test_offline_formats.py::test_a_guest_that_writes_a_header_changes_nothing",),
    ),
    Fault(
        "formats-guessed-image-reads-its-neighbours",
        "incbak/engine/detect.py",
        "beside=not decision.guessed",
        "beside=True",
        ("tests/interop/test_offline_formats.py::test_a_first_backup_of_such_a_disk_reads_no_other_file",),
    ),
    Fault(
        "chain-any-file",
        _CHAIN,
        "    if not allowed.has(found, image):\n",
        "    if False:\n",
        unit("disk/test_chain", "test_a_file_elsewhere_is_read_only_if_it_is_allowed"),
    ),
    Fault(
        "chain-by-a-link",
        _CHAIN,
        "        real = Path(os.path.realpath(path))\n",
        "        real = Path(os.path.abspath(path))\n",
        unit("disk/test_chain", "test_a_file_elsewhere_is_read_only_if_it_is_allowed"),
    ),
    Fault(
        "chain-protocols",
        _CHAIN,
        "    if _PROTOCOL.match(name):\n",
        "    if False:\n",
        unit("disk/test_chain", "test_no_protocol_is_followed"),
    ),
    Fault(
        "chain-in-a-circle",
        _CHAIN,
        "    if (info.st_dev, info.st_ino) in seen:\n",
        "    if False:\n",
        unit("disk/test_chain", "test_loops_and_what_is_no_file"),
    ),
    Fault(
        "serve-another-format",
        "incbak/serve/opening.py",
        '    if same and before != "raw":\n',
        "    if False:\n",
        unit("serve/test_opening", "test_an_image_of_another_format_is_not_served"),
    ),
    Fault(
        "plan-ciphertext-and-content-in-one-chain",
        "incbak/backup/plan.py",
        "        _check_ciphertext(disk, newest)\n",
        "        pass\n",
        unit("backup/test_ciphertext", "test_ciphertext_and_content_never_share_a_chain"),
    ),
    Fault(
        "disks-decrypted-not-told",
        "incbak/engine/storage_daemon.py",
        'node["drv"] + (DECRYPTED if node.get("encrypted") else "")',
        'node["drv"]',
        unit("backup/test_ciphertext", "test_an_engine_that_has_the_key_says_so"),
    ),
)

"""Planted faults: who else uses an image, what lies below and beside it, sizes and targets of raw disks."""

from torturelib.planted import Fault, unit

_STACKING, _USERS = "incbak/disk/stacking.py", "incbak/disk/users.py"


def _users(test: str) -> tuple[str, ...]:
    return unit("disk/test_users", test)


def _stacking(test: str) -> tuple[str, ...]:
    return unit("disk/test_stacking", test)


FAULTS = [
    Fault(
        "stack-file-behind-a-loop-device",
        _STACKING,
        "            if loop.key == key:\n",
        "            if False:\n",
        _users("test_a_writer_of_the_file_behind_a_loop_device"),
    ),
    Fault(
        "stack-disk-of-a-partition",
        _STACKING,
        '        if (place / "partition").exists() and (disk',
        "        if False and (disk",
        _users("test_a_partition_and_its_disk_and_not_its_neighbour"),
    ),
    Fault(
        "stack-slaves",
        _STACKING,
        '        for slave in place.glob("slaves/*/dev"):\n',
        "        for slave in ():\n",
        _users("test_what_writes_below_a_device_mapper_device"),
    ),
    Fault(
        "stack-not-sideways",
        _STACKING,
        "    known = {k: part for k, part in below.items() if part}\n",
        "    known = {}\n",
        _users("test_two_loop_devices_of_one_file_where_they_overlap"),
    ),
    Fault(
        "stack-neighbours-are-the-image",
        _STACKING,
        "    return (start - shown[0], end - shown[0]) if start < end else None\n",
        "    return (start - shown[0], end - shown[0])\n",
        _users("test_a_partition_and_its_disk_and_not_its_neighbour"),
    ),
    Fault(
        "stack-neighbours-on-a-physical-volume",
        _STACKING,
        "                yield lower, None\n",
        "                yield lower, _WHOLE\n",
        _stacking("test_a_logical_volume_is_not_its_neighbours"),
    ),
    Fault(
        "stack-held-by-another-partition",
        _STACKING,
        "        if _covers(part, key):\n",
        "        if True:\n",
        _stacking("test_partitions_that_overlap"),
    ),
    Fault(
        "stack-cut-off-is-complete",
        _STACKING,
        "        self.complete = False\n        return found\n\n    def _above",
        "        return found\n\n    def _above",
        _stacking("test_a_walk_has_bounds"),
    ),
    Fault(
        "users-readers-below",
        _USERS,
        "    return writes or key in stack.image\n",
        "    return True\n",
        _users("test_a_writer_of_the_file_behind_a_loop_device"),
    ),
    Fault(
        "users-managers-of-arrays",
        _USERS,
        "    if not uses or (_name(pid) in _MANAGERS",
        "    if not uses or (False",
        _users("test_what_writes_below_a_device_mapper_device"),
    ),
    Fault(
        "serve-users-not-looked-for",
        "incbak/serve/opening.py",
        "        refuse_writers(path, hint=WRITES)\n",
        "        pass\n",
        unit("serve/test_opening", "test_an_image_that_another_process_writes_is_not_served"),
    ),
    Fault(
        "drive-backup-format-by-content",
        "incbak/serve/commands/backup.py",
        '    if form := named_format(path) or ("raw" if path.is_block_device() else ""):\n',
        "    from incbak.disk.file import probe_format\n\n    if form := probe_format(path):\n",
        unit("serve/test_drive_backup", "test_the_format_of_an_existing_file_is_not_its_content"),
    ),
    Fault(
        "drive-backup-stopped-by-its-guest",
        "incbak/serve/file_target.py",
        '(form := named_format(path)) not in ("", "raw") and form == recognise(path)',
        '(form := recognise(path)) not in ("", "raw")',
        unit("serve/test_drive_backup", "test_the_format_of_an_existing_file_is_not_its_content"),
    ),
    Fault(
        "drive-backup-over-a-file-in-use",
        "incbak/serve/file_target.py",
        "                refuse_users(path)\n",
        "                pass\n",
        unit("serve/test_drive_backup", "test_a_file_that_another_process_has_open_is_left_alone"),
    ),
    Fault(
        "drive-backup-qcow2-over-a-file-in-use",
        "incbak/serve/image_target.py",
        "    open_disk(path).close()\n    refuse_users(path)\n",
        "    open_disk(path).close()\n",
        unit("serve/test_drive_backup", "test_a_file_that_another_process_has_open_is_left_alone"),
    ),
    Fault(
        "users-of-a-device-that-read",
        _USERS,
        "if user.writes or not (device and user.process)]:",
        "if True]:",
        unit("restore/test_device", "test_a_device_that_a_process_may_write_to_is_not_touched"),
    ),
    Fault(
        "size-of-a-file-in-bytes",
        "incbak/disk/file.py",
        "        self.size = whole_sectors(self._end)\n",
        "        self.size = self._end\n",
        ("tests/contract/test_disk_contract.py::test_the_last_sector_of_a_file_is_whole",),
    ),
    Fault(
        "size-cut-image-reads-as-zeroes",
        "incbak/disk/file.py",
        "            if count == 0 and offset + done >= self._end and",
        "            if count == 0 and",
        ("tests/contract/test_disk_contract.py::test_the_last_sector_of_a_file_is_whole",),
    ),
    Fault(
        "size-of-a-watched-file-in-bytes",
        "incbak/fingerprint.py",
        "whole_sectors(size) if raw else size",
        "size",
        ("tests/contract/test_disk_contract.py::test_the_last_sector_of_a_file_is_whole",),
    ),
    Fault(
        "size-of-a-qcow2-file-in-sectors",
        "incbak/fingerprint.py",
        "whole_sectors(size) if raw else size",
        "whole_sectors(size)",
        ("tests/contract/test_disk_contract.py::test_the_last_sector_of_a_file_is_whole",),
    ),
    Fault(
        "size-resized-to-a-part-of-a-sector",
        "incbak/serve/resize.py",
        "    size = whole_sectors(size)\n",
        "",
        unit("serve/test_resize", "test_a_size_that_is_no_multiple_of_a_sector"),
    ),
    Fault(
        "users-behind-an-overlay",
        _USERS,
        "    if shown := _shown_by(path):\n",
        "    if shown := False:\n",
        _users("test_file_systems_that_show_others"),
    ),
    Fault(
        "index-large-mapped",
        "incbak/repo/mapping.py",
        "    return found if len(found) > IN_MEMORY else found[:]\n",
        '    return np.memmap(path, dtype=np.uint8, mode="r")\n',
        unit("repo/test_columns", "test_a_sector_that_fails_later_is_an_error_that_names_the_file"),
    ),
    Fault(
        "serve-two-disks-with-bytes-in-common",
        "incbak/serve/opening.py",
        "        _refuse_shared_bytes(vm, name, disk)\n",
        "",
        unit("serve/test_opening", "test_two_disks_that_have_bytes_in_common_are_refused"),
    ),
    Fault(
        "run-two-disks-with-bytes-in-common",
        "incbak/backup/sources.py",
        "        _check_bytes(self._leaves, self._peer)\n",
        "",
        (
            "tests/live/test_qemu_identity.py::test_two_disks_of_one_file",
            *unit("backup/test_sources", "test_two_disks_of_a_running_vm_that_have_bytes_in_common_are_refused"),
        ),
    ),
    Fault(
        "disks-in-common-looked-for-one-way",
        "incbak/disk/stacking.py",
        "for key in stack_of(image).keys}",
        "for key in stack_of(image).image}",
        unit("disk/test_stacking", "test_images_that_have_bytes_in_common"),
    ),
    Fault(
        "device-read-from-an-outdated-cache",
        "incbak/disk/file.py",
        "            forget_cached(fd)\n",
        "            pass\n",
        unit("serve/test_opening", "test_a_device_is_read_from_its_storage_and_not_from_an_outdated_cache"),
    ),
    Fault(
        "chain-read-from-an-outdated-cache",
        "incbak/disk/chain.py",
        "            forget_cached(fd)\n",
        "            pass\n",
        unit("disk/test_chain", "test_devices_of_a_chain_are_read_from_their_storage"),
    ),
    Fault(
        "drive-backup-over-a-served-device",
        "incbak/serve/commands/backup.py",
        "        self._refuse_served(Path(target))\n",
        "",
        unit("serve/test_drive_backup", "test_another_node_of_a_served_device_is_no_target"),
    ),
    Fault(
        "index-without-files-called-damaged",
        "incbak/repo/mapping.py",
        "        if e.errno in LACKING:\n",
        "        if False:\n",
        unit("repo/test_columns", "test_what_the_process_lacks_is_no_damage"),
    ),
    Fault(
        "guard-takes-small-numbers-only",
        "incbak/engine/guard.py",
        "    poll = select.poll()\n    for fd in awaited:\n",
        "    return select.select(awaited, [], [], seconds)[0]\n    for fd in awaited:\n",
        unit("engine/test_run_state", "test_the_guard_of_a_process_with_many_files_takes_their_numbers"),
    ),
    Fault(
        "bitmap-not-locked-in-memory",
        "incbak/bitmap/body.py",
        "        if _libc.mlock(",
        "        if False and _libc.mlock(",
        unit("bitmap/test_body", "test_a_mapping_is_locked_in_memory_so_that_no_page_has_to_be_read_again"),
    ),
    Fault(
        "bitmap-mapped-though-not-locked",
        "incbak/bitmap/body.py",
        "            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))\n        super",
        "            pass\n        super",
        unit("bitmap/test_body", "test_what_cannot_be_locked_in_memory_is_not_mapped"),
    ),
    Fault(
        "needs-spool-mapped",
        "incbak/repo/spool.py",
        "        return Column(self._stored, array.dtype, len(array), at)\n",
        '        return np.memmap(self._file, dtype=array.dtype, mode="r", offset=at, shape=array.shape)\n',
        unit("repo/test_needs", "test_a_sector_that_fails_later_is_an_error"),
    ),
    Fault(
        "needs-failing-sector-called-damage",
        "incbak/repo/needs_file.py",
        "        data.error = StorageError",
        "        pass",
        unit("repo/test_needs", "test_a_sector_that_fails_later_is_an_error"),
    ),
    Fault(
        "bitmap-looked-at-mapped",
        "incbak/bitmap/look.py",
        "        return np.frombuffer(read_exactly(fd, at, length), dtype=np.uint8)\n",
        '        return np.memmap(path, dtype=np.uint8, mode="r", offset=at, shape=(length,))\n',
        unit("bitmap/test_look", "test_a_sector_that_cannot_be_read_is_an_error"),
    ),
    Fault(
        "index-failing-sector-called-damage",
        "incbak/repo/index.py",
        "            data.error = StorageError",
        "            pass",
        unit("repo/test_columns", "test_a_sector_that_fails_later_is_an_error_that_names_the_file"),
    ),
    Fault(
        "index-equal-keys-over-two-blocks",
        "incbak/repo/columns.py",
        "        if end < len(block) or first + end >= self._count:\n",
        "        if True:\n",
        unit("repo/test_columns", "test_it_is_searched_as_an_array"),
    ),
    Fault(
        "index-kept-without-limit",
        "incbak/repo/columns.py",
        """        if _kept + size > IN_MEMORY:
            return
        whole = self[:]
        with _lock:
            if self._whole is None and _kept + size <= IN_MEMORY:
""",
        """        whole = self[:]
        with _lock:
            if self._whole is None:
""",
        unit("repo/test_columns", "test_no_more_is_kept_than_is_allowed"),
    ),
]

"""Faults of the bitmap store: the flag protocol, what is believed on open, the lock."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_FILE, _STORE, _FORMAT = "incbak/bitmap/file.py", "incbak/bitmap/store.py", "incbak/bitmap/format.py"
_JUDGE = "incbak/bitmap/judge.py"
_BODY, _CACHE = "incbak/bitmap/body.py", "incbak/bitmap/page_cache.py"


def _protocol(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_protocol", test)


def _body(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_body", test)


def _cache(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_page_cache", test)


def _on_open(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_found_on_open", test)


FAULTS = (
    Fault(
        "bitmap-flag-stays-set",
        _FILE,
        "                if self.state is State.CLEAN:\n                    self._clear_flag(self.slot.fingerprint)\n",
        "                self.state = State.DIRTY\n",
        _protocol("test_the_flag_is_cleared_and_synced_before_the_first_mark_returns"),
    ),
    Fault(
        "bitmap-flag-cleared-after-marks",
        _FILE,
        "        self._begin()\n        with self._storing():\n            self._stored.touch(first, last + 1)\n",
        "        with self._storing():\n            self._stored.touch(first, last + 1)\n        self._begin()\n"
        "        with self._storing():\n",
        _protocol("test_nothing_else_changes_before_the_flag_is_cleared"),
    ),
    Fault(
        "bitmap-header-not-synced",
        _FILE,
        '            durable.sync_file(self._fd, f"bitmap {self.path}")\n            self.slot = step\n',
        "            self.slot = step\n",
        _protocol("test_the_flag_is_cleared_and_synced_before_the_first_mark_returns"),
    ),
    Fault(
        "bitmap-header-written-in-part",
        _FILE,
        "if os.pwrite(self._fd, fmt.encode(step), where) != fmt.SECTOR:",
        "if os.pwrite(self._fd, fmt.encode(step), where) < 0:",
        _protocol("test_a_header_that_is_written_in_part_is_not_counted_on"),
    ),
    Fault(
        "bitmap-newer-slot-overwritten",
        _FILE,
        "where = (step.sequence % 2) * fmt.SECTOR",
        "where = ((step.sequence + 1) % 2) * fmt.SECTOR",
        _protocol("test_the_older_slot_is_overwritten_first"),
    ),
    Fault(
        "bitmap-region-not-synced",
        _FILE,
        '        durable.sync_file(self._fd, f"bitmap {self.path}")\n        self._done = mine\n',
        "        self._done = mine\n",
        _protocol("test_the_coarse_byte_is_synced_after_it_was_set"),
    ),
    Fault(
        "bitmap-region-not-set",
        _FILE,
        "            self._stored.touch(first, last + 1)\n            wanted",
        "            wanted",
        _on_open("test_host_lost"),
    ),
    Fault(
        "bitmap-sync-skipped-while-begun",
        _FILE,
        "            wanted = self._started + 1\n",
        "            wanted = self._started + 1\n"
        "            self.known[first : last + 1] = b'\\1' * (last + 1 - first)\n",
        _protocol("test_no_thread_skips_a_sync_that_another_has_only_begun"),
    ),
    Fault(
        "bitmap-sync-shared-too-early",
        _FILE,
        "            wanted = self._started + 1\n",
        "            wanted = self._started\n",
        _protocol("test_a_region_set_after_a_sync_began_waits_for_the_next"),
    ),
    Fault(
        "bitmap-old-regions-not-synced",
        _FILE,
        '        durable.sync_file(self._fd, f"bitmap {self.path}")\n        self._durable[:] =',
        "        self._durable[:] =",
        _protocol("test_opening_makes_the_coarse_map_durable_again"),
    ),
    Fault(
        "bitmap-bit-set-without-lock",
        _FILE,
        "                with self._storing():\n                    self._stored.set_bit(first >> 3, bit)\n",
        "                self._stored.set_bit(first >> 3, bit)\n",
        _protocol("test_a_bit_is_set_in_one_step"),
    ),
    Fault(
        "bitmap-stored-in-its-mapping",
        _BODY,
        "        super().__init__(fd, array, slot)\n",
        """        super().__init__(fd, np.memmap(path, dtype=np.uint8, mode="r+", shape=(size,)), slot)
        self.put = lambda at, data: self.array.__setitem__(slice(at, at + len(data)), data)
        self.set_bit = lambda at, mask: self._view.__setitem__(at, self._view[at] | mask)
""",
        _body("test_marks_on_an_ext4_that_refuses_them_never_kill_the_process"),
    ),
    Fault(
        "bitmap-in-snapshots-of-btrfs-only",
        "incbak/bitmap/create.py",
        "        keep_in_place(fd)\n",
        "",
        _body("test_marks_on_a_full_btrfs_never_kill_the_process"),
    ),
    Fault(
        "bitmap-seen-before-it-is-written",
        _BODY,
        "        left, position = memoryview(data.tobytes()), at\n",
        "        left, position = memoryview(data.tobytes()), at\n        self.array[at : at + len(data)] = data\n",
        _body("test_no_bit_is_seen_before_it_is_in_the_file"),
    ),
    Fault(
        "bitmap-short-write-taken",
        _BODY,
        "            left, position = left[written:], position + written\n",
        "            left, position = left[len(left) :], position + written\n",
        _body("test_a_short_write_is_continued"),
    ),
    Fault(
        "bitmap-refused-store-forgotten",
        _FILE,
        '                raise OSError(e.errno, f"cannot store: {e.strerror}") from e\n',
        "                pass\n",
        _body("test_a_store_that_fails_makes_the_bitmap_durably_invalid"),
    ),
    Fault(
        "bitmap-mapped-unread",
        _BODY,
        "            read_exactly(fd, at, min(_CHUNK, size - at))\n",
        "            pass\n",
        _body("test_a_bitmap_that_cannot_be_read_is_not_believed"),
    ),
    Fault(
        "bitmap-kept-where-rename-fails",
        _FILE,
        "            os.unlink(self.path)\n",
        "            pass\n",
        _body("test_where_a_full_disk_refuses_even_the_rename_the_file_is_removed"),
    ),
    Fault(
        "bitmap-failed-sync-forgotten",
        _FILE,
        "                self._failed = True\n                self._invalidate(Reason.TRACKING_FAILED)\n",
        "",
        _protocol("test_a_sync_that_fails_makes_the_bitmap_invalid_on_disk"),
    ),
    Fault(
        "bitmap-invalid-only-in-memory",
        _FILE,
        "        except (OSError, DurabilityError):\n            self._bury(reason)\n",
        "        except (OSError, DurabilityError):\n            pass\n",
        _protocol("test_where_the_header_cannot_be_written_the_file_is_renamed"),
    ),
    Fault(
        "bitmap-valid-while-cleared",
        _FILE,
        ".with_flags(self._flags() | Flag.INVALID)\n            self._write_slots(hurt, ",
        ".with_flags(self._flags())\n            self._write_slots(hurt, ",
        _protocol("test_clearing_is_invalid_until_it_is_whole"),
    ),
    Fault(
        "bitmap-flag-before-bits",
        _FILE,
        '        durable.sync_file(self._fd, f"bitmap {self.path}")\n'
        '        durable.crash_point("bitmap.close-bits")\n',
        '        durable.crash_point("bitmap.close-bits")\n',
        _protocol("test_the_flag_is_set_last"),
    ),
    Fault(
        "bitmap-not-preallocated",
        "incbak/bitmap/create.py",
        "os.posix_fallocate(fd, 0, end)",
        "os.ftruncate(fd, end)",
        _protocol("test_a_new_file_is_preallocated_and_private"),
    ),
    Fault(
        "bitmap-header-not-verified",
        _FORMAT,
        "    if blake3(sector[:-_CHECKSUM]).digest(length=_CHECKSUM) != sector[-_CHECKSUM:]:\n"
        "        return Reason.HEADER\n",
        "",
        unit("bitmap/test_format", "test_every_flipped_bit_is_noticed"),
    ),
    Fault(
        "bitmap-digest-not-checked",
        _JUDGE,
        "return None if digest_of(body) == slot.digest else Reason.DIGEST",
        "return None",
        _on_open("test_rot_in_the_body_is_noticed"),
    ),
    Fault(
        "bitmap-fingerprint-not-checked",
        _JUDGE,
        "        return changed(slot.fingerprint, disk) or Found.CLEAN\n",
        "        return Found.CLEAN\n",
        _on_open("test_the_disk_changed_while_nobody_tracked_it"),
    ),
    Fault(
        "bitmap-size-not-checked",
        _JUDGE,
        "    if slot.size != disk.size:\n        return Reason.RESIZED\n",
        "",
        unit("bitmap/test_device_writes", "test_a_device_that_grew_after_a_kill"),
    ),
    Fault(
        "bitmap-of-another-disk",
        _JUDGE,
        "if slot.name != name or slot.disk_uuid != disk_uuid:",
        "if slot.name != name:",
        _on_open("test_of_another_disk"),
    ),
    Fault(
        "bitmap-one-slot-is-enough",
        _JUDGE,
        "        if not header.both:\n            return Reason.HEADER\n",
        "",
        _on_open("test_clean_with_one_torn_slot_is_not_believed"),
    ),
    Fault(
        "bitmap-boot-not-compared",
        _JUDGE,
        "if slot.cache_id == header.cache_id:",
        "if True:",
        _on_open("test_host_lost"),
    ),
    Fault(
        "bitmap-mount-not-compared",
        _JUDGE,
        "if slot.cache_id == header.cache_id:",
        "if same_boot:",
        _cache("test_what_a_killed_owner_stored_before_the_file_system_was_mounted_anew_is_not_believed"),
    ),
    Fault(
        "bitmap-mount-not-asked",
        _CACHE,
        'boot + b"/" + _superblock(fd)',
        "boot",
        _cache("test_what_a_killed_owner_stored_before_the_file_system_was_mounted_anew_is_not_believed"),
    ),
    Fault(
        "bitmap-mount-known-by-its-name",
        _CACHE,
        "place.stat().st_ino)",
        "0)",
        _cache("test_a_directory_of_sysfs_that_was_made_anew"),
    ),
    Fault(
        "bitmap-mount-of-btrfs-not-found",
        _CACHE,
        "slice(16, 32)",
        "slice(0, 16)",
        _cache("test_each_mount_of_a_file_system_has_an_id_of_its_own"),
    ),
    Fault(
        "bitmap-mount-not-written-by-a-new-owner",
        _FILE,
        "replace(self.slot, cache_id=cache, owner_pid",
        "replace(self.slot, owner_pid",
        _cache("test_what_was_not_written_in_this_boot_is_coarse_after_a_mount"),
    ),
    Fault(
        "bitmap-mount-is-no-change-of-the-disk",
        _JUDGE,
        "(Reason.UNPROVEN if reason and same_boot else reason)",
        "reason",
        _cache("test_what_a_killed_owner_stored_before_the_file_system_was_mounted_anew_is_not_believed"),
    ),
    Fault(
        "bitmap-regions-not-marked",
        _STORE,
        "        bitmap.mark_touched_regions()\n",
        "        pass\n",
        _on_open("test_host_lost"),
    ),
    Fault(
        "bitmap-coarse-map-not-checked",
        _JUDGE,
        "return None if bool(((coarse == TOUCHED) | (coarse == UNTOUCHED)).all()) else Reason.COARSE_MAP",
        "return None",
        _on_open("test_a_bad_coarse_map_is_not_believed"),
    ),
    Fault(
        "bitmap-late-writes-not-seen",
        "incbak/bitmap/continuity.py",
        "        if time_ns > latest:\n            return Reason.DISK_CHANGED\n",
        "",
        _on_open("test_the_image_was_written_after_a_kill"),
    ),
    Fault(
        "bitmap-two-owners",
        _STORE,
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        _on_open("test_one_owner_at_a_time"),
    ),
)

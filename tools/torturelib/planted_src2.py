"""Planted faults: what holds bytes of a disk, and is written by somebody else."""

from torturelib.planted import Fault, unit

_DEVICE, _DAEMON = "incbak/device.py", "incbak/engine/private_daemon.py"
_FACTS, _SOURCES = "incbak/backup/facts.py", "incbak/backup/sources.py"


def _device(test: str) -> tuple[str, ...]:
    return unit("test_device", test)


def _facts(test: str) -> tuple[str, ...]:
    return unit("backup/test_facts", test)


FAULTS = [
    Fault(
        "loop-file-not-compared",
        _DEVICE,
        '    if not (whole / "loop").is_dir():\n',
        "    if True:\n",
        _device("test_a_file_below_a_loop_device"),
    ),
    Fault(
        "loop-file-compared-by-size-only",
        _DEVICE,
        '    counts = ",".join(map(str, (found.st_size, *changes)))\n',
        "    counts = str(found.st_size)\n",
        _device("test_a_file_below_a_loop_device"),
    ),
    Fault(
        "loop-file-not-the-kernels",
        _DEVICE,
        "    if (found.st_dev, found.st_ino) != (device, inode):\n",
        "    if False:\n",
        _device("test_a_file_that_is_not_where_the_kernel_says_tells_nothing"),
    ),
    Fault(
        "loop-range-not-compared",
        _DEVICE,
        '    return _Told(f"{offset},{limit}@',
        '    return _Told(f"@',
        _device("test_a_loop_device_that_shows_another_range"),
    ),
    Fault(
        "loop-on-a-device-not-followed",
        _DEVICE,
        "    if stat.S_ISBLK(found.st_mode):\n        below = _device(name, depth + 1)\n",
        '    if stat.S_ISBLK(found.st_mode):\n        below = _Told("", "")\n',
        _device("test_a_device_below_a_loop_device"),
    ),
    Fault(
        "loop-file-not-settled",
        _DEVICE,
        "        settle(opened)\n",
        "",
        _device("test_a_time_that_may_come_again_is_waited_out"),
    ),
    Fault(
        "partition-written-through-its-disk",
        _DEVICE,
        'f"{counts}+{_text(_direct(whole))}"',
        'f"{counts}+"',
        _device("test_a_partition_and_what_is_beside_it"),
    ),
    Fault(
        "partition-disturbed-by-its-neighbour",
        _DEVICE,
        "tuple(count - sum(each) for count",
        "tuple(count - 0 * sum(each) for count",
        _device("test_a_partition_and_what_is_beside_it"),
    ),
    Fault(
        "partition-elsewhere",
        _DEVICE,
        "f\"{setup}+{_number(place / 'start')}\"",
        'f"{setup}+"',
        _device("test_a_partition_at_another_place"),
    ),
    Fault(
        "partition-counts-torn",
        _DEVICE,
        "        if (now := (parts, _counts(whole))) == before:\n",
        "        if now := (parts, _counts(whole)):\n",
        _device("test_counts_that_do_not_stand_still_are_read_again"),
    ),
    Fault(
        "device-not-counted-believed",
        _DEVICE,
        '    if _number(whole / "queue" / "iostats") != 1:\n',
        "    if False:\n",
        _device("test_a_device_whose_writes_are_not_counted_tells_nothing"),
    ),
    Fault(
        "device-not-told-is-no-backup",
        "incbak/fingerprint.py",
        "        return untold or unlike_any()\n",
        "        return unlike_any()\n",
        unit("backup/test_image", "test_a_device_that_tells_nothing_is_backed_up_all_the_same"),
    ),
    Fault(
        "device-not-told-is-unchanged",
        "incbak/fingerprint.py",
        "    return os.urandom(32)\n",
        "    return bytes(32)\n",
        unit("backup/test_image", "test_a_device_that_tells_nothing_is_backed_up_all_the_same"),
    ),
    Fault(
        "data-file-is-no-part",
        _FACTS,
        """        if edge in _NO_DATA:
""",
        """        if edge in _NO_DATA or edge not in ("file", "backing"):
""",
        _facts("test_everything_below_a_node_holds_bytes_of_it"),
    ),
    Fault(
        "data-file-of-a-backing-file-is-its-own",
        _FACTS,
        'elif edge not in ("file", "backing") and part is Part.IMAGE:',
        'elif edge not in ("file", "backing"):',
        _facts("test_everything_below_a_node_holds_bytes_of_it"),
    ),
    Fault(
        "filter-by-backing-is-below",
        _FACTS,
        'if edge == "backing" and driver not in _THROUGH_BACKING:',
        'if edge == "backing":',
        _facts("test_everything_below_a_node_holds_bytes_of_it"),
    ),
    Fault(
        "node-that-is-not-there-is-passed-over",
        _FACTS,
        "            found.append(Leaf(name, part, read_only=True))\n",
        "",
        _facts("test_everything_below_a_node_holds_bytes_of_it"),
    ),
    Fault(
        "data-file-stored-bitmap-believed",
        _SOURCES,
        "    if bitmap.persistent:\n        return None if are_same(",
        "    if bitmap.persistent:\n        return None if True or are_same(",
        _facts("test_when_a_bitmap_is_believed_beside_a_data_file"),
    ),
    Fault(
        "data-file-without-facts-believed",
        _SOURCES,
        "    if len(before) != len(data) or (bitmap.persistent and not is_known(data)):\n",
        "    if False:\n",
        _facts("test_when_a_bitmap_is_believed_beside_a_data_file"),
    ),
    Fault(
        "data-file-another-in-the-engine",
        _SOURCES,
        "    return None if are_one(before, data) else Reason.DISK_CHANGED\n",
        "    return None\n",
        _facts("test_when_a_bitmap_is_believed_beside_a_data_file"),
    ),
    Fault(
        "data-file-bitmap-stored-by-a-running-engine",
        "incbak/engine/qemu_disks.py",
        'return holds_bitmaps(node) and not node["image"].get("format-specific", {}).get("data", {}).get("data-file")',
        "return holds_bitmaps(node)",
        _facts("test_a_running_engine_stores_no_bitmap_beside_a_data_file"),
    ),
    Fault(
        "ctime-below-not-compared",
        _SOURCES,
        "facts if self._ctime else without_ctime(facts)",
        "without_ctime(facts)",
        _facts("test_a_ctime_that_moved"),
    ),
    Fault(
        "data-file-not-looked-at-before-a-bitmap-is-stored",
        _DAEMON,
        "for path in (layer.path, layer.data) if path]",
        "for path in (layer.path,) if path]",
        ("tests/interop/test_offline_harm.py::test_what_belongs_to_an_image_and_was_written_during_the_copy",),
    ),
    Fault(
        "device-below-by-its-node",
        _FACTS,
        "    if stat.S_ISBLK(found.st_mode):\n        told",
        "    if False:\n        told",
        _facts("test_a_device_below_tells_its_writes"),
    ),
    Fault(
        "unknown-below-is-unchanged",
        _SOURCES,
        "    if not is_known(below, now.trusted):\n        return Reason.UNPROVEN\n",
        "",
        unit("backup/test_sources", "test_what_is_not_known_is_never_unchanged"),
    ),
    Fault(
        "name-that-the-engine-does-not-have-open",
        _FACTS,
        'if found is None or (key_of(found) not in self.open if self.open else not name.startswith("/")):',
        "if found is None:",
        _facts("test_what_an_engine_has_open_is_known"),
    ),
    Fault(
        "another-process-taken-for-the-engine",
        _FACTS,
        "            self.open = frozenset()\n\n",
        "            pass\n\n",
        _facts("test_what_is_known_without_the_engine"),
    ),
    Fault(
        "below-a-running-engine-not-looked-at-again",
        _SOURCES,
        "return is_still and without_ctime([before]) != without_ctime([after])",
        "return False",
        _facts("test_what_is_written_during_a_run"),
    ),
    Fault(
        "times-below-not-waited-out",
        _SOURCES,
        "self._seen = settled(self._look)",
        "self._seen = self._look()",
        _facts("test_a_time_that_may_come_again_is_waited_out"),
    ),
    Fault(
        "trusted-backing-file-not-passed-on",
        "incbak/cli/backup.py",
        "        trusted=trust_backing,\n",
        "",
        ("tests/live/test_qemu_sources.py::test_a_backing_file_of_which_nothing_is_known",),
    ),
    Fault(
        "unknown-backing-file-not-told",
        _SOURCES,
        "        return [text.format(name, what) for name, what in unknown]\n",
        "        return []\n",
        _facts("test_a_device_below_tells_its_writes"),
    ),
]

"""Planted faults: what holds bytes of a disk, and is written by somebody else."""

from torturelib.planted import Fault, unit

_DEVICE, _DAEMON = "incbak/device.py", "incbak/engine/private_daemon.py"


def _device(test: str) -> tuple[str, ...]:
    return unit("test_device", test)


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
        '    counts = ",".join(map(str, (found.st_size, *times)))\n',
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
]

"""Planted faults: what is believed though it shows nothing: stores without flushes, times of files on FUSE."""

from torturelib.planted import Fault, unit

_STORING, _DISKS = "incbak/engine/qemu_storing.py", "incbak/engine/qemu_disks.py"
_LIVE = "tests/live/test_qemu_unflushed.py::"
_NAMES = unit("disk/test_users", "test_names_that_other_users_give")
_BEFORE = (f"{_LIVE}test_a_bitmap_from_before_is_not_believed_and_does_not_stay",)


def _graph(test: str) -> tuple[str, ...]:
    return unit("engine/test_qemu_disks", test)


def _times(test: str) -> tuple[str, ...]:
    return unit("test_times", test)


FAULTS = [
    Fault(
        "unsafe: a bitmap is stored where nothing is flushed",
        _DISKS,
        "        can_persist=keeps and not unflushed,\n",
        "        can_persist=keeps,\n",
        (f"{_LIVE}test_its_bitmaps_are_in_memory",),
    ),
    Fault(
        "unsafe: nobody is told that the bitmap is not stored",
        "incbak/engine/qemu.py",
        """        return [f"{text}: {why}"] if (why := why_in_memory(plan.disk)) else []\n""",
        "        return []\n",
        (f"{_LIVE}test_its_bitmaps_are_in_memory",),
    ),
    Fault(
        "unsafe: what the monitor says of flushes is dropped",
        "incbak/engine/qmp_types.py",
        """        "cache": NotRequired[_Cache],\n""",
        "",
        (f"{_LIVE}test_its_bitmaps_are_in_memory",),
    ),
    Fault(
        "unsafe: only the image's own node is looked at",
        _STORING,
        "        to_do += [child for child in below if child not in seen]\n",
        "",
        _graph("test_what_an_image_writes_to_has_to_be_flushed"),
    ),
    Fault(
        "unsafe: a backing file that is not flushed counts",
        _STORING,
        """ if parent == name and edge != "backing"]\n""",
        " if parent == name]\n",
        _graph("test_what_an_image_writes_to_has_to_be_flushed"),
    ),
    Fault(
        "unsafe: a stored bitmap from before is believed",
        _STORING,
        "    if not is_unflushed(graph, node):\n",
        "    if node:\n",
        _BEFORE,
    ),
    Fault(
        "unsafe: a bitmap in memory is not believed",
        _STORING,
        "reason=b.reason or Reason.UNFLUSHED) if b.persistent else b for b in found)",
        "reason=b.reason or Reason.UNFLUSHED) for b in found)",
        _graph("test_what_an_image_writes_to_has_to_be_flushed"),
    ),
    Fault(
        "unsafe: a stored bitmap stays when the run fails",
        "incbak/engine/qemu.py",
        "                    await remove_unbelieved(disk.plan, self._remove_bitmap)\n",
        "",
        _BEFORE,
    ),
    Fault(
        "unsafe: the removal does not last",
        _STORING,
        "    if names:\n",
        "    if not names:\n",
        _graph("test_stored_bitmaps_that_are_not_believed_go_and_that_lasts"),
    ),
    Fault(
        "unsafe: a daemon stores bitmaps without flushes",
        "incbak/engine/storage_daemon.py",
        "    persist, bitmaps = keeps_bitmaps(node) and not unflushed, bitmaps_of(graph, node_name)\n",
        "    persist, bitmaps = keeps_bitmaps(node), bitmaps_of(graph, node_name)\n",
        (
            "tests/interop/test_storage_daemon.py::"
            "test_a_daemon_that_does_not_flush_stores_no_bitmaps_and_believes_none",
        ),
    ),
    Fault(
        "unsafe: an image with stored bitmaps is watched",
        "incbak/watch/disks.py",
        "    if why := why_in_memory(disk):\n        return why\n",
        "",
        unit("watch/test_disks", "test_an_image_that_could_store_its_bitmaps_is_not_watched"),
    ),
    Fault(
        "usb: a USB device that is passed through is not named",
        "incbak/engine/qemu_outside.py",
        """    "usb-host": "a USB device of the host is passed through, which may be a disk",\n""",
        "",
        unit("engine/test_qemu_graph", "test_disks_outside_of_the_block_layer_are_known_by_their_type"),
    ),
    Fault(
        "usb: a USB device of another host is not named",
        "incbak/engine/qemu_outside.py",
        """    "usb-redir": "a USB device of another host is passed through, which may be a disk",\n""",
        "",
        unit("engine/test_qemu_graph", "test_disks_outside_of_the_block_layer_are_known_by_their_type"),
    ),
    Fault(
        "fuse: every file system keeps times",
        "incbak/times.py",
        "        if _magic(path) != _FUSE:\n",
        "        if _magic(path):\n",
        _times("test_an_image_that_nbdfuse_shows_is_read_whole"),
    ),
    Fault(
        "fuse: what cannot be looked at keeps times",
        "incbak/times.py",
        "    return False\n",
        "    return True\n",
        _times("test_what_cannot_be_looked_at_keeps_none"),
    ),
    Fault(
        "fuse: what does not say which it is keeps times",
        "incbak/times.py",
        "        return kind in _KEEPING or ",
        """        return kind in _KEEPING | {"fuse", ""} or """,
        _times("test_of_fuse_only_what_stores_files_or_passes_them_on"),
    ),
    Fault(
        "fuse: the first mount of all is looked at",
        "incbak/mounts.py",
        """        if mount.split(" ", 1)[0] == ident:\n""",
        "        if ident:\n",
        _times("test_of_fuse_only_what_stores_files_or_passes_them_on"),
    ),
    Fault(
        "tables: a line of mounts ends with any separator",
        "incbak/mounts.py",
        """    return content.removesuffix("\\n").split("\\n") if content else []\n""",
        "    return content.splitlines()\n",
        _NAMES,
    ),
    Fault(
        "tables: a carriage return is translated",
        "incbak/mounts.py",
        """table.read_bytes().decode("utf-8", "surrogateescape")""",
        """table.read_text("utf-8", "surrogateescape")""",
        _NAMES,
    ),
    Fault(
        "tables: a line of mappings ends with any separator",
        "incbak/disk/users.py",
        """table.removesuffix(b"\\n").split(b"\\n")""",
        "table.splitlines()",
        _NAMES,
    ),
    Fault(
        "tables: a mount point has no white space",
        "incbak/disk/users.py",
        r"(\d+):(\d+) [^ ]+ ([^ ]+) ",
        r"(\d+):(\d+) [^ ]+ (\S+) ",
        _NAMES,
    ),
    Fault(
        "fuse: a file is always proven by its times",
        "incbak/fingerprint.py",
        "    return NO_WRITES if times.are_kept(",
        "    return NO_WRITES if not untold or times.are_kept(",
        _times("test_a_file_whose_times_show_nothing_is_unproven"),
    ),
    Fault(
        "fuse: a file that is open is another one each time",
        "incbak/fingerprint.py",
        """fd}")) else untold or unlike_any()\n""",
        """fd}")) else unlike_any()\n""",
        _times("test_a_file_whose_times_show_nothing_is_unproven"),
    ),
    Fault(
        "fuse: a beat does not say that times show nothing",
        "incbak/disk/file.py",
        "info.st_ctime_ns, self._of_file, durable_ns",
        "info.st_ctime_ns, durable_ns",
        _times("test_a_file_whose_times_show_nothing_is_unproven"),
    ),
    Fault(
        "fuse: a sample makes up for a file that shows nothing",
        "incbak/bitmap/continuity.py",
        " and now.writes != NO_WRITES and not now.inode\n",
        " and now.writes != NO_WRITES\n",
        _times("test_a_file_whose_times_show_nothing_is_unproven"),
    ),
    Fault(
        "fuse: a backing file is known by its times",
        "incbak/backup/facts.py",
        "    size = found.st_size if times.are_kept(path) else None\n",
        "    size = found.st_size\n",
        _times("test_a_file_below_a_disk"),
    ),
    Fault(
        "fuse: the file of a loop device is known by its times",
        "incbak/device.py",
        "    if not times.are_kept(name):\n",
        "    if not name:\n",
        _times("test_a_file_below_a_loop_device"),
    ),
    Fault(
        "fuse: a disk whose times show nothing is watched",
        "incbak/watch/disks.py",
        "    if not times.are_kept(disk.image):\n",
        "    if not disk.image:\n",
        _times("test_a_file_that_is_watched"),
    ),
]

"""Planted faults: what is believed though it shows nothing: stores without flushes."""

from torturelib.planted import Fault, unit

_STORING, _DISKS = "incbak/engine/qemu_storing.py", "incbak/engine/qemu_disks.py"
_LIVE = "tests/live/test_qemu_unflushed.py::"
_BEFORE = (f"{_LIVE}test_a_bitmap_from_before_is_not_believed_and_does_not_stay",)


def _graph(test: str) -> tuple[str, ...]:
    return unit("engine/test_qemu_disks", test)


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
]

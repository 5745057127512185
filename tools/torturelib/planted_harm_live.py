"""Planted faults: what keeps a running QEMU, its guest and other programs in it from harm."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_GRAPH = "incbak/engine/qemu_graph.py"

FAULTS = [
    Fault(
        "live: a device is moved to the node on which it stands",
        _GRAPH,
        "if (await read_graph(session, timeout=timeout)).root(backend) != node:",
        "if backend:",
        unit("engine/test_qemu_graph", "test_a_device_is_never_moved_to_where_it_stands"),
    ),
    Fault(
        "live: an overlay keeps our filter as its backing node",
        _GRAPH,
        'elif user.kind == "block-driver" and user.edge == "backing":',
        "elif not user:",
        unit("engine/test_qemu_graph", "test_an_overlay_of_the_filter_gets_what_is_below_it_as_its_backing_node"),
    ),
    Fault(
        "live: implicit filters are bypassed",
        "incbak/engine/qemu_disks.py",
        'root = graph.root(backend_name(device)) or str(inserted.get("node-name", ""))',
        'root = str(inserted.get("node-name", ""))',
        unit("engine/test_qemu_graph", "test_an_implicit_filter_stays_between_the_device_and_its_image"),
    ),
    Fault(
        "live: a shareable disk is backed up",
        "incbak/engine/qemu_shared.py",
        "    if share_rw:\n",
        "    if not root:\n",
        unit("engine/test_qemu_graph", "test_a_disk_that_may_be_shared_is_left_out_with_the_reason"),
    ),
    Fault(
        "live: a second writer of a node is not seen",
        "incbak/engine/qemu_shared.py",
        "if len(writers) <= 1:",
        "if writers:",
        unit("engine/test_qemu_graph", "test_a_second_writer_anywhere_below_the_device_is_found"),
    ),
    Fault(
        "live: a second writer below the image is not seen",
        "incbak/engine/qemu_shared.py",
        "            if child and child not in own:\n",
        "            if not own:\n",
        unit("engine/test_qemu_graph", "test_a_second_writer_anywhere_below_the_device_is_found"),
    ),
]

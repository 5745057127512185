"""Which disks a running QEMU has: pure functions of what its monitor says.

A disk is a guest device with a medium that is neither removable nor read-only. Its bitmaps are on the node that holds
the image, below whatever filters there are; our own filters, left by a dead run, are looked through too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from incbak.engine.base import DECRYPTED, PREFIX, BitmapInfo, EngineDisk, LeftOut
from incbak.engine.qemu_graph import Graph, Raw, backend_name, qom_path
from incbak.engine.qemu_shared import why_shared
from incbak.engine.qemu_storing import UNFLUSHED, bitmaps_of, is_unflushed

_PERIPHERAL = "/machine/peripheral/"
_QCOW2_V2 = "0.10"


def stable_name(device: Raw, node: str) -> str:
    """The drive's id, else the guest device's id, else the node's name; "" where none of them is stable."""
    if device.get("device"):
        return str(device["device"])
    path = qom_path(device)
    ident = path.removeprefix(_PERIPHERAL).partition("/")[0] if path.startswith(_PERIPHERAL) else ""
    return ident or (node if not node.startswith("#") else "")


def find_disks(
    devices: Sequence[Raw], graph: Graph, unguarded: Mapping[str, str] = MappingProxyType({})
) -> tuple[list[EngineDisk], list[LeftOut]]:
    """Return the disks of ``query-block``, and what is left out, with the reason.

    ``unguarded``: as `incbak.engine.qemu_graph.unguarded` returns it.
    """
    disks: list[EngineDisk] = []
    left_out: list[LeftOut] = []
    taken: dict[str, str] = {}
    for device in devices:
        inserted: Raw = device.get("inserted") or {}
        root = graph.root(backend_name(device)) or str(inserted.get("node-name", ""))
        top = graph.without_ours(root)
        node = graph.image(top)
        name = stable_name(device, top)
        why = _why_not(device, graph.nodes.get(node), name)
        if not why:
            why = why_shared(graph, root, node, unguarded.get(qom_path(device), ""))
        if not why and node in taken:
            why = f"it is the same image as {taken[node]}"
        if why:
            named = name or top or str(device.get("qdev", ""))
            left_out.append(LeftOut(named, why, _expected(device, graph.nodes.get(node), node in taken)))
            continue
        taken[node] = name
        disks.append(_disk(device, name, top, graph.nodes[node], graph))
    return disks, left_out


def bitmaps_by_node(devices: Sequence[Raw], graph: Graph) -> list[tuple[EngineDisk, BitmapInfo]]:
    """Return the bitmaps of every node but ours; a node that is no disk of a backup has its own name."""
    disks = {disk.node: disk for disk in find_disks(devices, graph)[0]}
    found = []
    for name, node in graph.nodes.items():
        if not name.startswith(f"{PREFIX}-"):
            disk = disks.get(name) or EngineDisk(name, int(node["image"]["virtual-size"]), name, format=node["drv"])
            found += [(disk, bitmap) for bitmap in bitmaps_of(graph, name)]
    return found


def _why_not(device: Raw, node: Raw | None, name: str) -> str:
    if not device.get("qdev"):
        return "no guest device uses it"
    if device.get("removable"):
        return "it is removable"
    if node is None:
        return "it has no medium"
    if node["ro"]:
        return "it is read-only"
    if not node["image"]["virtual-size"]:
        return "it is empty"
    return "" if name else "it has no stable name; give its -device or -drive an id"


def _expected(device: Raw, node: Raw | None, taken: bool) -> bool:
    """Whether nobody misses it in a backup: what the guest cannot write, or what is backed up beside it."""
    return taken or not device.get("qdev") or node is None or bool(node["ro"]) or not node["image"]["virtual-size"]


def _disk(device: Raw, name: str, top: str, node: Raw, graph: Graph) -> EngineDisk:
    keeps, unflushed = keeps_bitmaps(node), is_unflushed(graph, node["node-name"])
    return EngineDisk(
        name=name,
        size=int(node["image"]["virtual-size"]),
        node=node["node-name"],
        device=str(device.get("device") or device["qdev"]),
        format=node["drv"] + (DECRYPTED if node.get("encrypted") else ""),
        can_persist=keeps and not unflushed,
        bitmaps=bitmaps_of(graph, node["node-name"]),
        extra={
            "qom": qom_path(device),
            "backend": backend_name(device),
            "top": top,
            "image": node.get("file", ""),
            UNFLUSHED: keeps and unflushed,
        },
    )


def holds_bitmaps(node: Raw) -> bool:
    """Whether the image is qcow2 of version 3."""
    data = node["image"].get("format-specific", {}).get("data", {})
    return bool(node["drv"] == "qcow2" and data.get("compat", _QCOW2_V2) != _QCOW2_V2)


def keeps_bitmaps(node: Raw) -> bool:
    """Return whether bitmaps of the image say all while nobody has it open: not where its data is in another file."""
    return holds_bitmaps(node) and not node["image"].get("format-specific", {}).get("data", {}).get("data-file")


def layout(graph: Graph) -> list[dict[str, Any]]:
    """The block graph in short, for the backup record: what somebody needs who builds the VM again."""
    return [
        {
            "node": name,
            "driver": node["drv"],
            "file": node.get("file", ""),
            "size": node["image"]["virtual-size"],
            "read_only": node["ro"],
            "children": {edge: child for (parent, edge), child in graph.edges.items() if parent == name},
        }
        for name, node in sorted(graph.nodes.items())
        if not name.startswith(f"{PREFIX}-")
    ]

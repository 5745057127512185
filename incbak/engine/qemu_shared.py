"""Disks that others may write to are found before anything is touched, and left out.

The filter of a backup takes away its image's permission to be written past it. Where another program has that
permission already, QEMU refuses the move of the device in the midst of the point in time; and where it is granted, the
other's writes reach neither the point in time nor a bitmap. Members of the kind:

- a device with ``share-rw=on``: another VM may have the disk open, on this host or another;
- a device that passes its guest's SCSI commands through to the host's device (``scsi-block``, ``scsi-generic``,
  ``virtio-blk`` with ``scsi=on``): what the guest writes passes by QEMU's block layer, and while a filter is above the
  image, it fails;
- two devices of the VM on one node, or on two nodes above one image;
- a writable NBD export of the node, a commit or mirror job into it: another user in this QEMU that writes.

The first two are properties of the device. The others have one rule: below the device, no node has a writer besides the
device, by the permissions in QEMU's own graph.
"""

from __future__ import annotations

from incbak.engine.qemu_graph import Graph

_STORAGE = ("file", "data-file")


def why_shared(graph: Graph, root: str, image: str, unguarded: str = "") -> str:
    """Return why the disk of the device on ``root``, whose ``image`` is below filters, has other writers; or "".

    ``unguarded``: what is known of the device (`incbak.engine.qemu_graph.unguarded`).
    """
    if unguarded:
        return f"{unguarded}, and neither a point in time nor a bitmap would hold that"
    own = _below(graph, root, image)
    writers = [x for x in graph.links if x.child in own and x.parent not in own and x.writes]
    if len(writers) <= 1:
        return ""
    names = sorted({x.parent or x.kind for x in writers})
    return f"several users in QEMU write to it: {', '.join(names)}"


def _below(graph: Graph, root: str, image: str) -> set[str]:
    """The nodes that are this disk: the filters from ``root`` on, the image, and what stores it."""
    own, node = {root, image}, root
    while node != image and (child := graph.below(node)) and child not in own:
        own.add(node := child)
    own.discard(root) if root not in graph.nodes else None
    waiting = [image]
    while waiting:
        parent = waiting.pop()
        for child in (graph.edges.get((parent, edge)) for edge in _STORAGE):
            if child and child not in own:
                own.add(child)
                waiting.append(child)
    return own

"""Where QEMU may store a bitmap, and which stored one is not believed.

A bitmap that is stored in a qcow2 image is marked there as in use before the guest's first write, so that it is
inconsistent after a kill or a power cut. That takes flushes. With ``cache=unsafe`` (``cache.no-flush=on``) QEMU makes
none, and the kernel writes back in its own order: after a power cut of the host the guest's data may be on the disk
without the mark, and the bitmap looks as if it were whole. So on such a disk:

- new bitmaps are kept in QEMU's memory only;
- a stored one, made before the VM got ``cache=unsafe``, is not believed, and is taken out of the image before anything
  is copied, whatever becomes of the run: later, without ``cache=unsafe``, nothing would show what it went through.

What counts is the image's own node and what it writes to; a filter above passes flushes on, whatever it says itself.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import replace

from incbak.engine.base import BitmapInfo, DiskPlan, EngineDisk, superseded
from incbak.engine.qemu_graph import Graph
from incbak.engine.served import bitmap_info
from incbak.opening import open_image
from incbak.reasons import Reason

UNFLUSHED = "unflushed"
"""In `EngineDisk.extra`: the image could store bitmaps, and must not."""


def is_unflushed(graph: Graph, node: str) -> bool:
    """Return whether QEMU does not flush the node, or something that it writes to."""
    seen: set[str] = set()
    to_do = [node]
    while to_do:
        name = to_do.pop()
        if graph.nodes.get(name, {}).get("cache", {}).get("no-flush"):
            return True
        seen.add(name)
        below = [child for (parent, edge), child in graph.edges.items() if parent == name and edge != "backing"]
        to_do += [child for child in below if child not in seen]
    return False


def bitmaps_of(graph: Graph, node: str) -> tuple[BitmapInfo, ...]:
    """Return the named bitmaps of a node; one that must not be believed has the reason."""
    found = [bitmap_info(b) for b in graph.nodes[node].get("dirty-bitmaps", ()) if b.get("name")]
    if not is_unflushed(graph, node):
        return tuple(found)
    return tuple(replace(b, reason=b.reason or Reason.UNFLUSHED) if b.persistent else b for b in found)


async def remove_unbelieved(plan: DiskPlan, remove: Callable[[str, str], Awaitable[object]]) -> None:
    """Remove the stored bitmaps of the plan's repository that must not outlive the run, even if it fails.

    ``remove``: of a node, the bitmap of a name. QEMU does not bring that onto the storage, so it is done here.
    """
    names = [b.name for b in plan.disk.bitmaps if b.reason is Reason.UNFLUSHED and b.name in superseded(plan)]
    for name in names:
        await remove(plan.disk.node, name)
    if names:
        await asyncio.to_thread(sync_files, [str(plan.disk.extra.get("image", ""))])


def why_in_memory(disk: EngineDisk) -> str:
    """Return why the image does not store the bitmap though it could, or an empty string."""
    return "QEMU does not flush its image (cache=unsafe)" if disk.extra.get(UNFLUSHED) else ""


def sync_files(paths: Sequence[str]) -> None:
    """Bring what was written to the files onto their storage, where they can be opened."""
    for path in paths:
        with suppress(OSError):
            fd = open_image(path, os.O_RDONLY)  # QEMU names it
            try:
                os.fdatasync(fd)
            finally:
                os.close(fd)

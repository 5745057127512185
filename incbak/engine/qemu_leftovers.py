"""What dead runs have left in a running QEMU is found by its names and taken out, while the guest goes on."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from incbak.engine.base import run_of
from incbak.engine.jobs import cancel_jobs
from incbak.engine.qemu_filter import cut_target, remove_fds
from incbak.engine.qemu_graph import Graph, StillUsedError, read_graph, take_out
from incbak.engine.session import CommandFailed, Session

log = logging.getLogger(__name__)

_READERS = ("nbd", "snapshot-access")
_FILTER = "copy-before-write"
_FROM_THE_TOP = {_FILTER: 0, "qcow2": 1, "null-co": 3}


async def remove_leftovers(session: Session, prefix: str, keep: Collection[str]) -> list[str]:
    """See `Engine.cleanup`. In the order of `DiskFilter.remove`: targets are cut first, so that nothing waits for them,
    and nobody reads a point in time any more when the devices are moved back."""
    graph = await read_graph(session)
    for node, driver in _drivers(graph, prefix).items():
        if driver == "nbd":
            await cut_target(session, node)
    done = await cancel_jobs(session, prefix)
    graph = await read_graph(session)  # the filter of a job went with it
    drivers = _drivers(graph, prefix)
    done += await _remove_nodes(session, [n for n, driver in drivers.items() if driver in _READERS])
    for node in [n for n, driver in drivers.items() if driver == _FILTER]:
        try:
            if await take_out(session, node):
                done.append(f"filter {node}")
        except (CommandFailed, StillUsedError) as e:
            log.warning("filter %s of a dead run is still in use in QEMU: %s", node, e)
    rest = [n for n, driver in drivers.items() if driver not in _READERS]
    done += await _remove_nodes(session, sorted(rest, key=lambda n: _FROM_THE_TOP.get(drivers[n], 2)))
    await remove_fds(session, prefix)
    return done + await _remove_bitmaps(session, graph, prefix, keep)


def _drivers(graph: Graph, prefix: str) -> dict[str, str]:
    """Return the driver of each of our nodes."""
    return {name: str(node["drv"]) for name, node in graph.nodes.items() if name.startswith(prefix)}


async def _remove_nodes(session: Session, nodes: Sequence[str]) -> list[str]:
    done = []
    for node in nodes:
        if await session.try_execute("blockdev-del", {"node-name": node}):
            done.append(f"node {node}")
        else:
            log.warning("node %s of a dead run is still in use in QEMU", node)
    return done


async def _remove_bitmaps(session: Session, graph: Graph, prefix: str, keep: Collection[str]) -> list[str]:
    done = []
    for node, info in graph.nodes.items():
        for name in _names(info):
            if name.startswith(prefix) and run_of(name) not in keep and not node.startswith(prefix):
                if await session.try_execute("block-dirty-bitmap-remove", {"node": node, "name": name}):
                    done.append(f"bitmap {name} of {node}")
                else:
                    log.warning("bitmap %s of %s cannot be removed now", name, node)
    return done


def _names(node: Mapping[str, Any]) -> list[str]:
    return [str(bitmap.get("name", "")) for bitmap in node.get("dirty-bitmaps", ())]

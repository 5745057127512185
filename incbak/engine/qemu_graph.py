"""QEMU's block graph: nodes, who uses them, and moving a guest's device from one node to another.

Every decision is made from the graph as it is now, never from what was noted before: between two commands of a backup
another program may take an external snapshot, start a mirror or add a filter.

QEMU 7.2 aborts, guest and all, when a device is moved to the node on which it already stands (an assertion of
``bdrv_replace_child_noperm``). So a device is moved only after the graph says that it stands elsewhere, and a refused
move is not undone: the graph says what was done.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from incbak.engine.base import PREFIX
from incbak.engine.session import COMMAND_SECONDS, CommandFailed, Session
from incbak.errors import EngineError

Raw = Mapping[str, Any]

_FILTERS = {
    "copy-before-write",
    "copy-on-read",
    "throttle",
    "compress",
    "preallocate",
    "blkverify",
    "blklogwrites",
    "mirror_top",
    "commit_top",
}
_PASSED_THROUGH = frozenset({"scsi-block", "scsi-generic"})
_BACKEND = "block-backend"
_PERIPHERAL = "/machine/peripheral/"
_STREAM_SECONDS = 30.0
_MOST_MOVES = 16  # users of one filter that are moved away from it, one after the other


_LEFT_HINT = "End what uses it (a block job, a filter of another program); the next run removes the rest."


class StillUsedError(EngineError):
    """A filter of ours is used by what another program has put into QEMU's graph."""


@dataclass(frozen=True)
class Link:
    """One user of a node. ``kind``: ``block-backend`` (a device), ``block-driver`` (a node) or ``block-job``."""

    kind: str
    parent: str
    edge: str
    child: str
    writes: bool


@dataclass(frozen=True)
class Graph:
    """QEMU's nodes by name, and which are below which: (parent's name, edge) to the child's name."""

    nodes: Mapping[str, Raw]
    edges: Mapping[tuple[str, str], str] = field(default_factory=dict)
    links: tuple[Link, ...] = ()

    @classmethod
    def of(cls, nodes: Iterable[Raw], graph: Raw) -> Graph:
        """From ``query-named-block-nodes`` and ``x-debug-query-block-graph``. Raises `EngineError`."""
        found = {n["id"]: (n.get("type", ""), n["name"]) for n in graph["nodes"]}
        try:
            links = tuple(
                Link(*found[e["parent"]], e["name"], found[e["child"]][1], "write" in e.get("perm", ()))
                for e in graph["edges"]
            )
        except KeyError as e:
            raise EngineError(f"QEMU's block graph has an edge to {e}, and no such node") from None
        edges = {(link.parent, link.edge): link.child for link in links}
        return cls({n["node-name"]: n for n in nodes}, edges, links)

    def root(self, backend: str) -> str | None:
        """The node on which a device's backend stands, implicit filters included, which ``query-block`` leaves out."""
        return next((x.child for x in self.links if x.kind == _BACKEND and x.parent == backend), None)

    def above(self, node: str) -> list[Link]:
        """The users of a node."""
        return [link for link in self.links if link.child == node]

    def below(self, node: str) -> str | None:
        """What a filter filters."""
        return self.edges.get((node, "file")) or self.edges.get((node, "backing"))

    def without_ours(self, node: str) -> str:
        """The node below our own filters."""
        return self._down(node, lambda n: n.startswith(f"{PREFIX}-"))

    def image(self, node: str) -> str:
        """The node below all filters: where bitmaps are."""
        return self._down(node, lambda n: self.nodes.get(n, {}).get("drv") in _FILTERS)

    def _down(self, node: str, through: Callable[[str], bool]) -> str:
        """Return the first node from here downwards that is not to be looked ``through``. Raises `EngineError`."""
        for _ in range(len(self.edges) + 1):
            child = self.below(node) if through(node) else None
            if child is None:
                return node
            node = child
        raise EngineError(f"QEMU's block graph has a cycle at node {node}", hint="Do not trust this QEMU.")


def backend_name(device: Raw) -> str:
    """What the graph calls an entry of ``query-block``."""
    return str(device.get("device") or device.get("qdev") or "")


def qom_path(device: Raw) -> str:
    """Where the guest device's ``drive`` property is."""
    qdev = str(device.get("qdev", ""))
    return qdev if qdev.startswith("/") else _PERIPHERAL + qdev


async def read_graph(session: Session, *, timeout: float = COMMAND_SECONDS) -> Graph:
    """Return QEMU's nodes and edges as they are now."""
    nodes = await session.execute("query-named-block-nodes", {"flat": True}, timeout=timeout)
    return Graph.of(nodes, await session.execute("x-debug-query-block-graph", timeout=timeout))


async def move(session: Session, backend: str, qom: str, node: str, *, timeout: float = COMMAND_SECONDS) -> None:
    """Move a device to ``node``, unless it stands there. Raises `CommandFailed` when QEMU refuses."""
    if (await read_graph(session, timeout=timeout)).root(backend) != node:
        await session.execute("qom-set", {"path": qom, "property": "drive", "value": node}, timeout=timeout)


async def take_out(session: Session, node: str, *, timeout: float = COMMAND_SECONDS) -> bool:
    """Move every user of the filter ``node`` to what the filter filters now; return whether there was one.

    Raises `CommandFailed` when QEMU refuses, `StillUsedError` when another program has to end something first.

    A device is moved. An overlay (an external snapshot was taken of the filter itself) gets another backing node: a
    stream whose base is directly below the filter copies nothing, and also corrects the backing file's format in the
    overlay's header, which would name the filter.
    """
    for moves in range(_MOST_MOVES):
        graph = await read_graph(session, timeout=timeout)
        below = graph.below(node)
        user = next(iter(graph.above(node)), None)
        if user is None or below is None:
            return moves > 0
        if user.kind == _BACKEND:
            qom = await _qom_of(session, user.parent, timeout)
            await session.execute("qom-set", {"path": qom, "property": "drive", "value": below}, timeout=timeout)
        elif user.kind == "block-driver" and user.edge == "backing":
            await _rebase(session, user.parent, node, below)
        else:
            raise StillUsedError(f"{user.parent or 'a block job'} uses node {node}", hint=_LEFT_HINT)
    raise StillUsedError(f"node {node} is used again and again", hint=_LEFT_HINT)


async def _qom_of(session: Session, backend: str, timeout: float) -> str:
    devices = await session.execute("query-block", timeout=timeout)
    found = next((d for d in devices if backend_name(d) == backend and d.get("qdev")), None)
    if found is None:
        raise StillUsedError(f"{backend or 'an unnamed block backend'} uses a filter and is no device", hint=_LEFT_HINT)
    return qom_path(found)


async def _rebase(session: Session, overlay: str, node: str, below: str) -> None:
    job = f"{node}s"
    await session.execute("block-stream", {"job-id": job, "device": overlay, "base-node": below, "auto-dismiss": False})
    deadline = asyncio.get_running_loop().time() + _STREAM_SECONDS
    while True:
        found = next((j for j in await session.execute("query-jobs") if j["id"] == job), None)
        if found is None or found["status"] == "concluded":
            break
        if asyncio.get_running_loop().time() > deadline:
            await session.try_execute("job-cancel", {"id": job})
            raise StillUsedError(
                f"overlay {overlay} did not get another backing node within {_STREAM_SECONDS:g} s", hint=_LEFT_HINT
            )
        await asyncio.sleep(0.02)
    await session.try_execute("job-dismiss", {"id": job})
    if found and found.get("error"):
        raise StillUsedError(
            f"overlay {overlay} of another program keeps node {node}: {found['error']}", hint=_LEFT_HINT
        )


async def unguarded(session: Session, devices: Iterable[Raw]) -> dict[str, str]:
    """Return the QOM paths of the devices whose disks are written past QEMU's block layer, and how."""
    found = {}
    for path in [qom_path(d) for d in devices if d.get("qdev") and d.get("inserted")]:
        kind = await _property(session, path, "type")
        if kind in _PASSED_THROUGH:
            found[path] = f"its guest writes to the host's device past QEMU ({kind})"
        elif await _property(session, path, "scsi") is True:
            found[path] = "its guest may write to the host's device past QEMU (scsi=on)"
        elif await _property(session, path, "share-rw") is True:
            found[path] = "other programs may write to it (share-rw=on)"
    return found


async def _property(session: Session, path: str, name: str) -> Any:
    """``None`` where a device has no such property."""
    try:
        return await session.execute("qom-get", {"path": path, "property": name})
    except CommandFailed:
        return None

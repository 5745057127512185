"""A qemu-storage-daemon that another process runs, as an engine: no guest, so a plain job does."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

from incbak.engine.base import (
    DECRYPTED,
    BitmapInfo,
    Description,
    DiskPlan,
    Engine,
    EngineDisk,
    LeftOut,
    ProgressCallback,
    RunResult,
    Target,
    end_mark_of,
    run_of,
    superseded,
)
from incbak.engine.end_mark import add_end_mark
from incbak.engine.jobs import cancel_jobs, refuse_beside_backup, wait_for_jobs, without_padding
from incbak.engine.private_daemon import PROGRAM
from incbak.engine.qemu_disks import bitmaps_by_node, keeps_bitmaps, layout
from incbak.engine.qemu_graph import Graph
from incbak.engine.qemu_storing import UNFLUSHED, bitmaps_of, is_unflushed, remove_unbelieved, why_in_memory
from incbak.engine.session import CommandFailed, Session
from incbak.errors import EngineError

log = logging.getLogger(__name__)

_FLUSH_SECONDS = 600.0  # removing a target flushes it


class StorageDaemonEngine(Engine):
    """See `Engine`. Owns the session."""

    kind = "storage-daemon"

    def __init__(self, session: Session, speed: int = 0) -> None:
        self._session, self._speed = session, speed

    async def describe(self) -> Description:
        graph = await self._graph()
        exports = await self._session.execute("query-block-exports")
        written = {e["node-name"] for e in exports if e.get("writable", True)}
        under = {child for (parent, _), child in graph.edges.items() if parent in graph.nodes}
        disks, left_out = [], []
        for name, node in graph.nodes.items():
            if name in under or name.startswith("incbak-"):
                continue
            if why := _why_not(name, node, written):
                left_out.append(LeftOut(name, why, expected=bool(node["ro"]) or not node["image"]["virtual-size"]))
            else:
                disks.append(disk_of(name, name, graph))
        version = (await self._session.execute("query-version"))["qemu"]
        engine = f"{PROGRAM} {version['major']}.{version['minor']}.{version['micro']}"
        config = {"images": {d.name: d.extra["image"] for d in disks}, "blocks": layout(graph)}
        peer = self._session.peer_pid()
        return Description(None, tuple(disks), engine, config, tuple(left_out), peer=peer)

    async def _graph(self) -> Graph:
        nodes = await self._session.execute("query-named-block-nodes", {"flat": True})
        return Graph.of(nodes, await self._session.execute("x-debug-query-block-graph"))

    async def bitmaps(self) -> list[tuple[EngineDisk, BitmapInfo]]:
        return bitmaps_by_node((), await self._graph())

    async def remove_bitmaps(self, bitmaps: Sequence[tuple[EngineDisk, str]]) -> None:
        await refuse_beside_backup(self._session)
        for disk, name in bitmaps:
            await self._remove(disk.node, name)

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        done = await cancel_jobs(self._session, prefix)
        for name, node in (await self._graph()).nodes.items():
            if name.startswith(prefix):
                if await self._session.try_execute("blockdev-del", {"node-name": name}):
                    done.append(f"node {name}")
                continue
            for bitmap in (b.get("name", "") for b in node.get("dirty-bitmaps", ())):
                if bitmap.startswith(prefix) and run_of(bitmap) not in keep and await self._remove(name, bitmap):
                    done.append(f"bitmap {bitmap} of {name}")
        return done

    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        jobs = {f"{plan.run}-{n}": plan for n, plan in enumerate(plans)}
        try:
            for ident, plan in jobs.items():
                path, export = targets[plan.disk.name].address()
                server = {"type": "unix", "path": str(path)}
                nbd = {"driver": "nbd", "node-name": f"{ident}t", "server": server, "export": export}
                await self._session.execute("blockdev-add", nbd)
            for plan in plans:
                await remove_unbelieved(plan, self._remove)
            await self._begin(jobs)
            disks = {ident: plan.disk.name for ident, plan in jobs.items()}
            results = await wait_for_jobs(self._session, disks, progress, speed=self._speed)
            for ident, plan in jobs.items():
                name = plan.disk.name
                results[name] = await without_padding(self._session, f"{ident}t", plan.disk.size, results[name])
                await self._session.execute("blockdev-del", {"node-name": f"{ident}t"}, timeout=_FLUSH_SECONDS)
        except BaseException:
            await self._abandon(jobs)
            raise
        why = {plan.disk.name: why_in_memory(plan.disk) for plan in plans}
        notes = (f"disk {name}: its bitmap is lost when the daemon ends: {text}" for name, text in why.items() if text)
        return RunResult(results, notes=tuple(notes))

    async def _begin(self, jobs: Mapping[str, DiskPlan]) -> None:
        """Bitmaps and jobs at one instant."""
        actions: list[dict[str, Any]] = []
        for ident, plan in jobs.items():
            add = {"node": plan.disk.node, "name": plan.new_bitmap, "granularity": plan.granularity}
            add["persistent"] = plan.disk.can_persist
            actions.append({"type": "block-dirty-bitmap-add", "data": add})
            actions.append({"type": "blockdev-backup", "data": backup_of(ident, plan, self._speed)})
        for number, plan in enumerate(jobs.values()):
            await add_end_mark(self._session, plan, number, persistent=plan.disk.can_persist)
        await self._session.execute("transaction", {"actions": actions})

    async def _abandon(self, jobs: Mapping[str, DiskPlan]) -> None:
        with suppress(EngineError):
            for ident in jobs:
                await self._session.try_execute(
                    "yank", {"instances": [{"type": "block-node", "node-name": f"{ident}t"}]}
                )
                await cancel_jobs(self._session, ident)
                await self._session.try_execute("blockdev-del", {"node-name": f"{ident}t"})
            await self.rollback(list(jobs.values()))

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            for name in superseded(plan):
                await self._remove(plan.disk.node, name)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            for name in (plan.new_bitmap, end_mark_of(plan.new_bitmap)):
                await self._remove(plan.disk.node, name)

    async def _remove(self, node: str, name: str) -> bool:
        try:
            await self._session.execute("block-dirty-bitmap-remove", {"node": node, "name": name})
        except CommandFailed as e:
            if "not found" not in str(e) and "Cannot find" not in str(e):
                raise EngineError(f"cannot remove bitmap {name} of {node}: {e}") from e
            return False
        return True

    async def close(self) -> None:
        await self._session.close()


def _why_not(name: str, node: Mapping[str, Any], written: Collection[str]) -> str:
    if node["ro"]:
        return "it is read-only"
    if name in written:
        return "it is exported for writing, and a writer would have to wait for the backup"
    return "" if node["image"]["virtual-size"] else "it is empty"


def disk_of(name: str, node_name: str, graph: Graph) -> EngineDisk:
    """The node of an image as a disk of the name ``name``."""
    node = graph.nodes[node_name]
    size = int(node["image"]["virtual-size"])
    unflushed = keeps_bitmaps(node) and is_unflushed(graph, node_name)
    extra = {"image": node.get("file", ""), UNFLUSHED: unflushed}
    persist, bitmaps = keeps_bitmaps(node) and not unflushed, bitmaps_of(graph, node_name)
    form = node["drv"] + (DECRYPTED if node.get("encrypted") else "")
    return EngineDisk(name, size, node_name, node_name, form, persist, bitmaps, extra)


def backup_of(ident: str, plan: DiskPlan, speed: int) -> dict[str, Any]:
    """The arguments of the job that copies what ``plan`` says."""
    data: dict[str, Any] = {"job-id": ident, "device": plan.disk.node, "target": f"{ident}t", "sync": "full"}
    data |= {"speed": speed, "auto-dismiss": False, "filter-node-name": f"{ident}j"}
    if plan.base_bitmap:
        data |= {"sync": "bitmap", "bitmap": plan.base_bitmap, "bitmap-mode": "never"}
    return data

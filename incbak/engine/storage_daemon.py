"""qemu-storage-daemon as an engine: no guest, so a plain job does.

`StorageDaemonEngine` drives a daemon that somebody runs. `OfflineEngine` starts a private one for an image that nobody
has open (qcow2 and other formats).

The private daemon opens the image read-only, which keeps others from writing it, and copies. Only when the backup
exists it opens the image for writing, adds the new bitmap, removes the old ones and stores them: nothing was written
meanwhile. So a run that dies leaves the image and its bitmaps as they were.
"""

from __future__ import annotations

import asyncio
import json
import logging
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from incbak.engine.base import (
    Description,
    DiskPlan,
    Engine,
    EngineDisk,
    LeftOut,
    ProgressCallback,
    RunResult,
    Target,
    superseded,
)
from incbak.engine.jobs import cancel_jobs, wait_for_jobs, without_padding
from incbak.engine.qemu_disks import holds_bitmaps, layout
from incbak.engine.qemu_graph import Graph
from incbak.engine.qemu_guard import GuardChannel
from incbak.engine.served import bitmap_info
from incbak.engine.session import Address, CommandFailed, Session
from incbak.errors import DiskError, EngineError, ImageInUseError
from incbak.private import PrivateDirectory

log = logging.getLogger(__name__)

PROGRAM = "qemu-storage-daemon"
DEFAULT_DISK = "disk0"
_FLUSH_SECONDS = 600.0  # removing a target flushes it
_START_SECONDS = 30.0
_STORE_SECONDS = 120.0
_NODE, _FILE = "disk", "file"


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
                left_out.append(LeftOut(name, why))
            else:
                disks.append(_disk(name, name, node))
        version = (await self._session.execute("query-version"))["qemu"]
        engine = f"{PROGRAM} {version['major']}.{version['minor']}.{version['micro']}"
        config = {"images": {d.name: d.extra["image"] for d in disks}, "blocks": layout(graph)}
        return Description(None, tuple(disks), engine, config, tuple(left_out))

    async def _graph(self) -> Graph:
        nodes = await self._session.execute("query-named-block-nodes", {"flat": True})
        return Graph.of(nodes, await self._session.execute("x-debug-query-block-graph"))

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        done = await cancel_jobs(self._session, prefix)
        for name, node in (await self._graph()).nodes.items():
            if name.startswith(prefix):
                if await self._session.try_execute("blockdev-del", {"node-name": name}):
                    done.append(f"node {name}")
                continue
            for bitmap in (b.get("name", "") for b in node.get("dirty-bitmaps", ())):
                if bitmap.startswith(prefix) and bitmap not in keep and await self._remove(name, bitmap):
                    done.append(f"bitmap {bitmap} of {name}")
        return done

    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        jobs = {f"{plan.new_bitmap}-{n}": plan for n, plan in enumerate(plans)}
        try:
            for ident, plan in jobs.items():
                path, export = targets[plan.disk.name].address()
                server = {"type": "unix", "path": str(path)}
                nbd = {"driver": "nbd", "node-name": f"{ident}t", "server": server, "export": export}
                await self._session.execute("blockdev-add", nbd)
            await self._begin(jobs)
            disks = {ident: plan.disk.name for ident, plan in jobs.items()}
            results = await wait_for_jobs(self._session, disks, progress)
            for ident, plan in jobs.items():
                name = plan.disk.name
                results[name] = await without_padding(self._session, f"{ident}t", plan.disk.size, results[name])
                await self._session.execute("blockdev-del", {"node-name": f"{ident}t"}, timeout=_FLUSH_SECONDS)
        except BaseException:
            await self._abandon(jobs)
            raise
        return RunResult(results)

    async def _begin(self, jobs: Mapping[str, DiskPlan]) -> None:
        """Bitmaps and jobs at one instant."""
        actions: list[dict[str, Any]] = []
        for ident, plan in jobs.items():
            add = {"node": plan.disk.node, "name": plan.new_bitmap, "granularity": plan.granularity}
            add["persistent"] = plan.disk.can_persist
            actions.append({"type": "block-dirty-bitmap-add", "data": add})
            actions.append({"type": "blockdev-backup", "data": _backup(ident, plan, self._speed)})
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
            await self._remove(plan.disk.node, plan.new_bitmap)

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


class OfflineEngine(StorageDaemonEngine):
    """One image in a private daemon; see the module's docstring. Owns the session and the daemon."""

    kind = "image"

    def __init__(self, session: Session, daemon: Daemon, image: Image, speed: int = 0) -> None:
        super().__init__(session, speed)
        self._daemon, self._image = daemon, image

    @classmethod
    async def open(cls, image: Image, speed: int = 0) -> OfflineEngine:
        """Start the daemon. Raises `DiskError`, `ImageInUseError` or `EngineError`."""
        daemon = Daemon(image)
        try:
            return cls(await daemon.connect(), daemon, image, speed)
        except BaseException:
            daemon.close()
            raise

    async def describe(self) -> Description:
        graph = await self._graph()
        node = graph.nodes[_NODE]
        disk = _disk(self._image.disk, _NODE, node)
        version = (await self._session.execute("query-version"))["qemu"]
        engine = f"{PROGRAM} {version['major']}.{version['minor']}.{version['micro']}"
        config = {"images": {disk.name: str(self._image.path)}, "format": self._image.format, "blocks": layout(graph)}
        notes = () if disk.can_persist else (f"a {self._image.format} image cannot store bitmaps",)
        return Description(self._image.vm, (disk,), engine, config, (), notes)

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        (disk,) = (await self.describe()).disks
        if not any(b.name.startswith(prefix) and b.name not in keep for b in disk.bitmaps):
            return []
        async with self._writable():
            return await super().cleanup(prefix, keep)

    async def _begin(self, jobs: Mapping[str, DiskPlan]) -> None:
        ((ident, plan),) = jobs.items()
        await self._session.execute("blockdev-backup", _backup(ident, plan, self._speed))

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        (plan,) = plans
        if not plan.disk.can_persist:
            return
        async with self._writable():
            add = {"node": _NODE, "name": plan.new_bitmap, "granularity": plan.granularity, "persistent": True}
            await self._session.execute("block-dirty-bitmap-add", add)
            await super().commit(plans)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        """The new bitmap is not there before `commit`."""

    def _writable(self) -> Writable:
        return Writable(self._session, self._image)

    async def close(self) -> None:
        with suppress(EngineError):
            await self._session.execute("quit", timeout=5)
        await self._session.close()
        await asyncio.to_thread(self._daemon.close)


class Writable:
    """The image is open for writing inside; afterwards its bitmaps are stored, or the end raises `EngineError`."""

    def __init__(self, session: Session, image: Image) -> None:
        self._session, self._image = session, image

    async def __aenter__(self) -> None:
        await self._reopen(read_only=False)

    async def __aexit__(self, *_: object) -> None:
        await self._reopen(read_only=True)

    async def _reopen(self, *, read_only: bool) -> None:
        graph = await self._session.execute("x-debug-query-block-graph")
        nodes = await self._session.execute("query-named-block-nodes", {"flat": True})
        options: dict[str, Any] = self._image.node(read_only) | {"file": _FILE}
        backing = Graph.of(nodes, graph).edges.get((_NODE, "backing"))
        if backing:
            options["backing"] = backing
        await self._session.execute("blockdev-reopen", {"options": [options]}, timeout=_STORE_SECONDS)


class Image:
    """An image file, and what it is called in the repository."""

    def __init__(self, path: Path, form: str, vm: str, disk: str = DEFAULT_DISK) -> None:
        self.path, self.format, self.vm, self.disk = path, form, vm, disk

    def node(self, read_only: bool) -> dict[str, Any]:
        """The format node, without its file."""
        return {"driver": self.format, "node-name": _NODE, "read-only": read_only}


class Daemon:
    """A private qemu-storage-daemon that does not outlive its owner, whatever happens to that."""

    def __init__(self, image: Image) -> None:
        self._image = image
        if shutil.which(PROGRAM) is None:
            raise DiskError(
                f"{image.path} is a {image.format} image, and {PROGRAM} is not installed",
                hint="Install it (Debian: qemu-system-common), or convert the image to raw.",
            )
        self._private = PrivateDirectory()
        self._directory = self._private.path
        try:
            driver = "host_device" if image.path.is_block_device() else "file"
            file = {"driver": driver, "node-name": _FILE, "filename": str(image.path), "auto-read-only": True}
            chardev = f"socket,id=qmp,server=on,wait=off,path={self._directory}/qmp"
            command = [PROGRAM, "--chardev", chardev, "--monitor", "chardev=qmp"]
            for node in (file, image.node(read_only=True) | {"file": _FILE}):
                command += ["--blockdev", json.dumps(node)]
            with (self._directory / "log").open("wb") as errors:
                self._channel = GuardChannel("child", command, errors=errors)
        except BaseException:
            self._private.close()
            raise

    async def connect(self) -> Session:
        """Its monitor, once it is there. Raises what the daemon said if it ended."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        path = self._directory / "qmp"
        while True:
            if self._channel.process.poll() is not None:
                raise self._failure()
            if path.exists():
                with suppress(EngineError):
                    return await Session.connect(Address(path=str(path)))
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(f"{PROGRAM} did not start within {_START_SECONDS:g} s")
            await asyncio.sleep(0.01)

    def _failure(self) -> DiskError:
        said = (self._directory / "log").read_text(errors="replace").strip()
        why = said.rpartition("}: ")[2].partition("\n")[0] or "no reason given"
        if " lock" in why:
            hint = "If a VM uses it, give its monitor (qmp:...) instead."
            return ImageInUseError(f"image {self._image.path} is in use: {why}", hint=hint)
        return DiskError(f"cannot open image {self._image.path}: {why}")

    def close(self) -> None:
        """End it and wait for that; it stores bitmaps on its way out."""
        self._channel.close(_STORE_SECONDS)
        self._private.close()


def _why_not(name: str, node: Mapping[str, Any], written: Collection[str]) -> str:
    if node["ro"]:
        return "it is read-only"
    if name in written:
        return "it is exported for writing, and a writer would have to wait for the backup"
    return "" if node["image"]["virtual-size"] else "it is empty"


def _disk(name: str, node_name: str, node: Mapping[str, Any]) -> EngineDisk:
    bitmaps = tuple(bitmap_info(b) for b in node.get("dirty-bitmaps", ()) if b.get("name"))
    size = int(node["image"]["virtual-size"])
    extra = {"image": node.get("file", "")}
    persist = holds_bitmaps(node)
    return EngineDisk(name, size, node_name, node_name, node["drv"], persist, bitmaps, extra)


def _backup(ident: str, plan: DiskPlan, speed: int) -> dict[str, Any]:
    data: dict[str, Any] = {"job-id": ident, "device": plan.disk.node, "target": f"{ident}t", "sync": "full"}
    data |= {"speed": speed, "auto-dismiss": False, "filter-node-name": f"{ident}j"}
    if plan.base_bitmap:
        data |= {"sync": "bitmap", "bitmap": plan.base_bitmap, "bitmap-mode": "never"}
    return data

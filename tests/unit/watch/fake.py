"""A QEMU with one disk, as far as watch sees it: bitmaps are sets of clusters; something may happen at any command."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from qemu.qmp import EventListener

from incbak.bitmap import bits as kernels
from incbak.bitmap.store import BitmapStore
from incbak.disk.stacking import key_of
from incbak.engine.session import CommandFailed, EngineGone, Session
from incbak.watch.disks import Watched
from incbak.watch.transfer import Place, PrivateServer

CLUSTER = 65536
SIZE = 64 * CLUSTER
NAME = "incbak-00000001-00000002"


def bits_of(clusters: set[int]) -> kernels.Bits:
    """Packed."""
    bits = np.zeros(kernels.bytes_for(SIZE // CLUSTER), dtype=np.uint8)
    for cluster in clusters:
        kernels.set_range(bits, cluster, cluster)
    return bits


def clusters_in(bits: kernels.Bits) -> set[int]:
    """Unpacked."""
    return {int(c) for c in kernels.clusters_of(kernels.runs(bits, SIZE // CLUSTER))}


class FakeQemu:
    """Takes the place of a `Session`. ``at[n]`` happens just before the n-th command is done (from 0)."""

    def __init__(self, status: str = "prelaunch") -> None:
        self.status = status
        self.bitmaps: dict[str, set[int]] = {}
        self.info: dict[str, dict[str, Any]] = {}
        self.written = False
        self.at: dict[int, Callable[[], None]] = {}
        self.done: list[str] = []
        self.sources: dict[str, set[int]] = {}
        self.jobs: dict[str, str] = {}
        self.pid: int | None = None
        self.ran: list[str] = []
        self.short = False

    @property
    def session(self) -> Session:
        """It, for who wants a session."""
        return cast(Session, self)

    @property
    def listener(self) -> EventListener:
        """Of the events that tell that it ran."""

        class Listener:
            def empty(_) -> bool:
                return not self.ran

        return cast(EventListener, Listener())

    def write(self, cluster: int) -> None:
        """The guest runs, and writes."""
        self.status, self.written = "running", True
        for name, held in self.bitmaps.items():
            if self.info[name]["recording"]:
                held.add(cluster)

    def have(self, name: str, clusters: set[int], **info: Any) -> None:
        """A bitmap of the disk."""
        self.bitmaps[name] = set(clusters)
        self.info[name] = {"recording": True, "busy": False, "granularity": CLUSTER, **info}

    def peer_pid(self) -> int | None:
        return self.pid

    async def ended(self) -> None:
        pass

    async def try_execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> bool:
        try:
            await self.execute(command, arguments)
        except CommandFailed:
            return False
        return True

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None, **_: Any) -> Any:
        number = len(self.done)
        self.done.append(command)
        self.at.pop(number, lambda: None)()
        return getattr(self, "_" + command.replace("-", "_"))(
            **{k.replace("-", "_"): v for k, v in (arguments or {}).items()}
        )

    def _query_status(self) -> dict[str, str]:
        return {"status": self.status}

    def _query_blockstats(self, query_nodes: bool = False) -> list[dict[str, Any]]:
        stats = {"wr_highest_offset": 1 if self.written else 0}
        return [{"node-name": "vda", "stats": stats}] if query_nodes else []

    def _query_named_block_nodes(self, flat: bool) -> list[dict[str, Any]]:
        found = [{"name": n, "count": len(held) * CLUSTER, **self.info[n]} for n, held in self.bitmaps.items()]
        return [{"node-name": "vda", "dirty-bitmaps": found}]

    def _block_dirty_bitmap_add(self, node: str, name: str, granularity: int) -> None:
        if name in self.bitmaps:
            raise CommandFailed("block-dirty-bitmap-add", "GenericError", "it exists already")
        self.have(name, set(), granularity=granularity)

    def _block_dirty_bitmap_remove(self, node: str, name: str) -> None:
        del self.bitmaps[name], self.info[name]

    def _transaction(self, actions: Sequence[Mapping[str, Any]]) -> None:
        for action in actions:
            data = action["data"]
            if action["type"] == "block-dirty-bitmap-add":
                self._block_dirty_bitmap_add(data["node"], data["name"], data["granularity"])
            else:
                for source in data["bitmaps"]:
                    held = self.bitmaps if source["node"] == "vda" else self.sources
                    self.bitmaps[data["target"]] |= held[source["name"]]

    def _query_jobs(self) -> list[dict[str, str]]:
        return [{"id": ident, "status": status} for ident, status in self.jobs.items()]

    def _job_cancel(self, id: str) -> None:
        self.jobs[id] = "concluded"

    def _job_dismiss(self, id: str) -> None:
        del self.jobs[id]

    def _set_action(self, **_: str) -> None:
        pass

    def _cont(self) -> None:
        self.status = "running"

    def _quit(self) -> None:
        raise EngineGone("gone")

    @asynccontextmanager
    async def server(self, _session: Session) -> AsyncIterator[PrivateServer]:
        """In place of `private_server`: it takes a few commands, as the real one does."""
        qemu = self

        class Server:
            @asynccontextmanager
            async def filled(_, place: Place, bits: kernels.Bits) -> AsyncIterator[dict[str, str]]:
                qemu.sources["b0"] = clusters_in(bits)
                await qemu.execute("query-status")
                yield {"node": "null", "name": "b0"}
                await qemu.execute("query-status")

            async def read(_, places: Sequence[Place]) -> list[kernels.Bits]:
                found = [bits_of(set(sorted(qemu.bitmaps[place.name])[int(qemu.short) :])) for place in places]
                await qemu.execute("query-status")
                return found

        yield cast(PrivateServer, Server())


def a_disk(directory: Path, *, raw: bool = True) -> Watched:
    """An image of ``SIZE`` bytes with its store, which is locked."""
    image = directory / "vda.img"
    with image.open("wb") as f:
        f.truncate(SIZE)
    os.utime(image, ns=(1, 1_600_000_000_123_456_789))
    store = BitmapStore(directory / "state", "vm", "vda")
    store.lock()
    return Watched("vda", "vda", SIZE, image, key_of(image.stat()), "raw" if raw else "qcow2", store)

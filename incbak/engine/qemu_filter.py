"""Copy-before-write in a running QEMU: one disk's scratch file, filter, snapshot-access node, target and job.

The nodes of disk N of a backup, all with the name of its new bitmap in front:

====  ==================================================================================================
Nr    a raw node of fixed size on the scratch file, which is what bounds it
Nq    qcow2 on it: takes old content as it comes, and reads nowhere else
Nf    the copy-before-write filter, between the guest's device and the image
Na    the point in time, for the job to read
Nt    the target: the sink, over NBD
Nj    the filter that the job itself puts on Na
====  ==================================================================================================

Order matters. The filter takes away its image's permission to be written past it as soon as it has a second user, so
Na comes after the device has been moved to Nf, and goes before the device is moved back.

While a target does not answer, whatever drains all nodes stops QEMU's main loop, and with it the guest: ``stop``, a
reset, a transaction, another ``blockdev-backup``; and removing Nt flushes it. So all jobs begin in one transaction, the
sockets of the targets can be cut from here without an answer of QEMU, and Nt is cut before it is removed. A request
that waits for room in the socket's buffer would not notice (a Unix socket that is shut down does not poll as writable
on Linux, and QEMU does not look for a hang-up there), so what is in flight fits into the buffer.

QEMU before 9.0 aborts, guest and all, when Nf or Na is added while a request is in flight on an I/O thread:
``blockdev-add`` drains what is below without holding the thread's lock (on 7.2, with four writers in the guest, 4 of 4
runs died within four backups). With the VM stopped all disks are in the main thread, where that is safe.
"""

from __future__ import annotations

import asyncio
import math
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import SHUT_RDWR, SO_SNDBUF, SOL_SOCKET, socket
from typing import Any

from incbak.engine.base import DiskPlan
from incbak.engine.jobs import JOB_CLUSTER
from incbak.engine.qemu_graph import StillUsedError, move, read_graph, take_out
from incbak.engine.qemu_jobs import JOB_POLICY
from incbak.engine.qemu_relay import Relay
from incbak.engine.session import CommandFailed, EngineSilent, Session
from incbak.errors import EngineError

CBW_TIMEOUT = 10
WORKERS = 8  # requests in flight, for which a drain has to wait
SOCKET_BUFFER = 16 << 20  # more than what is in flight
_OVERHEAD = 4 << 20  # what qcow2 needs for itself, beyond 1 in 8192 bytes
_CLOSE_TO_FULL = 1 << 20
_SNDBUFFORCE = 32  # SO_SNDBUFFORCE of Linux
_CREATE_SECONDS = 60.0
_WINDOW_COMMAND = 3.0
_LET_GO_SECONDS = 3.0


def in_flight(room: int | None) -> dict[str, int]:
    """How much the job may have under way at once, with ``room`` bytes in the socket's buffer, if that matters.

    No more than the buffer can take: a request that waits to be sent is not woken when it is cut. And one cluster at a
    time. QEMU 7.2 (``hbitmap_status``) takes a stretch that begins with saved clusters and goes on beyond them for one
    of which nothing is saved, and asks the image whether it is a hole there. Where the guest has discarded or zeroed
    what was saved, that is so, and the job would copy zeroes in place of the old content. Of a single cluster the
    answer is right.
    """
    workers = WORKERS if room is None else max(1, min(WORKERS, room // JOB_CLUSTER))
    return {"max-workers": workers, "max-chunk": JOB_CLUSTER}


@dataclass
class DiskFilter:
    """What one disk of a run has in QEMU. Every step may fail; `remove` undoes those that were made."""

    session: Session
    plan: DiskPlan
    number: int
    scratch_dir: Path
    limit: int
    bound: int = 0
    scratch: int = -1
    sink: socket | None = None
    why_cut: str = ""
    moved: tuple[float, int] = (math.inf, 0)  # when the job last got on, and how far it was
    nodes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what could not be taken out, after the job

    @property
    def ident(self) -> str:
        """The job's id, and what the nodes' names begin with."""
        return f"{self.plan.new_bitmap}-{self.number}"

    @property
    def disk(self) -> str:
        """The disk's name."""
        return self.plan.disk.name

    async def _add(self, letter: str, driver: str, **options: Any) -> None:
        arguments = {"driver": driver, "node-name": self.ident + letter}
        await self.session.execute("blockdev-add", arguments | {k.replace("_", "-"): v for k, v in options.items()})
        self.nodes.append(self.ident + letter)

    # -- before the point in time ---------------------------------------------------------------------------------

    async def connect(self) -> None:
        """The target's node, over the socket: handed to QEMU, or relayed where the monitor takes no descriptors."""
        assert self.sink
        if not self.session.address.is_unix:
            relay = Relay(self.sink.dup())
            try:
                await self._add("t", "nbd", server={"type": "unix", "path": str(relay.path)}, export=self.disk)
            finally:
                relay.close()
            return
        await self.session.pass_fd(self.sink.fileno(), "getfd", {"fdname": self.ident})
        try:
            await self._add("t", "nbd", server={"type": "fd", "str": self.ident}, export=self.disk)
        except CommandFailed:
            await self.session.try_execute("closefd", {"fdname": self.ident})
            raise

    async def prepare(self) -> None:
        """The scratch file, which nobody uses yet."""
        size = self.plan.disk.size
        self.bound = min(self.limit, size + size // 1024 + _OVERHEAD) // 65536 * 65536
        filename, path = await self._scratch(self.bound)
        try:
            file = {"driver": "file", "filename": filename, "discard": "unmap", "cache": {"no-flush": True}}
            await self._add("r", "raw", size=self.bound, file=file)
        finally:
            if path:
                path.unlink()
        await self._create(size)
        await self._add("q", "qcow2", file=self.ident + "r", discard="unmap", cache={"no-flush": True})

    async def _scratch(self, bound: int) -> tuple[str, Path | None]:
        """The file as QEMU can open it, and its name if it still has one."""
        path: Path | None = None
        try:
            if self.session.address.is_unix:
                with tempfile.TemporaryFile(dir=self.scratch_dir, buffering=0) as unnamed:
                    self.scratch = os.dup(unnamed.fileno())
            else:
                self.scratch, name = tempfile.mkstemp(prefix="incbak-", suffix=".scratch", dir=self.scratch_dir)
                path = Path(name)
            os.ftruncate(self.scratch, bound)
        except OSError as e:
            raise EngineError(f"cannot make a scratch file in {self.scratch_dir}: {e.strerror}") from e
        if path:
            return str(path), path
        added = await self.session.pass_fd(self.scratch, "add-fd", {"opaque": self.ident})
        return f"/dev/fdset/{added['fdset-id']}", None

    async def _create(self, size: int) -> None:
        job = self.ident + "c"
        options = {"driver": "qcow2", "file": self.ident + "r", "size": size}
        await self.session.execute("blockdev-create", {"job-id": job, "options": options})
        deadline = asyncio.get_running_loop().time() + _CREATE_SECONDS
        while True:
            jobs = await self.session.execute("query-jobs")
            state: Mapping[str, Any] = next(
                (j for j in jobs if j["id"] == job), {"status": "gone", "error": "it vanished"}
            )
            if state["status"] in ("concluded", "gone"):
                break
            if asyncio.get_running_loop().time() > deadline:
                raise EngineSilent(f"disk {self.disk}: the scratch file was not made within {_CREATE_SECONDS:g} s")
            await asyncio.sleep(0.005)
        await self.session.try_execute("job-dismiss", {"id": job})
        if error := state.get("error"):
            raise EngineError(f"disk {self.disk}: cannot make the scratch file: {error}", hint="Allow it more space.")

    # -- the point in time ----------------------------------------------------------------------------------------

    async def add_filter(self) -> None:
        """The filter, which nobody uses yet."""
        cbw = {"file": self.plan.disk.extra["top"], "target": self.ident + "q"}
        await self._add("f", "copy-before-write", **cbw, on_cbw_error="break-snapshot", cbw_timeout=CBW_TIMEOUT)

    async def insert(self) -> None:
        """From now on old content is kept: for this disk, the point in time.

        What stands below the device is looked at again: an external snapshot that was taken since the run began leaves
        the bitmaps on the node that is no longer written.
        """
        extra = self.plan.disk.extra
        now = (await read_graph(self.session, timeout=_WINDOW_COMMAND)).root(extra["backend"])
        if now != extra["top"]:
            raise EngineError(
                f"disk {self.disk}: another program moved it from node {extra['top']} to {now} since the run began",
                hint="Run again; the next run sees the disk as it is then.",
            )
        await move(self.session, extra["backend"], extra["qom"], self.ident + "f", timeout=_WINDOW_COMMAND)

    async def add_access(self) -> None:
        """The point in time, to be read."""
        await self._add("a", "snapshot-access", file=self.ident + "f")

    # -- the copy -------------------------------------------------------------------------------------------------

    async def job(self, speed: int) -> dict[str, Any]:
        """What to copy. The base's bitmap is merged only now: it may have too much by this, never too little."""
        access = self.ident + "a"
        backup: dict[str, Any] = {
            "job-id": self.ident,
            "x-perf": self._in_flight(),
            "device": access,
            "target": self.ident + "t",
            "sync": "full",
        }
        backup |= JOB_POLICY | {"filter-node-name": self.ident + "j", "speed": speed}
        if base := self.plan.base_bitmap:
            name = f"{self.plan.new_bitmap}-dirty"
            one = {"node": access, "name": name}
            add = one | {"granularity": self.plan.granularity, "disabled": True}
            await self.session.execute("block-dirty-bitmap-add", add)
            merge = {"node": access, "target": name, "bitmaps": [{"node": self.plan.disk.node, "name": base}]}
            await self.session.execute("block-dirty-bitmap-merge", merge)
            backup |= {"sync": "bitmap", "bitmap": name, "bitmap-mode": "never"}
        return backup

    def _in_flight(self) -> dict[str, int]:
        assert self.sink
        room = self.sink.getsockopt(SOL_SOCKET, SO_SNDBUF) // 2
        return in_flight(room if self.session.address.is_unix else None)

    def scratch_full(self) -> bool:
        """Whether the scratch file has no room for one more cluster."""
        return self.scratch >= 0 and os.fstat(self.scratch).st_blocks * 512 > self.bound - _CLOSE_TO_FULL

    def scratch_dir_full(self) -> bool:
        """Whether the file system below the scratch file has no room for one more cluster."""
        if self.scratch < 0:
            return False
        free = os.fstatvfs(self.scratch)
        return free.f_bavail * free.f_frsize < _CLOSE_TO_FULL

    def cut(self, why: str = "") -> None:
        """End the connection to the target, whatever is in flight; needs no answer of QEMU, which may wait for it."""
        self.why_cut = self.why_cut or why
        if self.sink:
            with suppress(OSError):
                self.sink.shutdown(SHUT_RDWR)

    # -- the end --------------------------------------------------------------------------------------------------

    async def remove(self) -> list[str]:
        """Take everything out again, the job being over; what could not be taken out, in words."""
        left: list[str] = []
        self.cut()
        for letter in "ta":
            await self._remove(letter, left)
        if self.ident + "f" in self.nodes:
            try:
                await take_out(self.session, self.ident + "f", timeout=_WINDOW_COMMAND)
            except (CommandFailed, StillUsedError) as e:
                left.append(f"filter of {self.disk}: {e}")
        for letter in "fqr":
            await self._remove(letter, left)
        await remove_fds(self.session, self.ident)
        self._free_scratch()
        self.close()
        return [] if not self.nodes else left

    def _free_scratch(self) -> None:
        """QEMU closes a descriptor that was removed only while the VM runs; the space must not wait for that."""
        if self.scratch >= 0 and self.ident + "r" not in self.nodes:
            with suppress(OSError):
                os.ftruncate(self.scratch, 0)

    async def _remove(self, letter: str, left: list[str]) -> None:
        node = self.ident + letter
        deadline = asyncio.get_running_loop().time() + _LET_GO_SECONDS
        while node in self.nodes:
            try:
                await self.session.execute("blockdev-del", {"node-name": node})
                self.nodes.remove(node)
            except CommandFailed as e:
                if asyncio.get_running_loop().time() > deadline:
                    left.append(f"node {node}: {e}")
                    return
                await asyncio.sleep(0.05)  # requests in flight still hold it, of what was above it

    def close(self) -> None:
        """Let go of the scratch file and the socket."""
        if self.sink:
            self.sink.close()
            self.sink = None
        if self.scratch >= 0:
            with suppress(OSError):
                os.close(self.scratch)
            self.scratch = -1


def widen(sock: socket) -> socket:
    """Give the socket room for all requests that may be in flight: see `DiskFilter._in_flight`."""
    for option in (_SNDBUFFORCE, SO_SNDBUF):  # the first takes privilege
        with suppress(OSError):
            sock.setsockopt(SOL_SOCKET, option, SOCKET_BUFFER)
            break
    return sock


async def cut_target(session: Session, node: str) -> bool:
    """End an NBD node's connection at once; whether there was one."""
    return await session.try_execute("yank", {"instances": [{"type": "block-node", "node-name": node}]})


async def remove_fds(session: Session, prefix: str) -> None:
    """Let go of descriptors that were passed under our names."""
    if not session.address.is_unix:
        return
    for fdset in await session.execute("query-fdsets"):
        if any(str(fd.get("opaque", "")).startswith(prefix) for fd in fdset["fds"]):
            await session.try_execute("remove-fd", {"fdset-id": fdset["fdset-id"]})

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
sockets of the targets can be cut from here without an answer of QEMU (`incbak.engine.guard.cut_off`), and Nt is cut
before it is removed. How QEMU connects to them, once and never again: `incbak.engine.qemu_door`.

QEMU before 9.0 aborts, guest and all, when Nf or Na is added while a request is in flight on an I/O thread:
``blockdev-add`` drains what is below without holding the thread's lock (on 7.2, with four writers in the guest, 4 of 4
runs died within four backups). With the VM stopped all disks are in the main thread, where that is safe.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from socket import socket
from typing import Any

from incbak.engine.base import PREFIX, DiskPlan, Target
from incbak.engine.guard import cut_off
from incbak.engine.headway import Headway
from incbak.engine.jobs import JOB_CLUSTER
from incbak.engine.qemu_door import Door
from incbak.engine.qemu_graph import StillUsedError, move, read_graph, take_out
from incbak.engine.qemu_guard import Guard
from incbak.engine.qemu_jobs import JOB_POLICY
from incbak.engine.session import CommandFailed, EngineSilent, Session
from incbak.errors import EngineError

CBW_TIMEOUT = 10
WORKERS = 8  # requests in flight, for which a drain has to wait
_OVERHEAD = 4 << 20  # what qcow2 needs for itself, beyond 1 in 8192 bytes
_CLOSE_TO_FULL = 1 << 20
_CREATE_SECONDS = 60.0
_WINDOW_COMMAND = 3.0
_LET_GO_SECONDS = 3.0


def in_flight() -> dict[str, int]:
    """Return how much the job may have under way at once: few clusters, for which a drain waits, and each by itself.

    QEMU 7.2 (``hbitmap_status``) takes a stretch that begins with saved clusters and goes on beyond them for one of
    which nothing is saved, and asks the image whether it is a hole there. Where the guest has discarded or zeroed what
    was saved, that is so, and the job would copy zeroes in place of the old content. Of a single cluster the answer is
    right.
    """
    return {"max-workers": WORKERS, "max-chunk": JOB_CLUSTER}


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
    door: Door | None = None
    sink: socket | None = None  # our end of QEMU's connection to the target
    why_cut: str = ""
    headway: Headway | None = None  # of the job, while there is one
    nodes: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)  # what could not be taken out, after the job

    @property
    def ident(self) -> str:
        """The job's id, and what the nodes' names begin with."""
        return f"{self.plan.run}-{self.number}"

    @property
    def disk(self) -> str:
        """The disk's name."""
        return self.plan.disk.name

    async def _add(self, letter: str, driver: str, **options: Any) -> None:
        arguments = {"driver": driver, "node-name": self.ident + letter}
        await self.session.execute("blockdev-add", arguments | {k.replace("_", "-"): v for k, v in options.items()})
        self.nodes.append(self.ident + letter)

    # -- before the point in time ---------------------------------------------------------------------------------

    def open_door(self) -> socket:
        """Listen for QEMU; return the listener, for the guard."""
        self.door = Door()
        return self.door.give_listener()

    async def connect(self, guard: Guard, target: Target) -> None:
        """The target's node. QEMU connects and talks to the target while it makes the node."""
        assert self.door
        served = asyncio.create_task(self._serve(guard, target))
        try:
            server = {"type": "unix", "path": await self._path(self.door)}
            await self._add("t", "nbd", server=server, export=self.disk)
            await served
        except CommandFailed as e:
            raise self._unreachable("the socket of the target", e) from e
        finally:
            served.cancel()
            await asyncio.wait([served])
            self.door.close()

    async def _path(self, door: Door) -> str:
        if not self.session.address.is_unix:
            return str(door.path)
        added = await self.session.pass_fd(door.directory, "add-fd", {"opaque": self.ident})
        return f"/proc/self/fd/{added['fd']}/{door.name}"

    async def _serve(self, guard: Guard, target: Target) -> None:
        self.sink = await guard.accepted(self.number)
        try:
            target.serve(self.sink.dup())
        except BaseException:
            self.cut()  # QEMU waits for a greeting
            raise

    def _unreachable(self, what: str, error: CommandFailed) -> EngineError:
        """Over TCP QEMU opens by name what it is handed over a Unix socket."""
        text = f"disk {self.disk}: QEMU cannot open {what}: {error.description}"
        if self.session.address.is_unix:
            return EngineError(text, hint="Has QEMU /proc, and does its sandbox let it connect to Unix sockets?")
        return EngineError(
            f"{text} (its monitor is TCP, so files and sockets cannot be handed to it)",
            hint="Give QEMU a monitor that is a Unix socket, or run incbak as QEMU's user, on the same host.",
        )

    async def prepare(self) -> None:
        """The scratch file, which nobody uses yet."""
        size = self.plan.disk.size
        self.bound = min(self.limit, size + size // 1024 + _OVERHEAD) // 65536 * 65536
        filename, path = await self._scratch(self.bound)
        try:
            file = {"driver": "file", "filename": filename, "discard": "unmap", "cache": {"no-flush": True}}
            await self._add("r", "raw", size=self.bound, file=file)
        except CommandFailed as e:
            raise self._unreachable("the scratch file", e) from e
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
        if now and now.startswith(f"{PREFIX}-") and now != extra["top"]:
            raise EngineError(
                f"disk {self.disk}: a run into another repository has node {now} above it",
                hint="Run again when it has ended. If it was killed, remove what it has left: incbak clean qmp:...",
            )
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
            "x-perf": in_flight(),
            "device": access,
            "target": self.ident + "t",
            "sync": "full",
        }
        backup |= JOB_POLICY | {"filter-node-name": self.ident + "j", "speed": speed}
        if base := self.plan.base_bitmap:
            name = f"{self.plan.run}-dirty"
            one = {"node": access, "name": name}
            add = one | {"granularity": self.plan.granularity, "disabled": True}
            await self.session.execute("block-dirty-bitmap-add", add)
            merge = {"node": access, "target": name, "bitmaps": [{"node": self.plan.disk.node, "name": base}]}
            await self.session.execute("block-dirty-bitmap-merge", merge)
            backup |= {"sync": "bitmap", "bitmap": name, "bitmap-mode": "never"}
        return backup

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
            cut_off(self.sink)

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
        if self.door:
            self.door.close()
        if self.sink:
            self.sink.close()
            self.sink = None
        if self.scratch >= 0:
            with suppress(OSError):
                os.close(self.scratch)
            self.scratch = -1


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

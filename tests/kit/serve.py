"""Drive ``incbak serve``: the process, its monitor, and NBD targets that can die or stall when told to."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

from incbak.bitmap.store import BitmapStore
from incbak.disk.base import Disk
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.fingerprint import Fingerprint
from incbak.nbd.client import NbdClient
from incbak.nbd.server import NbdServer
from incbak.nbd.uri import NbdUri
from incbak.serve.commands import execute
from incbak.serve.export import DiskExport
from incbak.serve.opening import close_tracked
from incbak.serve.schema import QmpError
from incbak.serve.tracker import TrackedDisk
from incbak.serve.vm import Vm

DEADLINE = 30.0


def wait_until(what: Callable[[], object], why: str, deadline: float = DEADLINE) -> None:
    """Poll ``what`` until it is true; fail naming ``why``."""
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, f"waited {deadline:g} s in vain: {why}"
        time.sleep(0.01)


def listens(path: Path) -> bool:
    """Whether a process listens on the Unix socket; its name is there a moment earlier. Connects to nothing."""
    rows = (line.split(maxsplit=7) for line in Path("/proc/net/unix").read_text().splitlines()[1:])
    return any(len(row) == 8 and row[7] == str(path) and int(row[3], 16) & 0x10000 for row in rows)


@contextmanager
def holding(path: Path, mode: str) -> Iterator[int]:
    """Another process that has ``path`` open in a mode of Python's, without locks."""
    program = "import sys; f = open(sys.argv[1], sys.argv[2]); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", program, str(path), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield process.pid
        process.communicate()


class Qmp:
    """A blocking QMP client, on `qemu.qmp.QMPClient` in a thread of its own. Events are kept in `events`."""

    def __init__(self, path: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.client = QMPClient("test")
        self.client.logger.setLevel("CRITICAL")
        self.events: list[dict[str, Any]] = []
        self._call(self._connect(str(path)))

    async def _connect(self, path: str) -> None:
        await self.client.connect(path)
        self._listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        async for event in self.client.events:
            self.events.append(dict(event))

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(DEADLINE)

    def __call__(self, command: str, arguments: Mapping[str, object] | None = None, **more: object) -> Any:
        """Execute; underscores of keyword names become dashes."""
        given = {**(arguments or {}), **{k.replace("_", "-"): v for k, v in more.items()}}
        return self._call(self.client.execute(command, given))

    def bitmaps(self, disk: str) -> dict[str, dict[str, Any]]:
        """The dirty bitmaps of a disk, by name."""
        device = next(d for d in self("query-block") if d["device"] == disk)
        return {b["name"]: b for b in device["inserted"].get("dirty-bitmaps", [])}

    def wait_event(self, name: str, **data: object) -> dict[str, Any]:
        """The first event of that name and data, waited for."""

        def found() -> list[dict[str, Any]]:
            return [e for e in self.events if e["event"] == name and data.items() <= e["data"].items()]

        wait_until(found, f"event {name} {data}")
        return found()[0]

    def close(self) -> None:
        """Disconnect."""

        async def end() -> None:
            self._listening.cancel()
            try:
                await self.client.disconnect()
            except (EOFError, OSError):
                pass

        self._call(end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class Serve:
    """A running ``incbak serve`` of disks in ``directory``."""

    def __init__(
        self, directory: Path, disks: Mapping[str, Path], *options: str, env: Mapping[str, str] | None = None
    ) -> None:
        self.directory, self.nbd, self.monitor = directory, directory / "nbd.sock", directory / "qmp.sock"
        for path in (self.nbd, self.monitor):
            path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "incbak", "serve", "--name", "vm", "--state-dir", str(directory / "state")]
        command += ["--socket", str(self.nbd), "--monitor", str(self.monitor), *options]
        command += [f"{name}={path}" for name, path in disks.items()]
        self.log = (directory / "serve.log").open("a+b")
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, env={**os.environ, **(env or {})}
        )
        assert self.process.stdout
        self.ready = self.process.stdout.readline().decode()
        assert self.ready.startswith("ready: "), (directory / "serve.log").read_text()

    def uri(self, disk: str) -> NbdUri:
        """Where a disk is."""
        return NbdUri(disk, path=str(self.nbd))

    def connect(self, disk: str, *contexts: str, window: int = 16) -> NbdClient:
        """A connection to a disk."""
        return NbdClient.connect(self.uri(disk), contexts=contexts, window=window)

    def qmp(self) -> Qmp:
        """A new monitor connection."""
        return Qmp(self.monitor)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        code = self.process.wait(DEADLINE)
        assert self.process.stdout
        self.process.stdout.close()
        self.log.close()
        return code


@contextmanager
def serving(directory: Path, disks: Mapping[str, Path], *options: str, **more: Any) -> Iterator[Serve]:
    """`Serve`, killed in the end if it still runs."""
    serve = Serve(directory, disks, *options, **more)
    try:
        yield serve
    finally:
        if serve.process.poll() is None:
            serve.stop(signal.SIGKILL)


def raw_image(path: Path, size: int, fill: bytes = b"") -> Path:
    """A sparse raw image that begins with ``fill``."""
    with path.open("wb") as f:
        f.write(fill)
        f.truncate(size)
    return path


class _DiskDevice:
    def __init__(self, disk: MemoryDisk | FaultyDisk, wrote: list[tuple[int, int]]) -> None:
        self.disk, self.wrote = disk, wrote
        self.size, self.read_only = disk.size, False
        self.read_into, self.read_nowait, self.flush, self.trim = (
            disk.read_into,
            disk.read_nowait,
            disk.flush,
            disk.trim,
        )

    def may_block(self, offset: int, length: int) -> bool:
        return True

    def write(self, buf: memoryview, offset: int) -> None:
        self.wrote.append((offset, len(buf)))
        self.disk.write(bytes(buf), offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self.wrote.append((offset, length))
        self.disk.write_zeroes(offset, length, unmap=unmap)

    def cache(self, offset: int, length: int) -> None:
        pass

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        return [(length, 0)]

    def close(self) -> None:
        pass


class Peer:
    """An NBD server over a memory disk, to be a job's target; ``disk`` may fail or stall. ``wrote`` lists requests."""

    multi_conn = False

    def __init__(self, path: Path, disk: MemoryDisk | FaultyDisk, name: str = "sink") -> None:
        self.disk, self.name, self.description = disk, name, ""
        self.size, self.read_only = disk.size, False
        self.wrote: list[tuple[int, int]] = []
        self.server = NbdServer(lambda: {name: self})
        self.path = self.server.listen_unix(path)

    def contexts(self) -> list[str]:
        return []

    def open(self) -> Any:
        return _DiskDevice(self.disk, self.wrote)

    @property
    def uri(self) -> NbdUri:
        """Where it is."""
        return NbdUri(self.name, path=str(self.path))

    def blockdev(self, node: str) -> dict[str, object]:
        """Arguments of ``blockdev-add``."""
        server = {"type": "unix", "path": str(self.path)}
        return {"driver": "nbd", "node-name": node, "server": server, "export": self.name}

    def stop(self) -> None:
        """Be gone at once."""
        self.server.stop(0.1)


class SpyDisk(MemoryDisk):
    """A memory disk that calls ``on_write(kind, offset, length)`` at each change, before it is made."""

    def __init__(self, size: int, name: str = "memory") -> None:
        super().__init__(size, name=name)
        self.on_write: Callable[[str, int, int], None] = lambda kind, offset, length: None

    def write(self, buf: memoryview | bytes, offset: int) -> None:
        self.on_write("write", offset, len(buf))
        super().write(buf, offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        self.on_write("zero", offset, length)
        super().write_zeroes(offset, length, unmap=unmap)

    def trim(self, offset: int, length: int) -> None:
        self.on_write("trim", offset, length)
        super().write_zeroes(offset, length, unmap=True)

    def fingerprint(self) -> Fingerprint:
        return Fingerprint(self.size, 1, self._generation + 1, bytes(16))


class Machine:
    """The inside of ``incbak serve`` without the process: disks in memory, commands called as functions.

    ``guest[name]`` is a connection's device. Use as a context manager.
    """

    def __init__(self, directory: Path, disks: Mapping[str, Disk], scratch_limit: int | None = None) -> None:
        self.directory, self.disks = directory, dict(disks)
        self.vm = Vm("vm", directory, scratch_limit)
        self.events: list[tuple[str, dict[str, object]]] = []
        self.vm.listen(lambda event, data: self.events.append((event, data)))
        self.peers: list[Peer] = []
        self.tracked: dict[str, TrackedDisk] = {}
        for name, disk in disks.items():
            store = BitmapStore(directory / "state", "vm", name)
            store.lock()
            self.tracked[name] = TrackedDisk(name, disk, store)
            self.vm.add_disk(self.tracked[name])
        self.guest = {name: DiskExport(tracked).open() for name, tracked in self.tracked.items()}

    def __call__(self, command: str, arguments: Mapping[str, object] | None = None, **more: object) -> Any:
        """Execute; underscores of keyword names become dashes."""
        return execute(self.vm, command, {**(arguments or {}), **{k.replace("_", "-"): v for k, v in more.items()}})

    def target(self, name: str, size: int, faults: Faults | None = None) -> Peer:
        """A target node ``name``: a server of ours over memory, which may fail or stall."""
        disk = MemoryDisk(size, name=name)
        peer = Peer(self.directory / f"{name}.sock", FaultyDisk(disk, faults) if faults else disk)
        self.peers.append(peer)
        self("blockdev-add", peer.blockdev(name))
        return peer

    def bitmap(self, disk: str, name: str) -> dict[str, Any]:
        """What the monitor tells of a bitmap."""
        device = next(d for d in self("query-block") if d["device"] == disk)
        return next(b for b in device["inserted"].get("dirty-bitmaps", []) if b["name"] == name)

    def ended(self, job: str) -> dict[str, Any]:
        """The data of the event that ends a job, waited for; the job is gone then."""
        ends = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")

        def found() -> list[dict[str, Any]]:
            return [d for event, d in list(self.events) if event in ends and d["device"] == job]

        wait_until(found, f"the end of job {job}")
        wait_until(lambda: not self.vm.jobs.find(job), f"job {job} is dismissed")
        return found()[0]

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *_: object) -> None:
        for peer in self.peers:
            if isinstance(peer.disk, FaultyDisk):
                for event in peer.disk.faults.stall.values():
                    event.set()
        for job in self.vm.jobs.all():
            with suppress(QmpError):
                job.cancel()
            job.wait(5)
        for target in self.vm.targets.values():
            target.close()
        for peer in self.peers:
            peer.stop()
        for tracked in self.tracked.values():
            close_tracked(tracked, 5)

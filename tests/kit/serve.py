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
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import QMPClient

from incbak.disk.faults import FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.nbd.client import NbdClient
from incbak.nbd.server import NbdServer
from incbak.nbd.uri import NbdUri

DEADLINE = 30.0


def wait_until(what: Callable[[], object], why: str, deadline: float = DEADLINE) -> None:
    """Poll ``what`` until it is true; fail naming ``why``."""
    end = time.monotonic() + deadline
    while not what():
        assert time.monotonic() < end, f"waited {deadline:g} s in vain: {why}"
        time.sleep(0.01)


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

    def status(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
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

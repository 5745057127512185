"""The QMP monitor against clients that send anything: whatever one sends, another is answered at once."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
import threading
from pathlib import Path
from random import Random
from typing import Any

from fuzzlib import mutate
from fuzzlib.case import FuzzTarget, demand, wait_until
from incbak.disk.memory import MemoryDisk
from incbak.serve.commands.registry import COMMANDS
from incbak.serve.monitor import Monitor
from tests.kit.serve import Machine, Peer

SIZE = 1 << 20
_PEER = "@peer@"
"""Stands for the path of a server's socket, which is another one in each run."""
_NAMES = ("vda", "vdb", "b0", "b1", "t0", "job0", "nobody", "")
_WORDS = ("node", "name", "device", "target", "sync", "bitmap", "persistent", "granularity", "disabled", "job-id",
          "id", "actions", "type", "data", "driver", "node-name", "server", "path", "export", "speed", "bitmap-mode",
          "enable", "bitmaps", "auto-dismiss", "auto-finalize", "force", "query-nodes", "recurse")  # fmt: skip
_VALUES = ("full", "incremental", "bitmap", "none", "top", "on-success", "always", "never", "nbd", "unix",
           "block-dirty-bitmap-add", "block-dirty-bitmap-clear", "blockdev-backup", "abort")  # fmt: skip


class MonitorTarget(FuzzTarget):
    """A fresh VM for each case, so that a case does not depend on those before; one event loop for all."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        self.peer = Peer(directory / "peer.sock", MemoryDisk(SIZE), "sink")
        self._number = 0

    def make(self, rng: Random) -> bytes:
        if rng.random() < 0.1:
            return _odd(rng)
        pieces = [json.dumps({"execute": "qmp_capabilities"}).encode()] if rng.random() < 0.95 else []
        for _ in range(rng.choice((1, 2, 5, 5, 60))):
            pieces.append(json.dumps(self._command(rng)).encode())
        data = b"\n".join(mutate.shuffled(rng, pieces))
        if rng.random() < 0.5:
            data = data[:33] + mutate.mutated(rng, data[33:], b'{"execute":"query-block","id":[{}]}')
        return data

    def _command(self, rng: Random) -> dict[str, object]:
        name = rng.choice(sorted(COMMANDS)) if rng.random() < 0.9 else mutate.text(rng)
        made: dict[str, object] = {"execute": name, "arguments": self._arguments(rng, name)}
        if rng.random() < 0.2:
            made["id"] = _value(rng, 2)
        if rng.random() < 0.03:
            made[mutate.text(rng)] = _value(rng, 1)
        return made

    def _arguments(self, rng: Random, name: str) -> object:
        """Right ones for the most part, so that commands get far; with one that is not."""
        path = _PEER if rng.random() < 0.8 else mutate.text(rng)
        server: dict[str, object] = {"type": "unix", "path": path}
        if rng.random() < 0.05:
            server = {"type": "inet", "host": "127.0.0.1", "port": rng.choice(("1", "99999", "9" * 5000, "x", "-1"))}
        bitmap = {"node": rng.choice(_NAMES[:2]), "name": rng.choice(_NAMES[2:4])}
        add = {**bitmap, "persistent": rng.random() < 0.5, "granularity": 1 << rng.choice((9, 16, 20, 31))}
        backup = {"device": "vda", "target": "t0", "sync": rng.choice(_VALUES[:5]), "job-id": "job0"}
        if rng.random() < 0.5:
            backup |= {"bitmap": "b0", "bitmap-mode": rng.choice(_VALUES[5:8])}
        known: dict[str, Any] = {
            "blockdev-add": {"driver": "nbd", "node-name": "t0", "server": server, "export": "sink"},
            "blockdev-del": {"node-name": "t0"},
            "blockdev-backup": backup,
            "block-dirty-bitmap-add": add,
            "block-dirty-bitmap-merge": {"node": "vda", "target": "b0", "bitmaps": ["b1"]},
            "transaction": {
                "actions": [
                    {"type": kind, "data": data}
                    for kind, data in rng.sample(
                        [
                            ("block-dirty-bitmap-add", add),
                            ("block-dirty-bitmap-clear", bitmap),
                            ("blockdev-backup", backup),
                            ("abort", {}),
                            ("nonsense", {}),
                        ],
                        rng.randint(0, 4),
                    )
                ]
            },
        }
        if name in known:
            given = known[name]
        elif "bitmap" in name:
            given = bitmap
        elif "job" in name:
            given = {rng.choice(("id", "device")): "job0"}
        else:
            given = {}
        if rng.random() < 0.3:
            given = {**given, rng.choice([*given, *_WORDS]): _value(rng, 3)}
        return given if rng.random() < 0.97 else _value(rng, 2)

    def run(self, data: bytes) -> None:
        data = data.replace(_PEER.encode(), str(self.peer.path).encode())
        if b"inet" in data and b"127.0.0.1" not in data:
            return
        self._number += 1
        here = self.directory / f"vm{self._number}"
        here.mkdir()
        before = os.getcwd()
        os.chdir(here)
        try:
            with Machine(here, {"vda": MemoryDisk(SIZE), "vdb": MemoryDisk(70_001)}) as machine:
                monitor = self._call(_monitor(machine))
                try:
                    self._talk(monitor, data)
                finally:
                    self._call(monitor.close(1.0))
        finally:
            os.chdir(before)
            shutil.rmtree(here)

    def _talk(self, monitor: Monitor, data: bytes) -> None:
        ours, theirs = socket.socketpair()
        self.loop.call_soon_threadsafe(monitor.add_connection, theirs)
        with ours:
            replies = bytearray()
            _send_and_read(ours, data, replies)
        for line in bytes(replies).splitlines():
            demand(b"internal error" not in line, f"internal error: {line[:300]!r}")
            json.loads(line)
        ours, theirs = socket.socketpair()
        self.loop.call_soon_threadsafe(monitor.add_connection, theirs)
        with ours:
            ours.settimeout(5)
            ours.sendall(b'{"execute":"qmp_capabilities"}{"execute":"query-status","id":"alive"}')
            got = b""
            while b'"alive"' not in got:
                part = ours.recv(1 << 16)
                demand(part, "the monitor hung up on a well-behaved client")
                got += part

    def _call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(8)

    def settle(self) -> None:
        wait_until(lambda: threading.active_count() < 40, f"threads end: {threading.enumerate()[:50]}")

    def close(self) -> None:
        self.peer.stop()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(5)


async def _monitor(machine: Machine) -> Monitor:
    return Monitor(machine.vm)


def _send_and_read(sock: socket.socket, data: bytes, replies: bytearray) -> None:
    reader_done = threading.Event()

    def read() -> None:
        try:
            while part := sock.recv(1 << 16):
                replies.extend(part)
        except OSError:
            pass
        reader_done.set()

    sock.settimeout(6)
    thread = threading.Thread(target=read)
    thread.start()
    try:
        sock.sendall(data)
        reader_done.wait(0.01)
        sock.shutdown(socket.SHUT_WR)
    except (BrokenPipeError, ConnectionError):
        pass
    thread.join(7)
    demand(not thread.is_alive(), "the monitor does not hang up")
    if replies and not replies.endswith(b"\n"):
        del replies[replies.rfind(b"\n") + 1 :]


def _value(rng: Random, depth: int) -> object:
    choice = rng.random()
    if depth and choice < 0.15:
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    if depth and choice < 0.3:
        return {rng.choice((*_WORDS, mutate.text(rng))): _value(rng, depth - 1) for _ in range(rng.randint(0, 4))}
    if choice < 0.5:
        return rng.choice((None, True, False, 1.5, -1, float("inf"), float("nan"), 1e308))
    if choice < 0.7:
        return mutate.number(rng, 64) * rng.choice((1, -1))
    return rng.choice((rng.choice(_NAMES), rng.choice(_VALUES), mutate.text(rng)))


def _odd(rng: Random) -> bytes:
    """What is hardly JSON."""
    ready = b'{"execute":"qmp_capabilities"}' if rng.random() < 0.5 else b""
    return ready + rng.choice((
        rng.randbytes(rng.randint(1, 5000)), b"[" * 100_000, b"{" * 100_000, b'{"execute":' * 2000,
        b'{"execute":"' + b"A" * rng.choice((1 << 16, (1 << 20) + 5)) + b'"}', b'{"id":' + b"9" * 5000 + b"}",
        b'{"execute":"query-status"}' * 3000, b'{"id":' + b"[" * 60 + b"]" * 60 + b"}", b"\xff\xfe{\0}\0", b"\0" * 999,
        b'{\0"\0a\0"\0:\0001\0}\0', b'{"execute":"\\ud800"}', b'{"a":1,"a":2}', b"{}" * 5000, b'{"execute":1e999}',
    ))  # fmt: skip

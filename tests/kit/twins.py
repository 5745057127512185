"""``incbak serve`` and a real qemu-storage-daemon with the same two disks, driven alike and compared."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from tests.kit.need import need
from tests.kit.qmp import Qmp, QmpFailed
from tests.kit.serve import Peer, raw_image, serving, wait_until

GRAIN = 65536
CLUSTERS = 64
SIZE = CLUSTERS * GRAIN
DRIVES = ("drive0", "drive1")
FIRST, DURING = (0, 5, 20, 63), (5, 8, 21)
"""Clusters that are dirty before the backup, and those written while it is pending."""


@dataclass
class Engine:
    """One of the two."""

    name: str
    directory: Path
    qmp: Qmp
    guest: NbdClient
    peers: dict[str, Peer] = field(default_factory=dict)

    def target(self, node: str, faults: Faults | None = None, size: int = SIZE) -> Peer:
        """A target ``node``, or a new one in place of it."""
        if node in self.peers:
            self.qmp("blockdev-del", node_name=node)
            self.peers.pop(node).stop()
        disk = MemoryDisk(size, name=node)
        peer = Peer(self.directory / f"{node}.sock", FaultyDisk(disk, faults) if faults else disk)
        self.qmp("blockdev-add", **{k.replace("-", "_"): v for k, v in peer.blockdev(node).items()})
        self.peers[node] = peer
        return peer

    def ask(self, command: str, **arguments: Any) -> Any:
        """The reply, or the error as ``class: text``."""
        try:
            return self.qmp(command, **arguments)
        except QmpFailed as e:
            return str(e)

    def resize(self, size: int) -> Any:
        """Another size for ``drive0``; QEMU does so only while nobody can see it over NBD."""
        export = {"type": "nbd", "id": "drive0", "node_name": "drive0", "name": "drive0", "writable": True}
        self.guest.close()
        if self.name == "qemu":
            self.qmp("block-export-del", id="drive0", mode="hard")
            wait_until(lambda: all(e["id"] != "drive0" for e in self.qmp("query-block-exports")), "it is gone")
        reply = self.ask("block_resize", node_name="drive0", size=size)
        if self.name == "qemu":
            self.qmp("block-export-add", **export)
        self.guest = self.connect("drive0")
        return reply

    def backup(self, **arguments: Any) -> Any:
        """``blockdev-backup``; QEMU with one worker, so that it copies in order as we do."""
        if self.name == "qemu":
            arguments["x_perf"] = {"max-workers": 1}
        return self.ask("blockdev-backup", **{"device": "drive0", "target": "t0", "job_id": "j", **arguments})

    def write(self, clusters: tuple[int, ...], byte: int) -> None:
        for cluster in clusters:
            self.guest.write(bytes([byte]) * GRAIN, cluster * GRAIN)

    def connect(self, export: str, socket: str = "nbd.sock") -> NbdClient:
        """Another guest."""
        return NbdClient.connect(NbdUri(export, path=str(self.directory / socket)))

    def jobs(self) -> list[dict[str, Any]]:
        """``query-jobs``, without what is ours alone."""
        return [{k: v for k, v in job.items() if not k.startswith("x-")} for job in self.qmp("query-jobs")]

    def status(self) -> str:
        return str(next(iter(self.jobs()), {"status": "none"})["status"])

    def bitmap(self, drive: str = "drive0") -> dict[str, Any]:
        """What is told of bitmap ``b``."""
        node = next(n for n in self.qmp("query-named-block-nodes") if n["node-name"] == drive)
        found = next(b for b in node["dirty-bitmaps"] if b.get("name") == "b")
        told = ("name", "count", "granularity", "recording", "busy", "persistent", "inconsistent")
        return {key: found[key] for key in told if key in found}

    def digest(self, drive: str = "drive0") -> str:
        return str(self.qmp("x-debug-block-dirty-bitmap-sha256", node=drive, name="b")["sha256"])

    def clear(self) -> None:
        """No job, and an empty bitmap ``b`` on each drive."""
        for drive in DRIVES:
            with suppress(QmpFailed):
                self.qmp("block-dirty-bitmap-remove", node=drive, name="b")
            self.qmp("block-dirty-bitmap-add", node=drive, name="b", granularity=GRAIN)
        self.qmp.events.clear()

    def events(self) -> list[tuple[str, dict[str, Any]]]:
        """The events on jobs so far, in order, without their times.

        QEMU's job is paused once as it begins, by the drain in which its filter is put in; ours needs none.
        """
        self.qmp("query-version")
        taken, self.qmp.events = self.qmp.events, []
        found = [(e["event"], e["data"]) for e in taken if "JOB" in e["event"]]
        if self.name == "qemu" and [d.get("status") for _, d in found[1:4]] == ["running", "paused", "running"]:
            del found[2:4]
        return found


@contextmanager
def ours(directory: Path) -> Iterator[Engine]:
    images = {name: raw_image(directory / f"{name}.raw", SIZE) for name in DRIVES}
    with serving(directory, images) as serve:
        with Qmp(serve.monitor) as qmp:
            yield Engine("incbak", directory, qmp, serve.connect("drive0"))


@contextmanager
def theirs(directory: Path) -> Iterator[Engine]:
    need("qemu-storage-daemon")
    monitor, nbd = directory / "qmp.sock", directory / "nbd.sock"
    command = ["qemu-storage-daemon"]
    for name in DRIVES:
        image = raw_image(directory / f"{name}.raw", SIZE)
        command += ["--blockdev", f"driver=file,node-name=file-{name},filename={image}"]
        command += ["--blockdev", f"driver=raw,node-name={name},file=file-{name}"]
    command += ["--chardev", f"socket,id=c,path={monitor},server=on,wait=off", "--monitor", "chardev=c"]
    command += ["--nbd-server", f"addr.type=unix,addr.path={nbd}"]
    for name in DRIVES:
        command += ["--export", f"type=nbd,id={name},node-name={name},name={name},writable=on"]
    process = subprocess.Popen(command)
    try:
        with Qmp(monitor) as qmp:
            wait_until(nbd.exists, "the export")
            yield Engine("qemu", directory, qmp, NbdClient.connect(NbdUri("drive0", path=str(nbd))))
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def both(ours_in: Path, theirs_in: Path) -> Iterator[tuple[Engine, Engine]]:
    """The two, with their targets stopped in the end."""
    with ours(ours_in) as a, theirs(theirs_in) as b:
        yield a, b
        for engine in (a, b):
            engine.guest.close()
            for peer in engine.peers.values():
                peer.stop()


def alike(engines: tuple[Engine, Engine], act: Callable[[Engine], Any]) -> Any:
    """What ``act`` gives on both, which has to be the same."""
    found = [act(engine) for engine in engines]
    ours, theirs = found
    if isinstance(ours, list) and isinstance(theirs, list):
        for number, (our, their) in enumerate(zip(ours, theirs, strict=False)):
            assert our == their, f"[{number}]: {our!r} is not QEMU's {their!r}"
    assert ours == theirs, f"{ours!r} is not QEMU's {theirs!r}"
    return ours

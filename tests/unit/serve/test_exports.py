"""Exports that a monitor adds: who may come in, and when one that is removed is gone."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdError, NbdRequestError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.serve.schema import QmpError
from tests.kit.serve import Machine, raw_image, serving, wait_until

GRAIN = 65536
SIZE = 16 * GRAIN


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture
def machine(tmp_path: Path, faults: Faults) -> Iterator[Machine]:
    """A disk with a bitmap that is switched off, and a server for exports."""
    with Machine(tmp_path, {"vda": FaultyDisk(MemoryDisk(SIZE), faults)}) as made:
        made("block-dirty-bitmap-add", node="vda", name="b", disabled=True)
        start(made)
        yield made
        made.vm.exports.stop(5)


def start(machine: Machine, **more: Any) -> None:
    path = str(machine.directory / "added.sock")
    machine("nbd-server-start", addr={"type": "unix", "data": {"path": path}}, **more)


def add(machine: Machine, **more: Any) -> None:
    machine("block-export-add", **{"type": "nbd", "id": "e", "node_name": "vda", "name": "x", **more})


def client(machine: Machine, export: str = "x") -> NbdClient:
    return NbdClient.connect(NbdUri(export, path=str(machine.directory / "added.sock")), timeout=10)


def deleted(machine: Machine) -> list[object]:
    return [data["id"] for event, data in list(machine.events) if event == "BLOCK_EXPORT_DELETED"]


def test_it_is_gone_when_the_last_write_is(machine: Machine, faults: Faults) -> None:
    """Only then is it told, and the bitmap free: nothing of that export can change the disk any more."""
    add(machine, writable=True, bitmaps=["b"])
    faults.stall["write"] = threading.Event()
    guest = client(machine)
    guest.submit_write(memoryview(b"late"), 3 * GRAIN)
    wait_until(lambda: faults.seen.get("write"), "the write is under way")
    machine("block-export-del", id="e", mode="hard")
    assert [e["shutting-down"] for e in machine("query-block-exports")] == [True]
    assert machine.bitmap("vda", "b")["busy"]
    with pytest.raises(QmpError, match="Export 'e' is already shutting down"):
        machine("block-export-del", id="e", mode="hard")
    with pytest.raises(QmpError, match="Block export id 'e' is already in use"):
        add(machine)
    with pytest.raises(NbdError):
        client(machine)
    assert deleted(machine) == []
    faults.stall.pop("write").set()
    wait_until(lambda: deleted(machine) == ["e"], "it is gone")
    assert machine("query-block-exports") == []
    assert not machine.bitmap("vda", "b")["busy"]
    assert machine.disks["vda"].read(3 * GRAIN, 4) == b"late"
    guest.close()


def test_who_was_about_to_come_in_does_not(machine: Machine) -> None:
    """A client that has negotiated an export which is removed before it is opened."""
    add(machine)
    (export,) = machine.vm.exports.all()
    machine("block-export-del", id="e")
    with pytest.raises(OSError, match="being removed"):
        export.open()
    assert deleted(machine) == ["e"]


def test_a_read_only_export_of_a_disk_that_is_not(machine: Machine) -> None:
    add(machine)
    with closing(client(machine)) as guest:
        with pytest.raises(NbdRequestError):
            guest.write(b"x", 0)
        assert guest.read(0, 1) == b"\0"
    machine.guest["vda"].write(memoryview(b"x"), 0)


def test_a_read_only_disk(tmp_path: Path) -> None:
    with Machine(tmp_path, {"vda": MemoryDisk(SIZE, read_only=True)}) as machine:
        start(machine)
        with pytest.raises(QmpError, match="Cannot export read-only node as writable"):
            add(machine, writable=True)
        machine("nbd-server-add", device="vda", writable=True)
        with closing(client(machine, "vda")) as guest, pytest.raises(NbdRequestError):
            guest.write(b"x", 0)
        machine("nbd-server-stop")
        assert deleted(machine) == ["vda"]


def test_a_bitmap_on_offer_keeps_the_size(machine: Machine) -> None:
    add(machine, bitmaps=["b"])
    with pytest.raises(QmpError, match="Bitmap 'b' is currently in use by another operation"):
        machine("block_resize", device="vda", size=2 * SIZE)
    machine("block-export-del", id="e")
    add(machine)
    with closing(client(machine)) as guest:
        machine("block_resize", device="vda", size=2 * SIZE)
        assert guest.size == SIZE
    with closing(client(machine)) as guest:
        assert guest.size == 2 * SIZE


def test_what_we_lack_is_named(machine: Machine) -> None:
    with pytest.raises(QmpError, match="Parameter 'writethrough' does not support 'true'"):
        add(machine, writethrough=True)
    with pytest.raises(QmpError, match="Parameter 'iothread' is unexpected"):
        add(machine, iothread="i")
    with pytest.raises(QmpError, match=r"Parameter 'addr\.data\.port' expects a number"):
        machine("nbd-server-stop")
        machine("nbd-server-start", addr={"type": "inet", "data": {"host": "127.0.0.1", "port": "nbd"}})


def test_on_tcp_with_one_client(machine: Machine) -> None:
    machine("nbd-server-stop")
    address = {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}
    machine("nbd-server-start", addr=address, max_connections=1)
    add(machine)
    server = machine.vm.exports._server
    assert server is not None
    uri = NbdUri("x", host="127.0.0.1", port=server._listeners[0].getsockname()[1])
    with closing(NbdClient.connect(uri, timeout=10)) as guest:
        assert len(guest.read(0, 512)) == 512  # before, it may still be negotiating, and give way
        with pytest.raises(NbdError):
            NbdClient.connect(uri, timeout=10)


def test_a_clean_end_with_clients(tmp_path: Path) -> None:
    """SIGTERM: what was added goes too, its writes are in the bitmap, its socket is gone."""
    image = raw_image(tmp_path / "a.raw", SIZE)
    path = tmp_path / "added.sock"
    with serving(tmp_path, {"vda": image}) as serve:
        with closing(serve.qmp()) as qmp:
            qmp("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
            qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}})
            qmp("block-export-add", type="nbd", id="e", node_name="vda", writable=True)
            guest = NbdClient.connect(NbdUri("vda", path=str(path)))
            guest.write(b"x", 5 * GRAIN)
        assert path.stat().st_mode & 0o777 == 0o600
        assert serve.stop(signal.SIGTERM) == 0
        assert not path.exists()
        guest.close()
    with serving(tmp_path, {"vda": image}) as serve, closing(serve.qmp()) as qmp:
        told = qmp.bitmaps("vda")["b"]
        assert (told["x-incbak-found"], told["count"]) == ("clean", GRAIN)

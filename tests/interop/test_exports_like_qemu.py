"""NBD exports that a monitor adds and removes, on ``incbak serve`` and on QEMU: replies, events, what clients see.

QEMU has one NBD server; the one that `tests.kit.twins` begins with is stopped here first, so both have none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest

from incbak.errors import NbdError, NbdRequestError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from tests.kit.serve import wait_until
from tests.kit.twins import DRIVES, GRAIN, Engine, alike, both

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    with both(tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")) as found:
        for engine in found:
            engine.clear()
            engine.write((0, 3), 0x11)
            for name, enabled in (("on", True), ("off", False)):
                engine.qmp("block-dirty-bitmap-add", node="drive0", name=name, disabled=not enabled)
            engine.qmp("block-dirty-bitmap-merge", node="drive0", target="off", bitmaps=["b"])
            if engine.name == "qemu":
                engine.guest.close()
                engine.qmp("nbd-server-stop")
                engine.qmp.wait_event("BLOCK_EXPORT_DELETED")
                engine.qmp.wait_event("BLOCK_EXPORT_DELETED")
        yield found


def address(engine: Engine) -> dict[str, Any]:
    return {"type": "unix", "data": {"path": str(engine.directory / "added.sock")}}


def start(engine: Engine) -> Any:
    """The server; it was stopped, so all that was told of its exports is there."""
    engine.qmp.events.clear()
    return engine.ask("nbd-server-start", addr=address(engine))


def add(engine: Engine, ident: str = "e", **more: Any) -> Any:
    return engine.ask("block-export-add", **{"type": "nbd", "id": ident, "node_name": "drive0", **more})


def exports(engine: Engine) -> list[Any]:
    return sorted((sorted(e.items()) for e in engine.qmp("query-block-exports")), key=str)


def client(engine: Engine, export: str, *contexts: str) -> NbdClient:
    return NbdClient.connect(NbdUri(export, path=str(engine.directory / "added.sock")), contexts=contexts)


def deleted(engine: Engine, count: int) -> list[str]:
    """The ids of so many deleted exports, waited for."""
    found = [str(engine.qmp.wait_event("BLOCK_EXPORT_DELETED")["data"]["id"]) for _ in range(count)]
    return sorted(found)


def test_nothing_works_without_a_server(engines: tuple[Engine, Engine]) -> None:
    def run(engine: Engine) -> list[Any]:
        told = [add(engine), add(engine, node_name="nothing"), add(engine, "1")]
        told += [engine.ask("nbd-server-add", device="drive0"), engine.ask("nbd-server-add", device="nothing")]
        told += [engine.ask("block-export-del", id="e"), engine.ask("nbd-server-remove", name="e")]
        told += [engine.ask("nbd-server-stop"), exports(engine)]
        nowhere = {"type": "unix", "data": {"path": "/nonexistent/sock"}}
        return [*told, engine.ask("nbd-server-start", addr=nowhere), engine.ask("nbd-server-start")]

    alike(engines, run)


def test_the_life_of_exports(engines: tuple[Engine, Engine]) -> None:
    def run(engine: Engine) -> list[Any]:
        told = [start(engine), start(engine)]
        told += [add(engine, name="x", description="some"), add(engine), add(engine, "f", name="x")]
        told += [engine.ask("nbd-server-add", device="drive0", writable=True)]
        told += [engine.ask("nbd-server-add", device="drive0"), engine.ask("nbd-server-add", device="nothing")]
        told += [exports(engine), engine.ask("block-export-del", id="nothing")]
        told += [engine.ask("block-export-del", id="e"), deleted(engine, 1), exports(engine)]
        told += [engine.ask("nbd-server-remove", name="drive0"), deleted(engine, 1), exports(engine)]
        told += [add(engine, ident) for ident in ("h",)]
        told += [add(engine, "i", name="i", node_name="drive1")]
        told += [engine.ask("nbd-server-stop"), deleted(engine, 2), exports(engine)]
        return [*told, engine.ask("nbd-server-stop"), start(engine), engine.ask("nbd-server-stop")]

    alike(engines, run)


def test_what_is_refused(engines: tuple[Engine, Engine]) -> None:
    def run(engine: Engine) -> list[Any]:
        told = [start(engine)]
        asked: list[dict[str, Any]] = [
            {"ident": "1e"},
            {"ident": ""},
            {"type": "ftp"},
            {"node_name": "nothing"},
            {"name": "n" * 5000},
            {"description": "n" * 5000},
            {"bitmaps": ["nothing"]},
            {"bitmaps": ["on"]},
            {"bitmaps": [{"node": "drive0", "name": "nothing"}]},
            {"bitmaps": [{"node": "nothing", "name": "off"}]},
            {"bitmaps": "off"},
            {"unknown": 1},
        ]
        told += [add(engine, **arguments) for arguments in asked]
        told += [engine.ask("block-export-add", type="nbd", id="e"), engine.ask("block-export-add", id="e")]
        told += [engine.ask("nbd-server-add", device="drive0", bitmap="nothing")]
        told += [engine.ask("nbd-server-add", device="drive0", bitmap="on")]
        told += [engine.ask("nbd-server-remove", name="drive0", mode="soft")]
        return [*told, exports(engine), engine.ask("nbd-server-stop")]

    alike(engines, run)


@pytest.mark.parametrize("writable", [False, True])
def test_what_clients_may_do(engines: tuple[Engine, Engine], writable: bool) -> None:
    """A write through an added export is recorded as any."""

    def run(engine: Engine) -> list[Any]:
        told: list[Any] = [start(engine), add(engine, name="x", writable=writable)]
        before = engine.digest()
        with closing(client(engine, "x")) as guest:
            told += [guest.size, guest.read(0, 10)]
            try:
                guest.write(b"new", 9 * GRAIN)
                told.append(guest.read(9 * GRAIN, 3))
            except NbdRequestError:
                told.append("refused")
        told.append(engine.digest() != before)
        with pytest.raises(NbdError):
            client(engine, "drive0")
        return [*told, engine.ask("nbd-server-stop")]

    told = alike(engines, run)
    assert told[-3:-1] == ([b"new", True] if writable else ["refused", False])


def test_bitmaps_on_offer_are_in_use(engines: tuple[Engine, Engine]) -> None:
    def run(engine: Engine) -> list[Any]:
        told: list[Any] = [start(engine), add(engine, name="x", bitmaps=["off"])]
        told.append(add(engine, "f", name="y", bitmaps=["off"]))
        for verb in ("remove", "clear", "enable"):
            told.append(engine.ask(f"block-dirty-bitmap-{verb}", node="drive0", name="off"))
        with closing(client(engine, "x", "qemu:dirty-bitmap:off")) as guest:
            found = [(o, n) for o, n, flags in guest.extents("qemu:dirty-bitmap:off") if flags]
        told += [found, engine.ask("block-export-del", id="e", mode="hard"), deleted(engine, 1)]
        told.append(engine.ask("block-dirty-bitmap-enable", node="drive0", name="off"))
        told.append(engine.ask("block-dirty-bitmap-disable", node="drive0", name="off"))
        return [*told, engine.ask("nbd-server-stop")]

    told = alike(engines, run)
    assert told[6] == [(0, GRAIN), (3 * GRAIN, GRAIN)]


def test_safe_and_hard(engines: tuple[Engine, Engine]) -> None:
    """With a client in, ``safe`` is refused and changes nothing; ``hard`` cuts the client off, and only then tells."""

    def run(engine: Engine) -> list[Any]:
        told: list[Any] = [start(engine), add(engine, name="x"), add(engine, "f", name="y")]
        guest, other = client(engine, "x"), client(engine, "y")
        told += [engine.ask("block-export-del", id="e"), engine.ask("block-export-del", id="e", mode="safe")]
        told += [guest.read(0, 3), engine.ask("block-export-del", id="e", mode="hard"), deleted(engine, 1)]
        with pytest.raises(NbdError):
            guest.read(0, 3)
        told += [other.read(0, 3), exports(engine), engine.ask("nbd-server-stop"), deleted(engine, 1)]
        with pytest.raises(NbdError):
            other.read(0, 3)
        for each in (guest, other):
            each.close()
        return told

    alike(engines, run)


def test_our_own_exports_are_not_touched(engines: tuple[Engine, Engine]) -> None:
    """What ``incbak serve`` serves by itself goes on, whatever a monitor adds and stops."""
    ours = engines[0]
    start(ours)
    add(ours, "drive0", name="drive0")
    ours.qmp("nbd-server-stop")
    for drive in DRIVES:
        with closing(ours.connect(drive)) as guest:
            guest.read(0, 10)
    wait_until(lambda: ours.guest.read(0, 1), "the guest that was there goes on")

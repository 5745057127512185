"""Bits on their way to QEMU."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, cast

import pytest

from incbak.engine.session import Session
from incbak.errors import EngineError
from incbak.watch.transfer import Place, PrivateServer
from tests.unit.watch.fake import CLUSTER, NAME, SIZE, bits_of


class Nodes:
    """Only the node that the bits go to, of which QEMU says that ``count`` bytes are dirty."""

    def __init__(self, count: int) -> None:
        self.count, self.done = count, list[str]()

    async def execute(self, command: str, _arguments: Any = None) -> Any:
        self.done.append(command)
        return [{"node-name": "incbak-watch-null", "dirty-bitmaps": [{"name": "b0", "count": self.count}]}]

    async def try_execute(self, command: str, arguments: Any = None) -> bool:
        return bool(await self.execute(command, arguments))


@pytest.mark.parametrize("lost", [0, 1])
def test_bits_that_did_not_come_to_qemu_are_missed(lost: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens on the connection, a bitmap that lacks a bit is given to nobody, and nothing stays behind."""
    monkeypatch.setattr(PrivateServer, "_write", lambda *_: None)
    nodes = Nodes((2 - lost) * CLUSTER)
    server, given = PrivateServer(cast(Session, nodes), Path("/nonexistent")), list[Any]()

    async def fill() -> None:
        async with server.filled(Place("vda", NAME, CLUSTER, SIZE), bits_of({3, 4})) as source:
            given.append(source)

    if lost:
        with pytest.raises(EngineError, match="did not come to QEMU whole"):
            asyncio.run(fill())
    else:
        asyncio.run(fill())
    assert given == ([] if lost else [{"node": "incbak-watch-null", "name": "b0"}])
    assert nodes.done[-1] == "blockdev-del"

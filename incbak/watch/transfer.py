"""Bits into QEMU's bitmaps and out of them, over an NBD server in QEMU that nobody else can reach.

The disk itself is never exported: its bitmaps are merged with those of a ``null-co`` node of the same size, which is.
So whatever happens to the connection cannot harm the guest's disk. The server listens on a socket of ours, passed by
descriptor. A node of a name of its own stands as long as the server does, so that a server that a dead watch has left
can be told from somebody else's, which is never touched.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from incbak.bitmap import bits as kernels
from incbak.engine.session import CommandFailed, Session
from incbak.errors import EngineError
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.private import PrivateDirectory

T = TypeVar("T")

PREFIX = "incbak-watch"
_MARK, _NODE, _EXPORT = f"{PREFIX}-server", f"{PREFIX}-null", f"{PREFIX}-export"
_LONGEST = 1 << 30
_WINDOW = 64
_REPLY_SECONDS = 120.0


@dataclass(frozen=True)
class Place:
    """A bitmap of a node of QEMU's, of ``size`` bytes."""

    node: str
    name: str
    granularity: int
    size: int

    @property
    def clusters(self) -> int:
        """How many bits it has."""
        return -(-self.size // self.granularity)

    def named(self) -> dict[str, str]:
        """As arguments of QMP commands."""
        return {"node": self.node, "name": self.name}


class PrivateServer:
    """QEMU's NBD server, while it is ours. Made by `private_server`."""

    def __init__(self, session: Session, path: Path) -> None:
        self._session, self._path = session, path

    async def read(self, places: Sequence[Place]) -> list[kernels.Bits]:
        """The bits of bitmaps of one node, in order; the VM is paused. Raises `EngineError` or `NbdError`."""
        async with self._null(places[0].size):
            for number, place in enumerate(places):
                await self._twin(number, place, disabled=True)
                merge = {"node": _NODE, "target": f"b{number}", "bitmaps": [place.named()]}
                await self._session.execute("block-dirty-bitmap-merge", merge)
            names = [f"b{number}" for number in range(len(places))]
            async with self._exported(writable=False, bitmaps=names):
                return await asyncio.to_thread(self._talk, lambda: self._read(places))

    def _read(self, places: Sequence[Place]) -> list[kernels.Bits]:
        contexts = [f"qemu:dirty-bitmap:b{number}" for number in range(len(places))]
        client = self._connect(places[0].size, contexts)
        try:
            return [_bits_of(client, context, place) for context, place in zip(contexts, places, strict=True)]
        finally:
            client.close()

    @asynccontextmanager
    async def filled(self, place: Place, bits: kernels.Bits) -> AsyncIterator[dict[str, str]]:
        """Within, a bitmap of QEMU's on a node of ours has just these bits. Its node and name are given."""
        async with self._null(place.size):
            await self._twin(0, place, disabled=False)
            async with self._exported(writable=True, bitmaps=()):
                await asyncio.to_thread(self._talk, lambda: self._write(place, bits))
            found = (await bitmaps_of(self._session, _NODE))["b0"]
            if found["count"] != kernels.count(bits) * place.granularity:
                raise EngineError(f"bitmap {place.name} did not come to QEMU whole: {found['count']} bytes are dirty")
            yield {"node": _NODE, "name": "b0"}

    def _write(self, place: Place, bits: kernels.Bits) -> None:
        client = self._connect(place.size, ())
        try:
            for first, count in kernels.runs(bits, place.clusters).tolist():
                end = min((first + count) * place.granularity, place.size)
                for offset in range(first * place.granularity, end, _LONGEST):
                    client.submit_zeroes(offset, min(_LONGEST, end - offset))
            client.drain()
        finally:
            client.close()

    def _connect(self, size: int, contexts: Sequence[str]) -> NbdClient:
        uri = NbdUri(_EXPORT, path=str(self._path))
        client = NbdClient.connect(uri, contexts=contexts, window=_WINDOW)
        client.sock.settimeout(_REPLY_SECONDS)
        if client.size != size:
            client.close()
            raise EngineError(f"QEMU's export has {client.size} bytes instead of {size}")
        return client

    @staticmethod
    def _talk(what: Callable[[], T]) -> T:
        try:
            return what()
        except OSError as e:
            raise EngineError(f"QEMU's NBD server: {e}") from e

    @asynccontextmanager
    async def _null(self, size: int) -> AsyncIterator[None]:
        options = {"driver": "null-co", "node-name": _NODE, "size": size, "read-zeroes": True}
        await self._session.execute("blockdev-add", options)
        try:
            yield
        finally:
            await _remove_node(self._session, _NODE)

    async def _twin(self, number: int, place: Place, *, disabled: bool) -> None:
        add = {"node": _NODE, "name": f"b{number}", "granularity": place.granularity, "disabled": disabled}
        await self._session.execute("block-dirty-bitmap-add", add)

    @asynccontextmanager
    async def _exported(self, *, writable: bool, bitmaps: Sequence[str]) -> AsyncIterator[None]:
        add = {"type": "nbd", "id": _EXPORT, "node-name": _NODE, "name": _EXPORT, "writable": writable}
        await self._session.execute("block-export-add", {**add, "bitmaps": list(bitmaps)})
        try:
            yield
        finally:
            await self._session.try_execute("block-export-del", {"id": _EXPORT, "mode": "hard"})


def _bits_of(client: NbdClient, context: str, place: Place) -> kernels.Bits:
    bits = np.zeros(kernels.bytes_for(place.clusters), dtype=np.uint8)
    for offset, length, flags in client.extents(context):
        if flags & 1:
            kernels.set_range(bits, offset // place.granularity, (offset + length - 1) // place.granularity)
    return bits


@asynccontextmanager
async def private_server(session: Session) -> AsyncIterator[PrivateServer]:
    """Start QEMU's NBD server on a socket of ours; stop it in the end. Raises `EngineError` when it is in use."""
    with PrivateDirectory() as directory:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "nbd"))
            listener.listen(4)
            await session.pass_fd(listener.fileno(), "getfd", {"fdname": PREFIX})
        mark = {"driver": "null-co", "node-name": _MARK, "size": 512}
        await session.execute("blockdev-add", mark)
        try:
            await _start(session)
            try:
                yield PrivateServer(session, directory / "nbd")
            finally:
                await session.try_execute("nbd-server-stop")
        finally:
            await session.try_execute("blockdev-del", {"node-name": _MARK})


async def _start(session: Session) -> None:
    try:
        await session.execute("nbd-server-start", {"addr": {"type": "fd", "data": {"str": PREFIX}}})
    except CommandFailed as e:
        await session.try_execute("closefd", {"fdname": PREFIX})
        hint = "QEMU has one NBD server; whoever started it must stop it before the VM ends, or starts."
        raise EngineError(f"QEMU's NBD server cannot be used: {e.description}", hint=hint) from e


async def _remove_node(session: Session, node: str) -> None:
    for _ in range(100):  # an export that was deleted goes when its connections have gone
        if await session.try_execute("blockdev-del", {"node-name": node}):
            return
        await asyncio.sleep(0.02)


async def remove_leftovers(session: Session) -> None:
    """What a dead watch has left in QEMU goes."""
    nodes = await session.execute("query-named-block-nodes", {"flat": True})
    names = [str(n["node-name"]) for n in nodes if str(n["node-name"]).startswith(PREFIX + "-")]
    if _MARK in names:
        exports = [str(e["id"]) for e in await session.execute("query-block-exports")]
        if _EXPORT in exports:
            await session.try_execute("block-export-del", {"id": _EXPORT, "mode": "hard"})
        if not [e for e in exports if e != _EXPORT]:
            await session.try_execute("nbd-server-stop")
    for name in sorted(names, key=lambda n: n == _MARK):
        await _remove_node(session, name)
    for node in nodes:
        if any(b.get("name") == PREFIX for b in node.get("dirty-bitmaps", ())):
            await session.try_execute("block-dirty-bitmap-remove", {"node": node["node-name"], "name": PREFIX})


async def bitmaps_of(session: Session, node: str) -> dict[str, Mapping[str, Any]]:
    """The bitmaps of a node, by name, as QEMU describes them."""
    nodes = await session.execute("query-named-block-nodes", {"flat": True})
    found: Mapping[str, Any] = next((n for n in nodes if n["node-name"] == node), {})
    return {str(b["name"]): b for b in found.get("dirty-bitmaps", ()) if b.get("name")}

"""The client with extended headers, and without them where the server has none."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import closing

import pytest

from incbak.errors import NbdProtocolError, NbdRequestError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.protocol import Dialect
from tests.kit.huge import HUGE, HugeDisk
from tests.unit.nbd.peers import DIRTY, PATIENCE, SIZE, DiskExport, Raw, hostile, served
from tests.unit.nbd.test_client import FLAGS, chunk, negotiate

CONTEXTS = [(4, p.ALLOCATION), (9, DIRTY)]


def connect(sock: socket.socket, **more: object) -> NbdClient:
    return NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION, DIRTY], timeout=PATIENCE, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("dialect", Dialect)
def test_what_the_server_has_is_what_is_spoken(dialect: Dialect) -> None:
    """Asked for the best, it falls back."""

    def script(raw: Raw) -> None:
        has = {"structured": dialect is Dialect.STRUCTURED, "extended": dialect is Dialect.EXTENDED}
        negotiate(raw, contexts=CONTEXTS, size=HUGE, **has)
        assert raw.recv(4) == p.U32.pack(p.EXT_REQUEST_MAGIC if dialect is Dialect.EXTENDED else p.REQUEST_MAGIC)

    with hostile(script) as sock:
        client = connect(sock)
        assert client.dialect is dialect
        assert len(client.contexts) == (2 if dialect else 0)
        client.submit_zeroes(0, 1 << 20)
        client.close()


def test_extended_headers_without_go() -> None:
    """The protocol has no such server: nobody may fall back to a way in that they rule out."""

    def script(raw: Raw) -> None:
        raw.send(p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(3))
        raw.recv(4 + 16)
        raw.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_EXTENDED, p.REP_ACK, 0))
        raw.recv(16 + 4 + 4 + 4)
        raw.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_GO, p.ERR_UNSUP, 0))
        raw.recv(1)

    with hostile(script) as sock, pytest.raises(NbdProtocolError, match="refuses export 'disk'"):
        NbdClient.connect(sock, "disk", timeout=PATIENCE)


def test_lengths_of_64_bits() -> None:
    export = DiskExport(HugeDisk())
    with served(export) as (_server, new), closing(connect(new().sock)) as client:
        client.write_zeroes(1, HUGE - 1)
        client.trim(0, HUGE)
        assert list(client.extents(p.ALLOCATION)) == [(0, HUGE, 3)]
        with pytest.raises(NbdRequestError, match="past the end"):
            client.trim(1, HUGE)
    assert export.calls == [("zero", 1, HUGE - 1, True, False), ("trim", 0, HUGE)]


def test_longer_than_32_bits_can_tell_is_not_sent() -> None:
    export = DiskExport(HugeDisk(size=8 << 30))
    with served(export) as (_server, new), closing(connect(new().sock, dialect=Dialect.STRUCTURED)) as client:
        assert client.longest == 0xFFFFFFFF
        with pytest.raises(NbdRequestError, match="more than the server can be told"):
            client.trim(0, 1 << 32)
        client.trim(0, client.longest)
        found = list(client.extents(p.ALLOCATION))
        assert sum(length for _offset, length, _flags in found) == 8 << 30
        assert len(found) > 1
    assert export.calls == [("trim", 0, 0xFFFFFFFF)]


def _asked(raw: Raw) -> tuple[int, int, bytes]:
    """(flags, cookie, payload) of a block status."""
    magic, flags, command, cookie, offset, length = p.EXT_REQUEST.unpack(raw.recv(32))
    assert (magic, command, offset) == (p.EXT_REQUEST_MAGIC, p.STATUS, 0)
    return flags, cookie, raw.recv(length) if flags & p.CMD_PAYLOAD else p.U64.pack(length)


@pytest.mark.parametrize("chooses", [True, False])
def test_one_of_several_contexts_is_asked_for(chooses: bool) -> None:
    """Where the server can choose; where not, the others come too, and are passed over."""

    def script(raw: Raw) -> None:
        negotiate(raw, extended=True, contexts=CONTEXTS, flags=FLAGS | (p.STATUS_PAYLOAD if chooses else 0))
        flags, cookie, payload = _asked(raw)
        assert payload == p.U64.pack(1000) + (p.U32.pack(9) if chooses else b"")
        assert bool(flags & p.CMD_PAYLOAD) == chooses
        if not chooses:
            raw.send(ext_chunk(cookie, p.CHUNK_EXT_STATUS, ext_extents(4, (1000, 3)), done=False))
        raw.send(ext_chunk(cookie, p.CHUNK_EXT_STATUS, ext_extents(9, (10, 1), (1 << 50, 0))))

    with hostile(script) as sock:
        assert connect(sock).block_status(0, 1000, DIRTY) == [(10, 1), (990, 0)]


# -- servers that lie --------------------------------------------------------------------------------------------------


def ext_chunk(
    cookie: int, kind: int, body: bytes, *, done: bool = True, offset: int = 0, length: int | None = None
) -> bytes:
    said = len(body) if length is None else length
    return p.EXT_CHUNK.pack(p.EXT_CHUNK_MAGIC, int(done), kind, cookie, offset, said) + body


def ext_extents(context: int, *extents: tuple[int, int], count: int | None = None) -> bytes:
    head = p.U32.pack(context) + p.U32.pack(len(extents) if count is None else count)
    return head + b"".join(p.EXT_EXTENT.pack(*e) for e in extents)


GOOD = ext_extents(9, (1000, 0))
# The client asks for the status of 1000 bytes at 0, of context 9.
STATUSES: dict[str, Callable[[int], bytes]] = {
    "a simple reply": lambda c: p.SIMPLE.pack(p.SIMPLE_MAGIC, 5, c) + bytes(16),
    "a structured reply": lambda c: chunk(c, p.CHUNK_STATUS, p.U32.pack(9) + p.EXTENT.pack(1000, 0)),
    "another offset": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD, offset=1),
    "extents of 32 bits": lambda c: ext_chunk(c, p.CHUNK_STATUS, p.U32.pack(9) + p.EXTENT.pack(1000, 0)),
    "a request that was not sent": lambda c: ext_chunk(c + 1, p.CHUNK_EXT_STATUS, GOOD),
    "a context that was not asked for": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, ext_extents(4, (1000, 0))),
    "a context twice": lambda c: (
        ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD, done=False) + ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD)
    ),
    "no extents": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, ext_extents(9)),
    "no chunk": lambda c: ext_chunk(c, p.CHUNK_NONE, b""),
    "a wrong count": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, ext_extents(9, (1000, 0), count=2)),
    "half an extent": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD[:-8]),
    "no count": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD[:6]),
    "an empty extent": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, ext_extents(9, (0, 0))),
    "more than was asked": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, ext_extents(9, (1000, 0), (1, 0))),
    "flags that there are not": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, ext_extents(9, (1000, 1 << 32))),
    "17 MiB of extents": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD, length=17 << 20),
    "endless extents": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD, length=1 << 63),
    "data": lambda c: ext_chunk(c, p.CHUNK_DATA, p.U64.pack(0) + bytes(1000)),
}


@pytest.mark.parametrize("answer", STATUSES.values(), ids=STATUSES.keys())
def test_a_block_status_that_cannot_be(answer: Callable[[int], bytes]) -> None:
    """Extents must tile the disk, or a bitmap read over NBD would lose writes."""

    def script(raw: Raw) -> None:
        negotiate(raw, extended=True, contexts=CONTEXTS, flags=FLAGS | p.STATUS_PAYLOAD)
        raw.send(answer(_asked(raw)[1]))

    with hostile(script) as sock:
        client = connect(sock)
        sock.settimeout(PATIENCE)
        with pytest.raises(NbdProtocolError):
            client.block_status(0, 1000, DIRTY)


READS: dict[str, Callable[[int], bytes]] = {
    "another offset": lambda c: ext_chunk(c, p.CHUNK_DATA, p.U64.pack(1000) + bytes(100), offset=0),
    "outside": lambda c: ext_chunk(c, p.CHUNK_DATA, p.U64.pack(999) + bytes(100), offset=1000),
    "too short": lambda c: ext_chunk(c, p.CHUNK_DATA, p.U64.pack(1000) + bytes(99), offset=1000),
    "endless": lambda c: ext_chunk(c, p.CHUNK_DATA, p.U64.pack(1000), offset=1000, length=(1 << 64) - 1),
    "a huge hole": lambda c: ext_chunk(c, p.CHUNK_HOLE, p.U64.pack(1000) + p.U32.pack(101), offset=1000),
    "an endless error": lambda c: ext_chunk(c, p.CHUNK_ERROR, b"", offset=1000, length=1 << 40),
    "its extents": lambda c: ext_chunk(c, p.CHUNK_EXT_STATUS, GOOD, offset=1000),
}


@pytest.mark.parametrize("answer", READS.values(), ids=READS.keys())
def test_an_answer_to_a_read_that_cannot_be(answer: Callable[[int], bytes]) -> None:
    def script(raw: Raw) -> None:
        negotiate(raw, extended=True, size=SIZE)
        cookie = p.EXT_REQUEST.unpack(raw.recv(32))[3]
        raw.send(answer(cookie))

    with hostile(script) as sock:
        client = connect(sock)
        sock.settimeout(PATIENCE)
        with pytest.raises(NbdProtocolError):
            client.read(1000, 100)

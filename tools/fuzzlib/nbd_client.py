"""The NBD client against servers that keep to no rule: soon a typed error, or an answer that can be."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from random import Random

from fuzzlib import mutate
from fuzzlib.case import FuzzTarget, demand
from incbak.errors import IncbakError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.protocol import Dialect

SIZE = 200_003
_ROOM = 100_000
CONTEXTS = (p.ALLOCATION, "qemu:dirty-bitmap:b0")


class ClientTarget(FuzzTarget):
    """A client that always asks the same; a server that says the input."""

    settle_every = 500

    def __init__(self, directory: object) -> None:
        self._threads = threading.active_count()

    def make(self, rng: Random) -> bytes:
        pieces = mutate.shuffled(rng, answers(rng))
        data = b"".join(pieces)
        if rng.random() < 0.6:
            start = rng.choice((0, 18, min(len(data), 300)))
            data = data[:start] + mutate.mutated(rng, data[start:], b"".join(answers(rng)))
        return data

    def run(self, data: bytes) -> None:
        ours, theirs = socket.socketpair()
        talker = None
        if len(data) > _ROOM:
            talker = threading.Thread(target=_say, args=(theirs, data))
            talker.start()
        else:
            _say(theirs, data)
        try:
            with suppress(IncbakError, OSError):
                _ask(ours)
        finally:
            ours.close()
            if talker:
                talker.join(5)
            theirs.close()

    def settle(self) -> None:
        demand(threading.active_count() <= self._threads, "a thread is left")


def _say(sock: socket.socket, data: bytes) -> None:
    with suppress(OSError):
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)


def _ask(sock: socket.socket) -> None:
    client = NbdClient.connect(sock, "disk", contexts=CONTEXTS, timeout=5)
    demand(0 <= client.size <= 1 << 60, "a size")
    demand(65536 <= client.max_payload <= p.MAX_PAYLOAD, "a maximum")
    steps = (
        lambda: demand(len(client.read(0, 4096)) == 4096, "a short read"),
        lambda: [_tiles(client, c) for c in CONTEXTS],
        lambda: client.write(b"x" * 600, 1),
        lambda: client.write_zeroes(0, 4096),
        lambda: client.read(100, 70000),
        lambda: client.trim(0, 512),
        client.flush,
        lambda: [e for _, e in zip(range(5000), client.extents(p.ALLOCATION), strict=False)],
    )
    for step in steps:
        try:
            step()
        except IncbakError as e:
            demand(e.message and len(e.message) < 2000, "an error without a message")
            if e.code not in ("nbd-request", "nbd-protocol"):
                raise


def _tiles(client: NbdClient, context: str) -> None:
    found = client.block_status(512, 100_000, context)
    demand(found and all(n > 0 for n, _ in found) and sum(n for n, _ in found) <= 100_000, f"no tiling: {found[:9]}")


def answers(rng: Random) -> list[bytes]:
    """What a good server says to that client, with numbers that it should not say."""
    dialect = rng.choice((*Dialect, Dialect.STRUCTURED, Dialect.EXTENDED))
    pieces = [p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(rng.choice((1, 3, 3, 3)))]
    pieces.append(_reply(p.OPT_EXTENDED, p.REP_ACK if dialect is Dialect.EXTENDED else p.ERR_UNSUP))
    if dialect is not Dialect.EXTENDED:
        pieces.append(_reply(p.OPT_STRUCTURED, p.REP_ACK if dialect else p.ERR_UNSUP))
    if dialect:
        for number, context in enumerate(CONTEXTS, 1):
            pieces.append(_reply(p.OPT_SET_META, p.REP_META, p.U32.pack(number) + context.encode()))
        pieces.append(_reply(p.OPT_SET_META, p.REP_ACK))
    chooses = dialect is Dialect.EXTENDED and rng.random() < 0.5
    size = SIZE if rng.random() < 0.85 else mutate.number(rng, 64)
    flags = (0x15FF if chooses else 0x5FF) if rng.random() < 0.9 else mutate.number(rng, 16)
    export = p.U16.pack(p.INFO_EXPORT) + p.U64.pack(size) + p.U16.pack(flags)
    maximum = p.MAX_PAYLOAD if rng.random() < 0.8 else mutate.number(rng, 32)
    blocks = p.U16.pack(p.INFO_BLOCK_SIZE) + p.U32.pack(1) + p.U32.pack(4096) + p.U32.pack(maximum)
    if rng.random() < 0.08:
        pieces += [_reply(p.OPT_GO, p.ERR_UNSUP), p.U64.pack(size) + p.U16.pack(flags) + bytes(124)]
    else:
        pieces += [_reply(p.OPT_GO, p.REP_INFO, i) for i in (export, blocks)] + [_reply(p.OPT_GO, p.REP_ACK)]
    pieces += _transmission(rng, dialect, chooses)
    return pieces


def _transmission(rng: Random, dialect: Dialect, chooses: bool) -> list[bytes]:
    asked = [("read", 0, 4096), ("status", 1, 0), ("status", 2, 0), ("done", 0, 0), ("done", 0, 0),
             ("read", 100, 65536), ("read", 65636, 4464), ("done", 0, 0), ("done", 0, 0)]  # fmt: skip
    asked = asked if dialect else [a for a in asked if a[0] != "status"]
    pieces: list[bytes] = []
    for cookie, (kind, at, length) in enumerate(asked, 1):
        # what was asked for, by offset, as replies with extended headers repeat it
        offset = {"status": 512, "done": {4: 1}.get(cookie, 0)}.get(kind, at)
        chunk = _Chunks(dialect, cookie, offset)
        if kind == "done" or rng.random() < 0.05:
            error = 0 if rng.random() < 0.9 else mutate.number(rng, 32)
            pieces.append(chunk.end(error))
        elif kind == "status":
            pieces += _status(rng, chunk, (at,) if chooses else (1, 2))
        elif dialect:
            pieces += _data(rng, chunk, at, length)
        else:
            pieces.append(p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, cookie) + bytes(length))
    return pieces


@dataclass
class _Chunks:
    """The replies to one request."""

    dialect: Dialect
    cookie: int
    offset: int

    def __call__(self, kind: int, body: bytes, *, done: bool) -> bytes:
        if self.dialect is not Dialect.EXTENDED:
            return p.CHUNK.pack(p.CHUNK_MAGIC, int(done), kind, self.cookie, len(body)) + body
        head = (p.EXT_CHUNK_MAGIC, int(done), kind, self.cookie, self.offset, len(body))
        return p.EXT_CHUNK.pack(*head) + body

    def end(self, error: int) -> bytes:
        """A reply without data."""
        if self.dialect is not Dialect.EXTENDED:
            return p.SIMPLE.pack(p.SIMPLE_MAGIC, error, self.cookie)
        body = p.U32.pack(error) + p.U16.pack(0) if error else b""
        return self(p.CHUNK_ERROR if error else p.CHUNK_NONE, body, done=True)


def _status(rng: Random, chunk: _Chunks, contexts: tuple[int, ...]) -> list[bytes]:
    count = rng.choice((1, 1, 4, 100))
    extended = chunk.dialect is Dialect.EXTENDED
    sizes = [
        100_000 // count if rng.random() < 0.9 else mutate.number(rng, 64 if extended else 32) for _ in range(count)
    ]
    pieces = []
    for number in contexts:
        if extended:
            said = count if rng.random() < 0.95 else mutate.number(rng, 32)
            flags = [mutate.number(rng, 2 if rng.random() < 0.98 else 64) for _ in sizes]
            body = b"".join(p.EXT_EXTENT.pack(n, f) for n, f in zip(sizes, flags, strict=True))
            body = p.U32.pack(number) + p.U32.pack(said) + body
        else:
            body = p.U32.pack(number) + b"".join(p.EXTENT.pack(n, mutate.number(rng, 2)) for n in sizes)
        kind = p.CHUNK_EXT_STATUS if extended == (rng.random() < 0.98) else p.CHUNK_STATUS
        pieces.append(chunk(kind, body, done=number == contexts[-1]))
    return pieces


def _data(rng: Random, chunk: _Chunks, offset: int, length: int) -> list[bytes]:
    pieces, at = [], 0
    while at < length:
        count = min(rng.choice((512, 4096, length)), length - at)
        where = offset + at if rng.random() < 0.97 else mutate.number(rng, 64)
        done = at + count == length and rng.random() < 0.9
        if rng.random() < 0.3:
            size = count if rng.random() < 0.9 else mutate.number(rng, 32)
            pieces.append(chunk(p.CHUNK_HOLE, p.U64.pack(where) + p.U32.pack(size), done=done))
        else:
            pieces.append(chunk(p.CHUNK_DATA, p.U64.pack(where) + b"d" * count, done=done))
        if rng.random() < 0.03:
            kind = rng.choice((p.CHUNK_ERROR, p.CHUNK_ERROR_OFFSET, p.CHUNK_NONE, mutate.number(rng, 16)))
            pieces.append(chunk(kind, p.U32.pack(mutate.number(rng, 32)) + p.U16.pack(0), done=False))
        at += count
        if at == length and not done:
            pieces.append(chunk(p.CHUNK_NONE, b"", done=True))
    return pieces


def _reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, kind, len(data)) + data

"""The NBD server against clients that keep to no rule. A well-behaved one is served afterwards."""

from __future__ import annotations

import select
import socket
import threading
import time
from random import Random

from fuzzlib import mutate
from fuzzlib.case import FuzzTarget, demand, wait_until
from incbak.disk.memory import MemoryDisk
from incbak.nbd import connection
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.protocol import Dialect
from incbak.nbd.server import NbdServer
from tests.unit.nbd.peers import DIRTY, DiskExport, string

SIZE = 200_003
NEVER_READ, LEAVE, IN_DRIPS = 1, 2, 3
"""How a client behaves, in the first byte of an input; others read all that comes."""
_HANDSHAKE = 0.5
_REPLIES = 64 << 20
_COMMANDS = (p.READ, p.WRITE, p.FLUSH, p.TRIM, p.CACHE, p.ZEROES, p.STATUS)
_OPTIONS = (p.OPT_ABORT, p.OPT_LIST, p.OPT_STARTTLS, p.OPT_INFO, p.OPT_GO, p.OPT_STRUCTURED, p.OPT_LIST_META,
            p.OPT_SET_META, p.OPT_EXPORT_NAME, p.OPT_EXTENDED)  # fmt: skip


class ServerTarget(FuzzTarget):
    """One server for all cases; a connection for each."""

    def __init__(self, directory: object) -> None:
        connection.SEND_TIMEOUT = 1
        self.export = DiskExport(MemoryDisk(SIZE))
        self.export.may_block = lambda offset, _length: bool(offset & 0x1000)
        other = DiskExport(MemoryDisk(0), "empty")
        self.server = NbdServer(
            lambda: {"disk": self.export, "empty": other}, max_connections=8, handshake_timeout=_HANDSHAKE
        )
        self._threads = threading.active_count()

    def make(self, rng: Random) -> bytes:
        pieces = mutate.shuffled(rng, session(rng))
        data = b"".join(pieces)
        if rng.random() < 0.6:
            start = rng.choice((0, 0, min(len(data), 80)))
            data = data[:start] + mutate.mutated(rng, data[start:], b"".join(session(rng)))
        mode = rng.choice((NEVER_READ, LEAVE, IN_DRIPS)) if rng.random() < 0.1 else 0
        return bytes([mode]) + data

    def run(self, data: bytes) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            self.server.start_connection(theirs)
            talk(ours, data[0] if data else 0, data[1:])
        wait_until(lambda: not self.server.connections(), "the connection ends")
        self.export.calls.clear()

    def settle(self) -> None:
        wait_until(lambda: threading.active_count() <= self._threads, "the server's threads end")
        demand(self.export.opened == self.export.closed, "a device was not closed")
        ours, theirs = socket.socketpair()
        self.server.start_connection(theirs)
        client = NbdClient.connect(ours, "disk", contexts=(p.ALLOCATION, DIRTY), timeout=5)
        ours.settimeout(5)
        client.write(b"well behaved", 4242)
        client.flush()
        demand(client.read(4240, 16)[2:14] == b"well behaved", "a well-behaved client got other data")
        demand(sum(n for n, _flags in client.block_status(0, SIZE, DIRTY)) == SIZE, "no whole block status")
        client.close()
        wait_until(lambda: not self.server.connections(), "the well-behaved client's connection ends")

    def close(self) -> None:
        self.server.stop(1)


def talk(sock: socket.socket, mode: int, data: bytes) -> None:
    """Send all of ``data``, read what comes, until the peer is gone; in the given manner."""
    sock.setblocking(False)
    view, read, end = memoryview(data), 0, time.monotonic() + 8
    poller = select.poll()
    try:
        while time.monotonic() < end:
            want = (select.POLLOUT if view else 0) | (0 if mode == NEVER_READ else select.POLLIN)
            poller.register(sock, want)
            events = dict(poller.poll(1500)).get(sock.fileno(), 0)
            if events & select.POLLOUT:
                sent = sock.send(view[: 7 if mode == IN_DRIPS else 1 << 20])
                view = view[sent:]
                if not view:
                    if mode == LEAVE:
                        return
                    sock.shutdown(socket.SHUT_WR)
            elif events & select.POLLIN:
                got = len(sock.recv(1 << 20))
                read += got
                demand(read < _REPLIES, "replies without end")
                if not got:
                    return
            elif events or mode == NEVER_READ:
                return
    except (ConnectionError, BlockingIOError):
        return
    demand(False, "the server neither answers nor hangs up")


def session(rng: Random) -> list[bytes]:
    """The messages of a client that keeps to the protocol, with numbers and names that it should not use."""
    pieces = [p.U32.pack(rng.choice((3, 3, 3, 1)) if rng.random() < 0.97 else mutate.number(rng, 32))]
    dialect = rng.choice((Dialect.SIMPLE, Dialect.STRUCTURED, Dialect.EXTENDED, Dialect.EXTENDED))
    if dialect:
        pieces.append(_option(p.OPT_EXTENDED if dialect is Dialect.EXTENDED else p.OPT_STRUCTURED, b""))
    for _ in range(rng.choice((0, 0, 1, 3))):
        pieces.append(_random_option(rng))
    if dialect and rng.random() < 0.8:
        pieces.append(_option(p.OPT_SET_META, string("disk") + p.U32.pack(2) + string(p.ALLOCATION) + string(DIRTY)))
    name = "disk" if rng.random() < 0.9 else rng.choice(("", "empty", "nobody"))
    go = string(name) + p.U16.pack(1) + p.U16.pack(p.INFO_BLOCK_SIZE)
    pieces.append(_option(p.OPT_EXPORT_NAME, name.encode()) if rng.random() < 0.1 else _option(p.OPT_GO, go))
    request = _ext_request if dialect is Dialect.EXTENDED else _request
    pieces += [request(rng, cookie) for cookie in range(rng.choice((1, 5, 20, 100)))]
    if rng.random() < 0.5:
        extended = p.EXT_REQUEST.pack(p.EXT_REQUEST_MAGIC, 0, p.DISC, 0, 0, 0)
        pieces.append(extended if dialect is Dialect.EXTENDED else p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.DISC, 0, 0, 0))
    return pieces


def _option(option: int, data: bytes, length: int | None = None) -> bytes:
    return p.OPTION.pack(p.OPTION_MAGIC, option, len(data) if length is None else length) + data


def _random_option(rng: Random) -> bytes:
    name = mutate.text(rng).encode(errors="surrogatepass")
    queries = [mutate.text(rng).encode(errors="surrogatepass")[:64] for _ in range(rng.choice((0, 1, 3, 70)))]
    count = len(queries) if rng.random() < 0.8 else mutate.number(rng, 32)
    body = rng.choice((
        b"", name, p.U32.pack(len(name)) + name + p.U16.pack(mutate.number(rng, 16)), string("disk") + bytes(2),
        string("disk") + p.U32.pack(count) + b"".join(p.U32.pack(len(q)) + q for q in queries),
        p.U32.pack(mutate.number(rng, 32)) + name, rng.randbytes(rng.randint(0, 99)),
    ))  # fmt: skip
    option = rng.choice(_OPTIONS) if rng.random() < 0.9 else mutate.number(rng, 32)
    return _option(option, body, None if rng.random() < 0.9 else mutate.number(rng, 32))


def _ext_request(rng: Random, cookie: int) -> bytes:
    """As `_request`, with lengths of 64 bits, and payloads where there should be none."""
    _magic, flags, command, cookie, offset, length = p.REQUEST.unpack_from(whole := _request(rng, cookie))
    payload = whole[p.REQUEST.size :]
    if command == p.STATUS and rng.random() < 0.6:
        count = rng.choice((1, 1, 2, 3))
        contexts = [rng.choice((1, 2)) if rng.random() < 0.9 else mutate.number(rng, 32) for _ in range(count)]
        payload = p.U64.pack(length or SIZE) + b"".join(map(p.U32.pack, contexts)) + b"x" * rng.choice((0, 0, 0, 1))
    elif command != p.WRITE and rng.random() < 0.05:
        payload = rng.randbytes(rng.choice((1, 12, 5000)))
    elif command != p.WRITE and rng.random() < 0.2:
        length = mutate.number(rng, 64)
    if payload:
        flags |= p.CMD_PAYLOAD if rng.random() < 0.95 else 0
        length = len(payload) if rng.random() < 0.97 else mutate.number(rng, 64)
    return p.EXT_REQUEST.pack(p.EXT_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload


def _request(rng: Random, cookie: int) -> bytes:
    command = rng.choice(_COMMANDS) if rng.random() < 0.95 else mutate.number(rng, 16)
    sane = rng.random() < 0.8
    offset = rng.randrange(SIZE) if sane else mutate.number(rng, 64)
    length = rng.choice((0, 1, 512, 4096, 65536)) if sane else mutate.number(rng, 32)
    if sane and rng.random() < 0.8:
        offset = min(offset, max(SIZE - length, 0))
    flags = 0 if rng.random() < 0.7 else mutate.number(rng, 5 if rng.random() < 0.8 else 16)
    if command == p.FLUSH and sane:
        offset = length = 0
    payload = b""
    if command == p.WRITE:
        payload = rng.randbytes(8) * (length // 8 + 1) if length <= 65536 else rng.randbytes(64)
        payload = payload[:length]
    return p.REQUEST.pack(p.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload

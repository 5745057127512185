"""The other side of a connection, by hand: a client that may break every rule, and exports over any disk."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from incbak.disk.base import Disk
from incbak.disk.memory import MemoryDisk
from incbak.nbd import protocol as p
from incbak.nbd.export import Device
from incbak.nbd.server import NbdServer

PATIENCE = 20
SIZE = 1_000_003
DIRTY = "qemu:dirty-bitmap:b0"


class DiskExport:
    """An export over ``disk``; every fourth 64 KiB cluster is dirty. `calls` lists what changed or flushed the disk."""

    description = "a disk"
    multi_conn = True

    def __init__(self, disk: Disk | None = None, name: str = "disk") -> None:
        self.disk, self.name = disk or MemoryDisk(SIZE), name
        self.size, self.read_only = self.disk.size, self.disk.read_only
        self.calls: list[tuple[object, ...]] = []
        self.opened = self.closed = 0
        self.may_block: Callable[[int, int], bool] = lambda _offset, _length: False
        self.rest: Callable[[bool], None] = lambda _waits: None

    def contexts(self) -> list[str]:
        return [p.ALLOCATION, DIRTY]

    def open(self) -> Device:
        self.opened += 1
        return _Device(self)


class _Device:
    def __init__(self, export: DiskExport) -> None:
        self.export, self.disk = export, export.disk
        self.size, self.read_only = export.size, export.read_only
        self.read_into, self.read_nowait = self.disk.read_into, self.disk.read_nowait

    def may_block(self, offset: int, length: int) -> bool:
        return self.export.may_block(offset, length)

    def rest(self, waiting: Callable[[int], object] = lambda _milliseconds: ()) -> None:
        self.export.rest(bool(waiting(0)))

    def write(self, buf: memoryview, offset: int) -> None:
        self.export.calls.append(("write", offset, len(buf)))
        self.disk.write(buf, offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        self.export.calls.append(("zero", offset, length, unmap, fast))
        if fast:
            raise OSError(95, "not fast")
        self.disk.write_zeroes(offset, length, unmap=unmap)

    def trim(self, offset: int, length: int) -> None:
        self.export.calls.append(("trim", offset, length))
        self.disk.trim(offset, length)

    def cache(self, offset: int, length: int) -> None:
        self.export.calls.append(("cache", offset, length))

    def flush(self) -> None:
        self.export.calls.append(("flush",))
        self.disk.flush()

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        if context == p.ALLOCATION:
            return [(e.length, 3 if e.zero else 0) for e in self.disk.extents(offset, length)][:limit]
        found, end = [], offset + length
        while offset < end and len(found) < limit:
            stop = min((offset // 65536 + 1) * 65536, end)
            found.append((stop - offset, int(offset // 65536 % 4 == 0)))
            offset = stop
        return found

    def close(self) -> None:
        self.export.closed += 1


class Raw:
    """A client that sends what it is told to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock, self.extended = sock, False
        sock.settimeout(PATIENCE)

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def recv(self, count: int) -> bytes:
        """Exactly so many bytes."""
        data = b""
        while len(data) < count:
            got = self.sock.recv(count - len(data))
            if not got:
                raise ConnectionAbortedError(f"the peer hung up; {count} bytes expected, {len(data)} there")
            data += got
        return data

    def hung_up(self) -> bool:
        """Whether the server has closed, with nothing left to read."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionError:
            return True

    # -- handshake

    def greet(self, flags: int = p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES) -> Raw:
        assert self.recv(16) == p.NBD_MAGIC + p.OPTION_MAGIC
        assert p.U16.unpack(self.recv(2))[0] == p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES
        self.send(p.U32.pack(flags))
        return self

    def option(self, option: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        """All replies to an option."""
        self.send(p.OPTION.pack(p.OPTION_MAGIC, option, len(data)) + data)
        replies = []
        while True:
            magic, echoed, kind, length = p.OPTION_REPLY.unpack(self.recv(20))
            assert (magic, echoed) == (p.OPTION_REPLY_MAGIC, option)
            replies.append((kind, self.recv(length)))
            if kind == p.REP_ACK or kind & p.REP_ERROR:
                return replies

    def ask(self, option: int, data: bytes = b"") -> int:
        """The last reply to an option."""
        return self.option(option, data)[-1][0]

    def meta(self, option: int, *queries: str, name: str = "disk") -> list[tuple[int, str]]:
        """(id, context) in reply to LIST or SET META CONTEXT; an error is [(error, "")]."""
        data = string(name) + p.U32.pack(len(queries)) + b"".join(map(string, queries))
        replies = self.option(option, data)
        if replies[-1][0] != p.REP_ACK:
            return [(replies[-1][0], "")]
        return [(p.U32.unpack_from(body)[0], body[4:].decode()) for _kind, body in replies[:-1]]

    def go(self, *contexts: str, structured: bool = False, extended: bool = False, name: str = "disk") -> Raw:
        """Through the handshake."""
        self.greet()
        self.extended = extended
        if extended:
            assert self.ask(p.OPT_EXTENDED) == p.REP_ACK
        elif structured or contexts:
            assert self.ask(p.OPT_STRUCTURED) == p.REP_ACK
        if contexts:
            assert len(self.meta(p.OPT_SET_META, *contexts, name=name)) == len(contexts)
        assert self.ask(p.OPT_GO, string(name) + bytes(2)) == p.REP_ACK
        return self

    # -- transmission

    def request(
        self, command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 7, payload: bytes = b""
    ) -> None:
        if self.extended:
            flags |= p.CMD_PAYLOAD if payload else 0
            length = len(payload) or length
            self.send(p.EXT_REQUEST.pack(p.EXT_REQUEST_MAGIC, flags, command, cookie, offset, length) + payload)
        else:
            self.send(p.REQUEST.pack(p.REQUEST_MAGIC, flags, command, cookie, offset, length) + payload)

    def simple(self) -> tuple[int, int]:
        """(error, cookie) of a simple reply."""
        magic, error, cookie = p.SIMPLE.unpack(self.recv(16))
        assert magic == p.SIMPLE_MAGIC
        return error, cookie

    def ext_chunk(self, offset: int) -> tuple[int, int, int, bytes]:
        """(flags, type, cookie, body) of an extended reply to a request at ``offset``."""
        magic, flags, kind, cookie, told, length = p.EXT_CHUNK.unpack(self.recv(32))
        assert (magic, told) == (p.EXT_CHUNK_MAGIC, offset)
        return flags, kind, cookie, self.recv(length)

    def chunk(self) -> tuple[int, int, int, bytes]:
        """(flags, type, cookie, body) of a structured reply chunk."""
        magic, flags, kind, cookie, length = p.CHUNK.unpack(self.recv(20))
        assert magic == p.CHUNK_MAGIC
        return flags, kind, cookie, self.recv(length)

    def error(self, *args: int, **more: int | bytes) -> int:
        """Send a request and return the error of its simple reply."""
        self.request(*args, **more)  # type: ignore[arg-type]
        if self.extended:
            flags, kind, cookie, body = self.ext_chunk(int([*args, 0][1]))
            assert (flags, cookie) == (p.CHUNK_DONE, more.get("cookie", 7))
            assert kind == p.CHUNK_NONE or (kind, len(body)) == (p.CHUNK_ERROR, 6)
            return p.U32.unpack_from(body)[0] if body else 0
        error, cookie = self.simple()
        assert cookie == more.get("cookie", 7)
        return error

    def alive(self) -> bool:
        """Whether the next request works."""
        return self.error(p.WRITE, 0, 4, cookie=99, payload=b"next") == 0

    def close(self) -> None:
        self.sock.close()


def string(text: str) -> bytes:
    """A string as options have them."""
    return p.U32.pack(len(text.encode())) + text.encode()


@contextmanager
def served(
    *exports: DiskExport, connections: int = 100, timeout: float = 10.0, alias: Mapping[str, DiskExport] | None = None
) -> Iterator[tuple[NbdServer, Callable[[], Raw]]]:
    """A server, and a way to connect to it without a listener."""
    named = {**{e.name: e for e in exports}, **(alias or {})}
    server = NbdServer(lambda: named, max_connections=connections, handshake_timeout=timeout)
    opened: list[socket.socket] = []

    def connect() -> Raw:
        ours, theirs = socket.socketpair()
        opened.append(ours)
        server.start_connection(theirs)
        return Raw(ours)

    try:
        yield server, connect
    finally:
        for sock in opened:
            sock.close()
        server.stop(PATIENCE)
        assert server.connections() == 0


@contextmanager
def hostile(script: Callable[[Raw], None]) -> Iterator[socket.socket]:
    """A server that does what ``script`` says with its end of a connection; the other end is for the client."""
    ours, theirs = socket.socketpair()
    failures: list[AssertionError] = []

    def run() -> None:
        try:
            script(Raw(theirs))
        except (ConnectionError, TimeoutError, struct.error):
            pass
        except AssertionError as e:
            failures.append(e)
        finally:
            theirs.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield ours
    finally:
        ours.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert not failures, failures

"""A server that hangs up at a chosen byte: what QEMU's test 083 does to QEMU's client, done to ours.

The conversation is recorded once from a server that keeps its word, in each dialect; then it is played again and again,
and each time it breaks off one byte later.
"""

from __future__ import annotations

import itertools
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incbak.errors import NbdError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri

SIZE = 1 << 20
PATIENCE = 20
LENGTH = 16
COOKIE = 1
"""What our client numbers its first request with."""


def reply(option: int, kind: int, data: bytes = b"") -> bytes:
    return p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, kind, len(data)) + data


def greeting(flags: int) -> bytes:
    return p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(flags)


EXPORT = p.U64.pack(SIZE) + p.U16.pack(p.HAS_FLAGS)
INFO = reply(p.OPT_GO, p.REP_INFO, p.U16.pack(p.INFO_EXPORT) + EXPORT) + reply(p.OPT_GO, p.REP_ACK)
DATA = bytes(range(LENGTH))
CHUNK = p.CHUNK.pack(p.CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_DATA, COOKIE, LENGTH + 8) + p.U64.pack(0) + DATA
EXTENDED = p.EXT_CHUNK.pack(p.EXT_CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_DATA, COOKIE, 0, LENGTH + 8) + p.U64.pack(0) + DATA
SIMPLE = p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, COOKIE) + DATA

Part = tuple[int, bytes]
"""Bytes to receive, then bytes to send."""
DIALECTS: dict[str, list[Part]] = {
    "extended headers": [
        (0, greeting(p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)),
        (4 + 16, reply(p.OPT_EXTENDED, p.REP_ACK)),
        (16 + 4 + 4 + 4, INFO),
        (32, EXTENDED),
    ],
    "fixed newstyle": [
        (0, greeting(p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)),
        (4 + 16, reply(p.OPT_EXTENDED, p.ERR_UNSUP)),
        (16, reply(p.OPT_STRUCTURED, p.REP_ACK)),
        (16 + 4 + 4 + 4, INFO),
        (28, CHUNK),
    ],
    "fixed newstyle, by name": [
        (0, greeting(p.FLAG_FIXED_NEWSTYLE)),
        (4 + 16, reply(p.OPT_EXTENDED, p.ERR_UNSUP)),
        (16, reply(p.OPT_STRUCTURED, p.ERR_UNSUP)),
        (16 + 4 + 4 + 4, reply(p.OPT_GO, p.ERR_UNSUP)),
        (16 + 4, EXPORT + bytes(124)),
        (28, SIMPLE),
    ],
    "newstyle": [(0, greeting(0)), (4 + 16 + 4, EXPORT + bytes(124)), (28, SIMPLE)],
}
OLDSTYLE = [(0, p.NBD_MAGIC + p.U64.pack(0x00420281861253) + p.U64.pack(SIZE) + bytes(4 + 124))]


class HangUp:
    """Listens; plays ``parts`` to each client, and hangs up after ``until`` bytes, received and sent together."""

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.parts: list[Part] = []
        self.until = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                sock, _address = self.listener.accept()
            except OSError:
                return
            with sock:
                sock.settimeout(PATIENCE)
                try:
                    self._play(sock, self.until)
                except OSError:
                    pass

    def _play(self, sock: socket.socket, left: int) -> None:
        for expected, said in self.parts:
            while expected:
                got = len(sock.recv(min(expected, left) or 1)) if left else 0
                if not got:
                    self._reset(sock)
                    return
                expected, left = expected - got, left - got
            sock.sendall(said[:left])
            left -= min(left, len(said))
            if not left:
                self._reset(sock)
                return

    def _reset(self, sock: socket.socket) -> None:
        """What a killed process leaves: on TCP the client gets a reset every other time."""
        if sock.family == socket.AF_INET and self.until % 2:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


@contextmanager
def listening(family: str, directory: Path) -> Iterator[tuple[HangUp, NbdUri]]:
    if family == "tcp":
        sock = socket.create_server(("127.0.0.1", 0))
        uri = NbdUri("disk", host="127.0.0.1", port=sock.getsockname()[1])
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(str(directory / "s"))
        sock.listen()
        uri = NbdUri("disk", path=str(directory / "s"))
    with sock:
        yield HangUp(sock), uri
        sock.shutdown(socket.SHUT_RDWR)


def read(uri: NbdUri) -> bytes:
    client = NbdClient.connect(uri, timeout=PATIENCE)
    try:
        return client.read(0, LENGTH)
    finally:
        client.abort()


@pytest.mark.parametrize("family", ["unix", "tcp"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_server_that_hangs_up_at_any_byte(dialect: str, family: str, tmp_path: Path) -> None:
    """faults row 72: always an error that says so, never a hang, never data that was not sent."""
    parts = DIALECTS[dialect]
    whole = sum(expected + len(said) for expected, said in parts)
    with listening(family, tmp_path) as (server, uri):
        server.parts, server.until = parts, whole
        if family == "unix":  # a reset may overtake the last bytes
            assert read(uri) == DATA
        for server.until in range(whole):
            began = time.monotonic()
            with pytest.raises(NbdError, match=r"closed the connection|went away|cannot connect") as caught:
                read(uri)
            assert 20 < len(caught.value.message) < 300
            assert time.monotonic() - began < PATIENCE


@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_an_oldstyle_server(family: str, tmp_path: Path) -> None:
    """Whole or cut, it is not spoken to."""
    (_, said), *_ = OLDSTYLE
    with listening(family, tmp_path) as (server, uri):
        server.parts = OLDSTYLE
        for server.until in itertools.chain(range(0, 30), (len(said),)):
            with pytest.raises(NbdError, match=r"closed the connection|went away|cannot connect|not speak newstyle"):
                read(uri)

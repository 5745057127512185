"""The client: against our own server, and against servers that lie (faults row 72)."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdError, NbdProtocolError, NbdRequestError, UsageError
from incbak.nbd import client as client_module
from incbak.nbd import greeting
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri, UriTls, parse_uri
from tests.unit.nbd.peers import DIRTY, PATIENCE, SIZE, DiskExport, Raw, hostile, served

FLAGS = p.HAS_FLAGS | p.SEND_FLUSH | p.SEND_ZEROES


@pytest.fixture(params=[p.Dialect.STRUCTURED, p.Dialect.EXTENDED])
def client(export: DiskExport, request: pytest.FixtureRequest) -> Iterator[NbdClient]:
    """Connected to `export`, with both contexts, in each dialect that has any."""
    with served(export) as (_server, connect):
        made = NbdClient.connect(connect().sock, "disk", contexts=[p.ALLOCATION, DIRTY], dialect=request.param)
        assert made.dialect is request.param
        yield made
        made.close()


# -- with an honest server ---------------------------------------------------------------------------------------------


def test_what_is_negotiated(client: NbdClient) -> None:
    assert client.size == SIZE
    assert client.can(p.MULTI_CONN)
    assert not client.read_only
    assert sorted(client.contexts) == [p.ALLOCATION, DIRTY]
    assert client.max_payload == p.MAX_PAYLOAD


def test_requests(client: NbdClient, export: DiskExport) -> None:
    data = random.Random(1).randbytes(300_000)
    client.write(data, 77)
    assert client.read(76, len(data) + 2) == b"\0" + data + b"\0"
    client.write(b"fua", SIZE - 3, fua=True)
    client.write_zeroes(100, 50, no_hole=True)
    client.trim(200, 50)
    client.flush()
    assert export.calls == [
        ("write", 77, 300_000),
        ("write", SIZE - 3, 3),
        ("flush",),
        ("zero", 100, 50, False, False),
        ("trim", 200, 50),
        ("flush",),
    ]


def test_a_read_is_cut_at_the_servers_maximum(client: NbdClient) -> None:
    client.write(data := random.Random(2).randbytes(SIZE), 0)
    client.max_payload = 65_536
    assert client.read(1, SIZE - 1) == data[1:]
    with pytest.raises(NbdRequestError, match="over the server's maximum"):
        client.submit_write(bytes(65_537), 0)


def test_the_window_bounds_what_is_in_flight(client: NbdClient) -> None:
    """And the buffer of a write may be used again at once."""
    client.window = 4
    buf = bytearray(4096)
    for i in range(200):
        buf[:] = bytes([i]) * 4096
        client.submit_write(buf, i * 4096)
        assert len(client._flying) <= 4
    client.drain()
    assert client.read(0, 200 * 4096) == b"".join(bytes([i]) * 4096 for i in range(200))


def test_reads_and_writes_in_flight_do_not_block_each_other(client: NbdClient) -> None:
    """The server sends what nobody reads while the client sends what nobody receives: that must not be."""
    client.window = 64
    buf = memoryview(bytearray(SIZE))
    for i in range(12):
        client.submit_read_into(buf, 0)
        client.submit_write(bytes([i]) * SIZE, 0)
    done = threading.Timer(PATIENCE, client.abort)
    done.start()
    client.drain()
    done.cancel()
    assert client.read(0, SIZE) == bytes([11]) * SIZE


def test_an_error_is_raised_once_and_the_connection_goes_on() -> None:
    """faults row 62: the error of a pipelined write is raised by a later call, never swallowed (L11)."""
    faults = Faults(fail={"write": (3, 28)}, once=True)
    with served(DiskExport(FaultyDisk(MemoryDisk(SIZE), faults))) as (_server, connect):
        client = NbdClient.connect(connect().sock, "disk")
        for i in range(6):
            client.submit_write(b"data", 4 * i)
        with pytest.raises(NbdRequestError, match="No space left") as caught:
            client.drain()
        assert caught.value.errno == 28
        assert not caught.value.retry
        client.drain()
        assert client.read(0, 24) == b"data" * 2 + bytes(4) + b"data" * 3
        client.close()


def test_a_request_past_the_end_is_not_even_sent(client: NbdClient) -> None:
    for act in (lambda: client.read(SIZE, 1), lambda: client.write(b"x", SIZE), lambda: client.trim(0, SIZE + 1)):
        with pytest.raises(NbdRequestError, match="past the end"):
            act()
    assert client.read(SIZE - 1, 1) == b"\0"


def test_block_status_tiles_the_disk(client: NbdClient) -> None:
    found = list(client.extents(DIRTY))
    assert [o for o, _n, _f in found] == [0, *(o + n for o, n, _f in found[:-1])]
    assert sum(n for _o, n, _f in found) == SIZE
    assert [f for _o, _n, f in found] == [int(i % 4 == 0) for i in range(len(found))]
    assert list(client.extents(p.ALLOCATION)) == [(0, SIZE, 3)]
    with pytest.raises(NbdProtocolError, match="no meta context"):
        client.block_status(0, 1, "other")


def test_an_export_that_is_not_there(export: DiskExport) -> None:
    with served(export) as (_server, connect):
        with pytest.raises(NbdProtocolError, match="no export"):
            NbdClient.connect(connect().sock, "other")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(NbdError, match="cannot connect") as caught:
        NbdClient.connect(f"nbd+unix:///disk?socket={tmp_path}/none")
    assert caught.value.retry
    assert caught.value.hint


def test_abort_wakes_who_waits(export: DiskExport) -> None:
    """From another thread."""
    stall = threading.Event()
    export = DiskExport(FaultyDisk(MemoryDisk(SIZE), Faults(stall={"flush": stall})))
    with served(export) as (_server, connect):
        client = NbdClient.connect(connect().sock, "disk")
        threading.Timer(0.2, client.abort).start()
        with pytest.raises(NbdError):
            client.flush()
        stall.set()
        client.close()
        client.close()


# -- with servers that lie ---------------------------------------------------------------------------------------------


def _option(raw: Raw) -> tuple[int, bytes]:
    magic, option, length = p.OPTION.unpack(raw.recv(16))
    assert magic == p.OPTION_MAGIC
    return option, raw.recv(length)


def _reply(raw: Raw, option: int, kind: int, data: bytes = b"") -> None:
    raw.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)


def _greet(raw: Raw) -> None:
    raw.send(p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(3))
    raw.recv(4)


def negotiate(
    raw: Raw,
    *,
    size: int = SIZE,
    structured: bool = True,
    extended: bool = False,
    contexts: Sequence[tuple[int, str]] = (),
    flags: int = FLAGS,
) -> None:
    """An honest handshake."""
    _greet(raw)
    while True:
        option, _data = _option(raw)
        if option in (p.OPT_STRUCTURED, p.OPT_EXTENDED):
            has = extended if option == p.OPT_EXTENDED else structured
            _reply(raw, option, p.REP_ACK if has else p.ERR_UNSUP)
        elif option == p.OPT_SET_META:
            for number, context in contexts:
                _reply(raw, option, p.REP_META, p.U32.pack(number) + context.encode())
            _reply(raw, option, p.REP_ACK)
        else:
            assert option == p.OPT_GO
            _reply(raw, option, p.REP_INFO, p.U16.pack(0) + p.U64.pack(size) + p.U16.pack(flags))
            _reply(raw, option, p.REP_ACK)
            return


def request(raw: Raw) -> tuple[int, int, int, int]:
    """(command, cookie, offset, length) of the next request, its payload taken."""
    magic, _flags, command, cookie, offset, length = p.REQUEST.unpack(raw.recv(28))
    assert magic == p.REQUEST_MAGIC
    if command == p.WRITE:
        raw.recv(length)
    return command, cookie, offset, length


def chunk(cookie: int, kind: int, body: bytes, *, done: bool = True, length: int | None = None) -> bytes:
    """A structured reply chunk whose length may lie."""
    return p.CHUNK.pack(p.CHUNK_MAGIC, int(done), kind, cookie, len(body) if length is None else length) + body


def _long_names(raw: Raw) -> None:
    _greet(raw)
    option, _ = _option(raw)
    for _ in range(1000):
        _reply(raw, option, p.REP_SERVER, b"x")


def _hang_up_in_go(raw: Raw) -> None:
    _greet(raw)
    option, _ = _option(raw)
    _reply(raw, option, p.REP_ACK)
    _option(raw)


def _answer_go(*infos: bytes, kind: int = p.REP_ACK, text: bytes = b"") -> Callable[[Raw], None]:
    def script(raw: Raw) -> None:
        _greet(raw)
        option, _ = _option(raw)
        _reply(raw, option, p.REP_ACK)
        option, _ = _option(raw)
        for info in infos:
            _reply(raw, option, p.REP_INFO, info)
        _reply(raw, option, kind, text)

    return script


def _raw_reply(data: bytes) -> Callable[[Raw], None]:
    def script(raw: Raw) -> None:
        _greet(raw)
        _option(raw)
        raw.send(data)

    return script


HANDSHAKES: dict[str, tuple[Callable[[Raw], None], str]] = {
    "not NBD": (lambda raw: raw.send(b"SSH-2.0-OpenSSH_9.2p1\r\n"), "does not speak"),
    "oldstyle": (lambda raw: raw.send(p.NBD_MAGIC + p.U64.pack(0x00420281861253) + bytes(200)), "does not speak"),
    "hangs up at once": (lambda _raw: None, "closed|went away"),
    "hangs up in GO": (_hang_up_in_go, "closed|went away"),
    "wrong reply magic": (_raw_reply(p.OPTION_REPLY.pack(1, 11, p.REP_ACK, 0)), "malformed reply"),
    "reply to another option": (_raw_reply(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, 3, p.REP_ACK, 0)), "malformed"),
    "reply of 4 GiB": (_raw_reply(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, 11, 4, 0xFFFFFFFF)), "malformed reply"),
    "replies without end": (_long_names, "too many replies"),
    "no description": (_answer_go(), "does not describe"),
    "short description": (_answer_go(p.U16.pack(0) + p.U64.pack(5)), "does not describe"),
    "empty information": (_answer_go(b""), "does not describe"),
    "a size beyond reason": (_answer_go(p.U16.pack(0) + p.U64.pack(1 << 63) + p.U16.pack(1)), "claims a size"),
    "refuses": (_answer_go(kind=p.ERR_POLICY, text=b"no \x1b[31m\n" + b"x" * 500), r"refuses .*no \\x1b\[31m\\n"),
}


@pytest.mark.parametrize("name", HANDSHAKES)
def test_a_handshake_that_cannot_be(name: str) -> None:
    script, message = HANDSHAKES[name]
    with hostile(script) as sock, pytest.raises(NbdError, match=message) as caught:
        NbdClient.connect(sock, "disk", timeout=PATIENCE)
    assert len(str(caught.value)) < 300


def test_newstyle_that_is_not_fixed() -> None:
    """As QEMU's fault injector speaks it: no options but the export's name, nor a word on what it can."""

    def script(raw: Raw) -> None:
        raw.send(p.NBD_MAGIC + p.OPTION_MAGIC + bytes(2))
        assert raw.recv(4) == bytes(4)
        assert raw.recv(20) == p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk"
        raw.send(p.U64.pack(SIZE) + bytes(2) + bytes(124))
        cookie = p.REQUEST.unpack(raw.recv(28))[3]
        raw.send(p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, cookie) + b"data")

    with hostile(script) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        assert (client.size, client.contexts) == (SIZE, {})
        assert client.read(0, 4) == b"data"


@pytest.mark.parametrize(
    "offered", [[(1, "other:thing")], [(1, p.ALLOCATION), (2, p.ALLOCATION)], [(1, "\x1b" * 1000)]]
)
def test_contexts_that_nobody_asked_for(offered: list[tuple[int, str]]) -> None:
    with hostile(lambda raw: negotiate(raw, contexts=offered)) as sock:
        with pytest.raises(NbdProtocolError, match="nobody asked for"):
            NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION, DIRTY], timeout=PATIENCE)


@pytest.mark.parametrize("said", [b"", p.NBD_MAGIC])
def test_the_handshake_has_a_deadline(said: bytes) -> None:
    """A server that says nothing, or stops within a message."""
    go_on = threading.Event()

    def script(raw: Raw) -> None:
        raw.send(said)
        go_on.wait(PATIENCE)

    with hostile(script) as sock:
        begun = time.monotonic()
        with pytest.raises(NbdProtocolError, match="took too long"):
            NbdClient.connect(sock, "disk", timeout=0.2)
        assert time.monotonic() - begun < 5
        go_on.set()


def test_the_old_way_in() -> None:
    """A server without GO: EXPORT_NAME, and simple replies."""

    def script(raw: Raw) -> None:
        raw.send(p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(1))
        raw.recv(4)
        for _ in range(3):
            option, _ = _option(raw)
            _reply(raw, option, p.ERR_UNSUP)
        assert _option(raw) == (p.OPT_EXPORT_NAME, b"disk")
        raw.send(p.U64.pack(SIZE) + p.U16.pack(FLAGS) + bytes(124))
        _command, cookie, _offset, length = request(raw)
        raw.send(p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, cookie) + b"x" * length)
        request(raw)

    with hostile(script) as sock:
        client = NbdClient.connect(sock, "disk", timeout=PATIENCE)
        assert client.size == SIZE
        assert client.read(0, 5) == b"xxxxx"
        client.close()


def _replies(*answers: Callable[[int], bytes]) -> Callable[[Raw], None]:
    """Answers the first request with all of ``answers``, made from its cookie."""

    def script(raw: Raw) -> None:
        negotiate(raw, contexts=[(1, p.ALLOCATION)])
        _command, cookie, _offset, _length = request(raw)
        for answer in answers:
            raw.send(answer(cookie))

    return script


def _data(offset: int, data: bytes) -> bytes:
    return p.U64.pack(offset) + data


def _hole(offset: int, length: int) -> bytes:
    return p.U64.pack(offset) + p.U32.pack(length)


# The client reads 100 bytes at 1000.
READS: dict[str, Callable[[Raw], None]] = {
    "hangs up": _replies(),
    "wrong magic": _replies(lambda c: struct.pack(">IIQ", 0xBAD, 0, c) + bytes(100)),
    "wrong cookie": _replies(lambda c: chunk(c + 1, p.CHUNK_DATA, _data(1000, bytes(100)))),
    "wrong cookie, simple": _replies(lambda c: p.SIMPLE.pack(p.SIMPLE_MAGIC, 5, c + 1)),
    "simple where structured was agreed": _replies(lambda c: p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, c) + bytes(100)),
    "short": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(1000, bytes(99)))),
    "nothing": _replies(lambda c: chunk(c, p.CHUNK_NONE, b"")),
    "long": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(1000, bytes(101)))),
    "before the range": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(999, bytes(100)))),
    "beyond the range": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(1001, bytes(100)))),
    "far away": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data((1 << 64) - 1, bytes(100)))),
    "twice": _replies(
        lambda c: chunk(c, p.CHUNK_DATA, _data(1000, bytes(60)), done=False),
        lambda c: chunk(c, p.CHUNK_DATA, _data(1000, bytes(60))),
    ),
    "empty data": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(1000, b""), done=False)),
    "data without an offset": _replies(lambda c: chunk(c, p.CHUNK_DATA, b"1234")),
    "4 GiB of data": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(1000, bytes(100)), length=0xFFFFFFFF)),
    "4 GiB of something": _replies(lambda c: chunk(c, 77, b"", length=0xFFFFFFFF)),
    "unknown chunk": _replies(lambda c: chunk(c, 77, b"")),
    "empty hole": _replies(lambda c: chunk(c, p.CHUNK_HOLE, _hole(1000, 0))),
    "huge hole": _replies(lambda c: chunk(c, p.CHUNK_HOLE, _hole(1000, 0xFFFFFFFF))),
    "hole outside": _replies(lambda c: chunk(c, p.CHUNK_HOLE, _hole(900, 100))),
    "cut hole": _replies(lambda c: chunk(c, p.CHUNK_HOLE, bytes(5))),
    "status in reply to a read": _replies(lambda c: chunk(c, p.CHUNK_STATUS, bytes(12))),
    "nothing, for ever": _replies(*[lambda c: chunk(c, p.CHUNK_NONE, b"", done=False)] * 200),
    "errors, for ever": _replies(*[lambda c: chunk(c, p.CHUNK_ERROR, bytes(6), done=False)] * 200),
    "an error that is cut": _replies(lambda c: chunk(c, p.CHUNK_ERROR, b"\0")),
}


@pytest.mark.parametrize("name", READS)
def test_an_answer_to_a_read_that_cannot_be(name: str) -> None:
    with hostile(READS[name]) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        sock.settimeout(PATIENCE)
        with pytest.raises(NbdError) as caught:
            client.read(1000, 100)
        assert type(caught.value) is (NbdError if name == "hangs up" else NbdProtocolError)


def test_an_answer_to_a_read_in_pieces() -> None:
    """Out of order, with holes; and an error in the middle is the error of the whole."""

    def script(raw: Raw) -> None:
        negotiate(raw)
        _command, cookie, _offset, _length = request(raw)
        raw.send(chunk(cookie, p.CHUNK_DATA, _data(1060, b"c" * 40), done=False))
        raw.send(chunk(cookie, p.CHUNK_HOLE, _hole(1030, 30), done=False))
        raw.send(chunk(cookie, p.CHUNK_DATA, _data(1000, b"a" * 30), done=False))
        raw.send(chunk(cookie, p.CHUNK_NONE, b""))
        _command, cookie, _offset, _length = request(raw)
        raw.send(chunk(cookie, p.CHUNK_DATA, _data(1000, b"a" * 30), done=False))
        raw.send(chunk(cookie, p.CHUNK_ERROR_OFFSET, p.U32.pack(5) + bytes(2) + p.U64.pack(1030), done=False))
        raw.send(chunk(cookie, p.CHUNK_NONE, b""))

    with hostile(script) as sock:
        client = NbdClient.connect(sock, "disk", timeout=PATIENCE)
        assert client.read(1000, 100) == b"a" * 30 + bytes(30) + b"c" * 40
        with pytest.raises(NbdRequestError) as caught:
            client.read(1000, 100)
        assert caught.value.errno == 5


def _extents(context: int, *extents: tuple[int, int]) -> bytes:
    return p.U32.pack(context) + b"".join(p.EXTENT.pack(*e) for e in extents)


# The client asks for the status of 1000 bytes at 0.
STATUSES: dict[str, Callable[[Raw], None]] = {
    "no extents": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1))),
    "no chunk": _replies(lambda c: chunk(c, p.CHUNK_NONE, b"")),
    "an empty extent": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (0, 0)))),
    "an empty extent later": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (5, 0), (0, 0), (5, 0)))),
    "more than was asked": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (1000, 0), (1, 0)))),
    "a cut extent": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (5, 0))[:-1])),
    "twice": _replies(
        lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (5, 0)), done=False),
        lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (5, 0))),
    ),
    "another context": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(2, (5, 0)))),
    "contexts, for ever": _replies(
        *[lambda c, n=n: chunk(c, p.CHUNK_STATUS, _extents(n, (5, 0)), done=False) for n in range(2, 200)]
    ),
    "simple": _replies(lambda c: p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, c)),
    "data": _replies(lambda c: chunk(c, p.CHUNK_DATA, _data(0, bytes(1000)))),
    "extents of 64 bits": _replies(
        lambda c: chunk(c, p.CHUNK_EXT_STATUS, p.U32.pack(1) * 2 + p.EXT_EXTENT.pack(1000, 0))
    ),
    "17 MiB of extents": _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (5, 0)), length=17 << 20)),
}


@pytest.mark.parametrize("name", STATUSES)
def test_a_block_status_that_cannot_be(name: str) -> None:
    """Extents must tile the disk, or a bitmap read over NBD would lose writes."""
    with hostile(STATUSES[name]) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        sock.settimeout(PATIENCE)
        with pytest.raises(NbdProtocolError):
            client.block_status(0, 1000, p.ALLOCATION)


def test_a_last_extent_may_reach_beyond_what_was_asked() -> None:
    """The protocol allows that; it is cut."""
    answer = _replies(lambda c: chunk(c, p.CHUNK_STATUS, _extents(1, (10, 1), (5000, 0))))
    with hostile(answer) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        assert client.block_status(0, 1000, p.ALLOCATION) == [(10, 1), (990, 0)]


@pytest.mark.parametrize("error", [1, 5, 28, 95, 0xFFFFFFFF])
def test_any_error_number_can_be_told(error: int) -> None:
    with hostile(_replies(lambda c: p.SIMPLE.pack(p.SIMPLE_MAGIC, error, c))) as sock:
        client = NbdClient.connect(sock, "disk", timeout=PATIENCE)
        with pytest.raises(NbdRequestError, match="request 4 of 10 bytes at 5") as caught:
            client.trim(5, 10)
        assert caught.value.errno == error


def test_a_server_that_goes_away_while_we_send() -> None:
    def script(raw: Raw) -> None:
        negotiate(raw)
        raw.sock.shutdown(socket.SHUT_RDWR)

    with hostile(script) as sock:
        client = NbdClient.connect(sock, "disk", timeout=PATIENCE)
        with pytest.raises(NbdError, match=r"went away|closed"):
            for _ in range(1000):
                client.submit_write(bytes(SIZE), 0)


def test_limits_are_what_the_tests_assume() -> None:
    """The floods above must be longer than what is allowed."""
    assert client_module._MAX_REPLIES < 199
    assert greeting._MAX_REPLIES < 199


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "uri"),
    [
        ("nbd://host/disk", NbdUri("disk", host="host")),
        ("nbd://host:10810", NbdUri("", host="host", port=10810)),
        ("nbd://[::1]:5/a%2Fb", NbdUri("a/b", host="::1", port=5)),
        ("nbd+unix:///sda?socket=/run/x%20y.sock", NbdUri("sda", path="/run/x y.sock")),
        ("nbd+unix:///?socket=/s", NbdUri("", path="/s")),
        ("nbds://host/disk", NbdUri("disk", host="host", tls=UriTls())),
        ("nbds://host/d?tls-certificates=/a%20b", NbdUri("d", host="host", tls=UriTls("/a b"))),
        ("nbds+unix:///d?socket=/s&tls-hostname=x&tls-certificates=/c", NbdUri("d", "/s", tls=UriTls("/c", "x"))),
    ],
)
def test_addresses(text: str, uri: NbdUri) -> None:
    assert parse_uri(text) == uri
    assert parse_uri(str(uri)) == uri


@pytest.mark.parametrize(
    "text",
    [
        *("", "x", "http://host/x", "nbd:///x", "nbd+unix:///x", "nbds+unix:///x", "nbd://host:port/x", "nbd://[::1/x"),
        *(
            "nbds:///x",
            "nbd://h/x?tls-certificates=/d",
            "nbds://h/x?tls-psk-file=/k",
            "nbds://h/x?tls-verify-peer=false",
        ),
        "nbds://h/x?tls-certificates=/a&tls-certificates=/b",
    ],
)
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(UsageError):
        parse_uri(text)

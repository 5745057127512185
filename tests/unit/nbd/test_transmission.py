"""The server in transmission: what each request does, what is refused, and who waits for whom."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import socket
import stat
import struct
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import open_disk
from incbak.disk.memory import MemoryDisk
from incbak.errors import UsageError
from incbak.nbd import connection
from incbak.nbd import protocol as p
from incbak.nbd.server import NbdServer, bind_unix
from tests.kit.serve import wait_until
from tests.unit.nbd.peers import DIRTY, PATIENCE, SIZE, DiskExport, Raw, served

MIB = 1 << 20


@pytest.fixture
def simple(raw: Raw) -> Raw:
    return raw.go()


@pytest.fixture
def structured(raw: Raw) -> Raw:
    return raw.go(structured=True)


# -- what requests do --------------------------------------------------------------------------------------------------


def test_write_and_read_simple(simple: Raw) -> None:
    data = random.Random(1).randbytes(70_000)
    assert simple.error(p.WRITE, 123, len(data), payload=data) == 0
    simple.request(p.READ, 122, len(data) + 2, cookie=1 << 63)
    assert simple.simple() == (0, 1 << 63)
    assert simple.recv(len(data) + 2) == b"\0" + data + b"\0"


@pytest.mark.parametrize("slow", [False, True])
def test_a_device_is_told_that_writes_are_done_before_their_answers_go(
    simple: Raw, export: DiskExport, slow: bool
) -> None:
    """Also those that a worker does."""
    rested: list[int] = []
    export.rest = lambda _waits: rested.append(len(export.calls))
    export.may_block = lambda _offset, _length: slow
    for done in (1, 2):
        assert simple.error(p.WRITE, 0, 512, payload=bytes(512)) == 0
        assert rested[-1] == done


def test_a_device_is_told_whether_the_next_request_waits(simple: Raw, export: DiskExport) -> None:
    told: list[bool] = []
    inside, further = threading.Event(), threading.Event()
    export.rest = told.append
    export.may_block = lambda _offset, _length: inside.set() or not further.wait(30)  # type: ignore[func-returns-value]
    simple.request(p.WRITE, 0, 512, payload=bytes(512))
    assert inside.wait(30)
    simple.request(p.WRITE, 512, 512, payload=bytes(512))
    further.set()
    assert [simple.simple()[0], simple.simple()[0]] == [0, 0]
    assert told == [True, False]


@pytest.mark.parametrize("length", [1, 512, connection.INLINE, connection.INLINE + 1, SIZE - 100])
@pytest.mark.parametrize("flags", [0, p.CMD_DF])
def test_read_structured(structured: Raw, export: DiskExport, length: int, flags: int) -> None:
    """One chunk, so that DF is kept by itself."""
    data = random.Random(2).randbytes(SIZE)
    export.disk.write(data, 0)
    structured.request(p.READ, 100, length, flags=flags)
    assert structured.chunk() == (p.CHUNK_DONE, p.CHUNK_DATA, 7, p.U64.pack(100) + data[100 : 100 + length])


def test_nothing_at_all(connect: Callable[[], Raw], export: DiskExport) -> None:
    """faults row 63: length 0 is answered and does nothing."""
    raw = connect().go()
    for command in (p.READ, p.WRITE, p.TRIM, p.ZEROES, p.CACHE):
        assert raw.error(command, SIZE, 0) == 0
    raw = connect().go(p.ALLOCATION)
    raw.request(p.READ, 5, 0)
    assert raw.chunk() == (p.CHUNK_DONE, p.CHUNK_NONE, 7, b"")
    assert export.calls == []


def test_trim_cache_and_flush(simple: Raw, export: DiskExport) -> None:
    for command, offset, length in ((p.TRIM, 3, 5), (p.CACHE, 0, SIZE), (p.FLUSH, 0, 0)):
        assert simple.error(command, offset, length) == 0
    assert export.calls == [("trim", 3, 5), ("cache", 0, SIZE), ("flush",)]


@pytest.mark.parametrize(
    ("flags", "unmap", "error"),
    [
        (0, True, 0),
        (p.CMD_NO_HOLE, False, 0),
        (p.CMD_FAST_ZERO, True, 95),
        (p.CMD_FAST_ZERO | p.CMD_NO_HOLE, False, 95),
    ],
)
def test_zeroes(simple: Raw, export: DiskExport, flags: int, unmap: bool, error: int) -> None:
    """faults row 59: NO_HOLE and FAST_ZERO reach the device; fast zeroes are refused as such."""
    assert simple.error(p.ZEROES, 4096, 8192, flags=flags) == error
    assert export.calls == [("zero", 4096, 8192, unmap, bool(error))]


@pytest.mark.parametrize(
    ("command", "payload", "call"),
    [(p.WRITE, b"abcd", ("write", 8, 4)), (p.TRIM, b"", ("trim", 8, 4)), (p.ZEROES, b"", ("zero", 8, 4, True, False))],
)
def test_fua_flushes_before_the_reply(
    simple: Raw, export: DiskExport, command: int, payload: bytes, call: tuple[object, ...]
) -> None:
    """faults row 61."""
    assert simple.error(command, 8, 4, flags=p.CMD_FUA, payload=payload) == 0
    assert export.calls == [call, ("flush",)]


def test_block_status(raw: Raw, export: DiskExport) -> None:
    """One chunk per context, the last one marked; extents tile the range; REQ_ONE gives one."""
    export.disk.write(b"x" * 4096, 8192)
    raw.go(p.ALLOCATION, DIRTY)
    raw.request(p.STATUS, 4096, 200_000)
    flags, kind, _cookie, body = raw.chunk()
    assert (flags, kind, body[:4]) == (0, p.CHUNK_STATUS, p.U32.pack(1))
    assert list(p.EXTENT.iter_unpack(body[4:])) == [(4096, 3), (4096, 0), (200_000 - 8192, 3)]
    flags, kind, _cookie, body = raw.chunk()
    assert (flags, kind, body[:4]) == (p.CHUNK_DONE, p.CHUNK_STATUS, p.U32.pack(2))
    expected = [(61_440, 1), (65_536, 0), (65_536, 0), (200_000 - 61_440 - 131_072, 0)]
    assert list(p.EXTENT.iter_unpack(body[4:])) == expected
    raw.request(p.STATUS, 4096, 200_000, flags=p.CMD_REQ_ONE)
    assert raw.chunk()[3][4:] == p.EXTENT.pack(4096, 3)
    assert raw.chunk()[3][4:] == p.EXTENT.pack(61_440, 1)


# -- what is refused ---------------------------------------------------------------------------------------------------

REFUSED = [
    ("read past the end", p.READ, SIZE - 3, 4, 0, errno.EINVAL),
    ("read overflow", p.READ, (1 << 64) - 1, 4, 0, errno.EINVAL),
    ("read too long", p.READ, 0, p.MAX_PAYLOAD + 1, 0, errno.EINVAL),
    ("trim past the end", p.TRIM, SIZE, 1, 0, errno.EINVAL),
    ("zeroes past the end", p.ZEROES, 0, SIZE + 1, 0, errno.ENOSPC),
    ("zeroes overflow", p.ZEROES, (1 << 64) - 2, 0xFFFFFFFF, 0, errno.ENOSPC),
    ("cache past the end", p.CACHE, 1 << 63, 1, 0, errno.EINVAL),
    ("flush with a range", p.FLUSH, 1, 1, 0, errno.EINVAL),
    ("unknown command", 8, 0, 0, 0, errno.EINVAL),
    ("unknown command, huge", 0xFFFF, (1 << 64) - 1, 0xFFFFFFFF, 0xFFFF, errno.EINVAL),
    ("unknown flag", p.READ, 0, 1, 1 << 5, errno.EINVAL),
    ("flag of another command", p.FLUSH, 0, 0, p.CMD_FUA, errno.EINVAL),
    ("status without contexts", p.STATUS, 0, 1, 0, errno.EINVAL),
]


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "error"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED]
)
def test_refused_and_the_next_one_works(
    connect: Callable[[], Raw], export: DiskExport, command: int, offset: int, length: int, flags: int, error: int
) -> None:
    """faults rows 63, 64."""
    raw = connect().go()
    assert raw.error(command, offset, length, flags=flags) == error
    assert raw.alive()
    raw = connect().go(structured=True)
    raw.request(command, offset, length, flags=flags)
    if command in (p.READ, p.STATUS):
        done, kind, cookie, body = raw.chunk()
        assert (done, kind, cookie, body[:4]) == (p.CHUNK_DONE, p.CHUNK_ERROR, 7, p.U32.pack(error))
    else:
        assert raw.simple() == (error, 7)
    assert raw.alive()
    assert {call[0] for call in export.calls} == {"write"}


@pytest.mark.parametrize(
    ("offset", "length", "flags", "error"),
    [
        (SIZE - 3, 4, 0, errno.ENOSPC),
        ((1 << 64) - 1, 5000, 0, errno.ENOSPC),
        (0, 4096, p.CMD_DF, errno.EINVAL),
        (SIZE, 3 * MIB, p.CMD_FUA, errno.ENOSPC),
    ],
)
def test_the_payload_of_a_refused_write_is_drained(
    simple: Raw, export: DiskExport, offset: int, length: int, flags: int, error: int
) -> None:
    """faults row 63: a payload that looks like requests is not taken for them."""
    evil = (p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.ZEROES, 666, 0, 4096) * (length // 28 + 1))[:length]
    assert simple.error(p.WRITE, offset, length, flags=flags, payload=evil) == error
    assert simple.alive()
    assert export.calls == [("write", 0, 4)]


def test_an_oversized_read_is_refused_and_allocates_nothing(tmp_path: Path) -> None:
    """faults row 63: within a disk that is large enough, so that its size is no reason to refuse."""
    (tmp_path / "disk").touch()
    os.truncate(tmp_path / "disk", 1 << 40)
    reads: list[int] = []
    with contextlib.closing(open_disk(tmp_path / "disk")) as disk:
        disk.read_into = lambda buf, offset: reads.append(len(buf))  # type: ignore[method-assign]
        with served(DiskExport(disk)) as (_server, connect):
            raw = connect().go()
            for length in (p.MAX_PAYLOAD + 1, 1 << 31, 0xFFFFFFFF):
                assert raw.error(p.READ, 0, length) == errno.EOVERFLOW
                assert raw.alive()
    assert reads == []


def test_an_oversized_write_ends_the_connection_and_allocates_nothing(simple: Raw, export: DiskExport) -> None:
    """faults row 63: no buffer of a length that the client chose."""
    simple.request(p.WRITE, 0, 0xFFFFFFFF)
    assert simple.hung_up()
    assert export.calls == []


@pytest.mark.parametrize("magic", [0, 0x25609514, p.SIMPLE_MAGIC])
def test_a_wrong_magic_ends_the_connection(simple: Raw, magic: int) -> None:
    """faults row 64."""
    simple.send(p.REQUEST.pack(magic, 0, p.READ, 1, 0, 1))
    assert simple.hung_up()


@pytest.mark.parametrize("sent", [0, 1, 4095, 60_000])
def test_a_write_that_is_cut_short_is_not_applied(export: DiskExport, sent: int) -> None:
    """faults row 67: and the server is as before for others."""
    with served(export) as (server, connect):
        raw, other = connect().go(), connect().go()
        raw.request(p.WRITE, 0, 70_000, payload=b"x" * sent)
        raw.close()
        wait_until(lambda: server.connections() == 1, "the broken connection is forgotten")
        assert export.calls == []
        assert other.alive()


def test_a_request_that_is_cut_short(export: DiskExport) -> None:
    with served(export) as (server, connect):
        raw = connect().go()
        raw.send(p.REQUEST.pack(p.REQUEST_MAGIC, 0, p.ZEROES, 1, 0, 4096)[:27])
        raw.close()
        wait_until(lambda: server.connections() == 0, "the broken connection is forgotten")
    assert export.calls == []


def test_read_only() -> None:
    disk = MemoryDisk(SIZE, read_only=True)
    export = DiskExport(disk)
    with served(export) as (_server, connect):
        raw = connect().go()
        for command, payload in ((p.WRITE, b"abcd"), (p.TRIM, b""), (p.ZEROES, b"")):
            assert raw.error(command, 0, 4, payload=payload) == errno.EPERM
        assert raw.error(p.FLUSH) == 0
        raw.request(p.READ, 0, 4)
        assert raw.simple() == (0, 7)
    assert export.calls == [("flush",)]


@pytest.mark.parametrize(
    ("code", "told"),
    [(errno.ENOSPC, 28), (errno.EDQUOT, 28), (errno.EROFS, 1), (errno.EBADF, 5), (errno.EIO, 5), (errno.ENOMEM, 12)],
)
def test_a_failure_of_the_disk_is_told_in_the_protocols_numbers(code: int, told: int) -> None:
    """faults row 62."""
    faults = Faults(fail=dict.fromkeys(("read", "write", "zero", "trim", "flush"), (1, code)))
    export = DiskExport(FaultyDisk(MemoryDisk(SIZE), faults))
    with served(export) as (_server, connect):
        raw = connect().go()
        assert raw.error(p.WRITE, 0, 4, payload=b"abcd") == told
        assert raw.error(p.WRITE, 0, 4, payload=b"abcd", flags=p.CMD_FUA) == told
        for command in (p.READ, p.ZEROES, p.TRIM):
            assert raw.error(command, 0, 4) == told
        assert raw.error(p.FLUSH) == told
        raw = connect().go(structured=True)
        raw.request(p.READ, 0, 4)
        assert raw.chunk()[1:] == (p.CHUNK_ERROR, 7, p.U32.pack(told) + p.U16.pack(0))


def test_an_error_of_our_own_ends_the_connection_and_is_logged(
    export: DiskExport, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A client must not wait for a reply that never comes."""

    def broken() -> None:
        raise KeyError("not an OSError")

    monkeypatch.setattr(export.disk, "flush", broken)
    with served(export) as (server, connect):
        raw = connect().go()
        raw.request(p.FLUSH)
        assert raw.hung_up()
        wait_until(lambda: server.connections() == 0, "the connection is forgotten")
        assert connect().go().alive()
    assert [r.levelno for r in caplog.records if "of our own" in r.message] == [logging.ERROR]


# -- who waits for whom ------------------------------------------------------------------------------------------------


def _stalled(*kinds: str) -> tuple[DiskExport, dict[str, threading.Event]]:
    events = {kind: threading.Event() for kind in kinds}
    return DiskExport(FaultyDisk(MemoryDisk(SIZE), Faults(stall=dict(events)))), events


@pytest.mark.parametrize("kind", ["read", "flush", "trim"])
def test_a_slow_request_does_not_hold_up_fast_ones(kind: str) -> None:
    """faults row 66: on the same connection; the answers come out of order, each with its cookie."""
    export, events = _stalled(kind)
    with served(export) as (_server, connect):
        raw = connect().go()
        for cookie in (1, 2, 3):
            raw.request(
                {"read": p.READ, "flush": p.FLUSH, "trim": p.TRIM}[kind], 0, 0 if kind == "flush" else 4, cookie=cookie
            )
        for cookie in range(10, 30):
            assert raw.error(p.WRITE, 0, 4, payload=b"fast", cookie=cookie) == 0
        assert raw.error(p.CACHE, 0, 4, cookie=40) == 0
        events[kind].set()
        answers = set()
        for _ in range(3):
            error, cookie = raw.simple()
            assert error == 0
            assert kind != "read" or raw.recv(4) == b"fast"
            answers.add(cookie)
        assert answers == {1, 2, 3}


def test_a_write_that_may_block_goes_to_a_worker() -> None:
    """Its payload is its own: the buffer it came in is used again meanwhile."""
    export, events = _stalled("write")
    export.may_block = lambda offset, _length: offset == 0
    faults = export.disk.faults  # type: ignore[attr-defined]
    with served(export) as (_server, connect):
        raw = connect().go()
        raw.request(p.WRITE, 0, 5, cookie=1, payload=b"first")
        wait_until(lambda: faults.seen.get("write"), "the slow write has begun")
        del faults.stall["write"]
        for i in range(1, 50):
            assert raw.error(p.WRITE, 100 * i, 5, payload=b"other", cookie=i + 1) == 0
        events["write"].set()
        assert raw.simple() == (0, 1)
        assert export.disk.read(0, 5) == b"first"


def test_one_client_that_stalls_does_not_hold_up_another() -> None:
    export, events = _stalled("flush")
    with served(export) as (_server, connect):
        slow, fast = connect().go(), connect().go()
        for cookie in range(2 * connection.WORKERS):
            slow.request(p.FLUSH, cookie=cookie)
        assert fast.alive()
        events["flush"].set()
        assert {slow.simple() for _ in range(2 * connection.WORKERS)} == {(0, c) for c in range(2 * connection.WORKERS)}


def test_a_thousand_in_flight(connect: Callable[[], Raw], export: DiskExport) -> None:
    """faults row 70: far more than the server holds; each is answered once, also where all have one cookie."""
    export.disk.write(bytes(i % 251 for i in range(SIZE)), 0)
    raw, count = connect().go(), 1000

    def send(cookie: Callable[[int], int], command: Callable[[int], int]) -> threading.Thread:
        def run() -> None:
            for i in range(count):
                raw.request(command(i), 0 if command(i) == p.FLUSH else i, 8 * (command(i) == p.READ), cookie=cookie(i))

        thread = threading.Thread(target=run)
        thread.start()
        return thread

    sender = send(lambda i: i, lambda i: p.READ if i % 3 else p.FLUSH)
    answered = []
    for _ in range(count):
        error, cookie = raw.simple()
        assert error == 0
        assert not cookie % 3 or raw.recv(8) == bytes(i % 251 for i in range(cookie, cookie + 8))
        answered.append(cookie)
    sender.join(PATIENCE)
    assert sorted(answered) == list(range(count))
    sender = send(lambda _i: 5, lambda _i: p.FLUSH)
    assert {raw.simple() for _ in range(count)} == {(0, 5)}
    sender.join(PATIENCE)
    assert len(export.calls) == count + (count + 2) // 3


def test_one_that_never_reads_is_dropped(export: DiskExport, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 68: what waits for it is bounded, in bytes and in time; others go on."""
    monkeypatch.setattr(connection, "SEND_TIMEOUT", 1)
    with served(export) as (server, connect):
        raw, other = connect().go(), connect().go()
        with pytest.raises(OSError):
            for _ in range(10_000):
                raw.request(p.READ, 0, MIB // 2)
        wait_until(lambda: server.connections() == 1, "it is dropped")
        assert other.alive()


def test_a_flush_covers_the_writes_of_all_connections(connect: Callable[[], Raw], export: DiskExport) -> None:
    """faults row 61: that is what MULTI_CONN promises."""
    one, two = connect().go(), connect().go()
    assert one.error(p.WRITE, 0, 4, payload=b"abcd") == 0
    assert two.error(p.FLUSH) == 0
    assert export.calls == [("write", 0, 4), ("flush",)]
    two.request(p.READ, 0, 4)
    assert two.simple() == (0, 7)
    assert two.recv(4) == b"abcd"


def test_more_connections_than_allowed_are_closed_unheard(export: DiskExport) -> None:
    """faults row 69: and room is made by those that leave."""
    with served(export, connections=3) as (server, connect):
        raws = [connect().go() for _ in range(3)]
        for _ in range(5):
            assert connect().hung_up()
        assert all(raw.alive() for raw in raws)
        raws[0].close()
        wait_until(lambda: server.connections() == 2, "one has left")
        assert connect().go().alive()


def test_disconnect_waits_for_what_is_in_flight() -> None:
    """A device is closed after its last request, not within it."""
    export, events = _stalled("flush")
    with served(export) as (server, connect):
        raw = connect().go()
        raw.request(p.FLUSH)
        raw.request(p.DISC)
        wait_until(lambda: export.calls == [("flush",)], "the flush has begun")
        assert export.closed == 0
        events["flush"].set()
        assert raw.simple() == (0, 7)
        assert raw.hung_up()
        wait_until(lambda: server.connections() == 0, "the connection is gone")
    assert export.closed == 1


def test_stop_finishes_requests_and_ends_connections(export: DiskExport) -> None:
    with served(export) as (server, connect):
        raws = [connect().go() for _ in range(3)]
        half = connect()
        server.stop(PATIENCE)
        assert all(raw.hung_up() for raw in raws)
        assert half.sock.recv(100)
        assert half.hung_up()
        assert connect().hung_up()
    assert export.closed == 3


# -- sockets -----------------------------------------------------------------------------------------------------------


def _listening(path: Path) -> NbdServer:
    server = NbdServer(lambda: {"disk": DiskExport()})
    server.listen_unix(path)
    return server


def test_the_socket_is_private_from_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 74: 0600 when the name appears, whatever the umask, in a directory of 0700."""
    path = tmp_path / "new" / "nbd.sock"
    seen: list[int] = []
    bind = socket.socket.bind

    class Watched(socket.socket):
        def bind(self, address: object) -> None:
            bind(self, address)  # type: ignore[arg-type]
            seen.append(stat.S_IMODE(path.stat().st_mode))

    monkeypatch.setattr(socket, "socket", Watched)
    old = os.umask(0)
    try:
        bind_unix(path).close()
    finally:
        os.umask(old)
    assert seen == [0o600]
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_socket_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "nbd.sock"
    bind_unix(path).close()
    server = _listening(path)
    with pytest.raises(UsageError, match="another process does"):
        bind_unix(path)
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    assert Raw(sock).go().alive()
    sock.close()
    server.stop()
    assert not path.exists()


@pytest.mark.parametrize("what", ["file", "directory", "link"])
def test_what_is_no_socket_is_not_replaced(tmp_path: Path, what: str) -> None:
    """faults row 75."""
    path, victim = tmp_path / "nbd.sock", tmp_path / "victim"
    victim.write_text("precious")
    if what == "file":
        path.write_text("precious")
    elif what == "directory":
        path.mkdir()
    else:
        path.symlink_to(victim)
    with pytest.raises(UsageError, match="something else is there"):
        bind_unix(path)
    assert victim.read_text() == "precious"
    assert path.exists()


def test_a_path_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        bind_unix(tmp_path / ("x" * 120))


def test_tcp(export: DiskExport) -> None:
    server = NbdServer(lambda: {"disk": export})
    host, port = server.listen_tcp("127.0.0.1", 0)
    sock = socket.create_connection((host, port))
    assert Raw(sock).go().alive()
    with pytest.raises(UsageError, match="cannot listen"):
        server.listen_tcp("127.0.0.1", port)
    sock.close()
    server.stop()


def test_a_client_that_resets_is_no_trouble(export: DiskExport, caplog: pytest.LogCaptureFixture) -> None:
    """faults row 67: RST within a reply; nothing worse than a note is logged."""
    server = NbdServer(lambda: {"disk": export})
    address = server.listen_tcp("127.0.0.1", 0)
    for _ in range(5):
        sock = socket.create_connection(address)
        raw = Raw(sock).go()
        raw.request(p.READ, 0, SIZE - 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
    wait_until(lambda: server.connections() == 0, "all are forgotten")
    server.stop()
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]

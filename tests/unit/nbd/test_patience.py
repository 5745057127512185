"""Nobody is waited for without end: a client that takes a slot for nothing, a server that owes an answer."""

from __future__ import annotations

import math
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdSilentError
from incbak.nbd import client as client_module
from incbak.nbd import protocol as p
from incbak.nbd import slots
from incbak.nbd.client import NbdClient
from incbak.nbd.server import NbdServer
from tests.kit.serve import wait_until
from tests.unit.nbd.peers import PATIENCE, SIZE, DiskExport, Raw, hostile
from tests.unit.nbd.test_client import negotiate, request

SLOTS = 4
LARGE = 32 << 20


class Both:
    """A server with a local socket and one over TCP, with a disk and a read-only view of it."""

    def __init__(self, tmp_path: Path) -> None:
        disk = MemoryDisk(SIZE)
        reader = DiskExport(disk, "reader")
        reader.read_only = True
        exports = {"disk": DiskExport(disk), "reader": reader}
        self.server = NbdServer(lambda: exports, max_connections=SLOTS, handshake_timeout=PATIENCE)
        self.path = self.server.listen_unix(tmp_path / "n")
        self.address = self.server.listen_tcp("127.0.0.1", 0)

    def local(self) -> Raw:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.path))
        return Raw(sock)

    def remote(self) -> Raw:
        return Raw(socket.create_connection(self.address))


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    made = Both(tmp_path)
    yield made
    made.server.stop(PATIENCE)
    assert made.server.connections() == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is silent has soon been so for long."""
    monkeypatch.setattr(slots, "PATIENCE", 0.05)


def _silent(both: Both, count: int = 1) -> None:
    def enough() -> bool:
        now = time.monotonic()
        return sum(slot.silent(now) > slots.PATIENCE for slot in both.server._slots.all()) == count

    wait_until(enough, f"{count} clients have been silent for long")


def _negotiated(both: Both, count: int) -> None:
    wait_until(lambda: sum(s.heard < math.inf for s in both.server._slots.all()) == count, f"{count} have negotiated")


def _turned_away(raw: Raw) -> bool:
    """Whether it was dropped, be it before it was greeted."""
    try:
        return raw.greet().hung_up()
    except ConnectionError:
        return True


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


# -- slots -------------------------------------------------------------------------------------------------------------


def test_a_crowd_on_the_network_takes_no_slot_of_a_local_client(both: Both) -> None:
    crowd = [both.remote().go() for _ in range(SLOTS)]
    _negotiated(both, SLOTS)
    assert both.remote().hung_up()
    assert both.local().go().alive()
    assert all(each.alive() for each in crowd)


def test_a_local_crowd_takes_no_slot_of_a_client_on_the_network(both: Both) -> None:
    crowd = [both.local().go() for _ in range(SLOTS)]
    assert both.local().hung_up()
    assert both.remote().go().alive()
    assert all(each.alive() for each in crowd)


def test_strangers_that_say_nothing_give_way_to_who_comes(both: Both) -> None:
    held = both.remote().go()
    _negotiated(both, 1)
    strangers = [both.remote() for _ in range(3 * SLOTS)]
    assert both.remote().go().alive()
    assert held.alive()
    assert _turned_away(strangers[0])


@pytest.mark.usefixtures("impatient")
def test_a_silent_reader_gives_way_and_a_writer_does_not(both: Both) -> None:
    writers = [both.local().go() for _ in range(SLOTS - 1)]
    reader = both.local().go(name="reader")
    _silent(both)
    writers.append(both.local().go())
    assert reader.hung_up()
    assert all(writer.alive() for writer in writers)
    assert both.local().hung_up()


def test_a_reader_that_was_heard_just_now_keeps_its_slot(both: Both) -> None:
    readers = [both.local().go(name="reader") for _ in range(SLOTS)]
    assert both.local().hung_up()
    assert all(reader.error(p.WRITE, 0, 4, payload=b"none") == 1 for reader in readers)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", ["disk", "reader"])
def test_one_that_stops_within_a_payload_gives_way(both: Both, name: str) -> None:
    writers = [both.local().go() for _ in range(SLOTS - 1)]
    half = both.local().go(name=name)
    half.request(p.WRITE, 0, LARGE, payload=bytes(1 << 20))
    _silent(both)
    assert both.local().go().alive()
    assert half.hung_up()
    assert all(writer.alive() for writer in writers)


def test_within_a_payload_a_client_has_a_deadline(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("incbak.nbd.connection.PAYLOAD_TIMEOUT", 0.5)
    half = both.local().go()
    half.request(p.WRITE, 0, 1000, payload=b"half")
    assert half.hung_up()
    slow = both.local().go()
    assert slow.error(p.WRITE, 0, SIZE, payload=bytes(SIZE)) == 0
    time.sleep(0.7)  # between requests it has none
    assert slow.alive()


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "offset", "flags", "error"),
    [("reader", 0, 0, 1), ("disk", SIZE, 0, 28), ("disk", 0, p.CMD_DF, 22)],
    ids=["read-only", "beyond", "flag"],
)
def test_what_is_refused_takes_no_memory(both: Both, name: str, offset: int, flags: int, error: int) -> None:
    """The payload is taken off the wire and forgotten; what comes after it is understood."""
    clients = [both.local().go(name=name) for _ in range(SLOTS)]
    payload, before = bytes(range(256)) * (LARGE // 256), _resident()
    for client in clients:
        client.request(p.WRITE, offset, LARGE, flags=flags, payload=payload[:-1])
    assert _resident() - before < LARGE
    for client in clients:
        client.send(payload[-1:])
        assert client.simple() == (error, 7)
        assert client.error(p.WRITE, offset, 4, flags=flags, payload=b"next") == error


def test_a_long_payload_of_another_request_takes_no_memory(both: Both) -> None:
    client = both.local().go(p.ALLOCATION, extended=True)
    payload, before = bytes(LARGE), _resident()
    assert client.error(p.STATUS, 0, payload=payload) == 22
    assert _resident() - before < LARGE // 2
    assert client.alive()


@pytest.mark.usefixtures("impatient")
def test_half_sent_payloads_have_a_bound_together(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "HALF_SENT", SIZE // 2)
    both.server._slots.most = 10
    half = [both.local().go() for _ in range(2)]
    for client in half:
        client.request(p.WRITE, 0, SIZE, payload=bytes(SIZE // 2))
    _silent(both, 2)
    assert both.local().go().error(p.WRITE, 0, SIZE, payload=bytes(SIZE)) == 0
    assert all(client.hung_up() for client in half)


# -- the client --------------------------------------------------------------------------------------------------------


@pytest.fixture
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "REPLY_SECONDS", 0.2)
    monkeypatch.setattr(client_module, "SLOW_SECONDS", 0.4)


def _deaf(raw: Raw) -> None:
    """It takes everything and says nothing."""
    negotiate(raw, contexts=[(1, p.ALLOCATION)])
    while raw.sock.recv(1 << 16):
        pass


def _stopped(raw: Raw) -> None:
    negotiate(raw, contexts=[(1, p.ALLOCATION)])
    _gone.wait(PATIENCE)


def _cut_short(raw: Raw) -> None:
    negotiate(raw, contexts=[(1, p.ALLOCATION)])
    request(raw)
    raw.send(p.CHUNK.pack(p.CHUNK_MAGIC, 1, p.CHUNK_DATA, 1, SIZE + 8)[:10])
    while raw.sock.recv(1 << 16):
        pass


_gone = threading.Event()

ASKED: dict[str, Callable[[NbdClient], object]] = {
    "read": lambda c: c.read(0, 100),
    "write": lambda c: c.write(b"x", 0),
    "status": lambda c: c.block_status(0, 100, p.ALLOCATION),
    "flush": lambda c: c.flush(),
    "zeroes": lambda c: c.write_zeroes(0, 100),
    "trim": lambda c: c.trim(0, 100),
    "fua": lambda c: c.write(b"x", 0, fua=True),
}


@pytest.mark.usefixtures("brief")
@pytest.mark.parametrize("asked", list(ASKED))
def test_a_server_that_never_answers_is_given_up(asked: str) -> None:
    """One that has to write to its storage first later than others."""
    with hostile(_deaf) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        seconds = "0.4" if asked in ("flush", "zeroes", "trim", "fua") else "0.2"
        with pytest.raises(NbdSilentError, match=f"did not answer for {seconds} s"):
            ASKED[asked](client)
        client.close()


@pytest.mark.usefixtures("brief")
def test_a_server_that_stops_within_an_answer_is_given_up() -> None:
    with hostile(_cut_short) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        with pytest.raises(NbdSilentError, match="did not answer"):
            client.read(0, SIZE)
        client.close()


@pytest.mark.usefixtures("brief")
def test_a_server_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_FAREWELL_SECONDS", 0.1)
    _gone.clear()
    with hostile(_stopped) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        with pytest.raises(NbdSilentError, match="took nothing"):
            client.write(bytes(SIZE), 0)
        client.close()
        _gone.set()


def test_one_that_is_slow_but_goes_on_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_SLOWEST", 1)
    monkeypatch.setattr(client_module, "REPLY_SECONDS", 0.5)

    def script(raw: Raw) -> None:
        negotiate(raw, contexts=[(1, p.ALLOCATION)])
        _command, cookie, _offset, _length = request(raw)
        answer = p.CHUNK.pack(p.CHUNK_MAGIC, 1, p.CHUNK_DATA, cookie, 8 + 4) + p.U64.pack(0) + b"data"
        for at in range(0, len(answer), 4):
            time.sleep(0.1)
            raw.send(answer[at : at + 4])

    with hostile(script) as sock:
        client = NbdClient.connect(sock, "disk", contexts=[p.ALLOCATION], timeout=PATIENCE)
        assert client.read(0, 4) == b"data"
        client.close()

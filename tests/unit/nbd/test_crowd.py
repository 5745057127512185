"""Many clients at once, and slow ones: each has a bound, and none is in the way of a well-behaved one."""

from __future__ import annotations

import resource
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.server import NbdServer
from tests.kit.serve import wait_until
from tests.unit.nbd.peers import SIZE, DiskExport, Raw

CROWD = 3000
CONNECTIONS = 40
_MEMORY = 96 << 20
"""What all clients together may add to the server's memory."""


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[tuple[NbdServer, Path]]:
    export = DiskExport()
    server = NbdServer(lambda: {"disk": export}, max_connections=CONNECTIONS, handshake_timeout=3.0)
    path = server.listen_unix(tmp_path / "nbd.sock")
    yield server, path
    server.stop(10)
    assert server.connections() == 0


def _connected(path: Path) -> Raw:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    sock.settimeout(20)
    return Raw(sock)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _well_behaved(path: Path) -> None:
    client = NbdClient.connect(f"nbd+unix:///disk?socket={path}", timeout=10)
    client.write(b"still here", 77)
    assert client.read(77, 10) == b"still here"
    client.close()


def test_thousands_that_connect_and_say_nothing(listening: tuple[NbdServer, Path]) -> None:
    """No more than the cap are held, in threads and in memory; and they are gone when their time is up."""
    server, path = listening
    threads, memory, most, held = threading.active_count(), _resident(), 0, []
    for _ in range(CROWD):
        held.append(_connected(path))
        most = max(most, server.connections())
        assert threading.active_count() <= threads + CONNECTIONS
        if len(held) > 200:
            held.pop(0).close()
    assert most <= CONNECTIONS
    assert _resident() - memory < _MEMORY
    for raw in held:
        raw.close()
    wait_until(lambda: not server.connections(), "the crowd is gone")
    _well_behaved(path)
    wait_until(lambda: threading.active_count() <= threads, "their threads are gone")


def test_a_full_house_of_slow_handshakes_is_empty_after_the_deadline(listening: tuple[NbdServer, Path]) -> None:
    server, path = listening
    slow = [_connected(path) for _ in range(CONNECTIONS)]
    for raw in slow:
        raw.greet()
    begun = time.monotonic()
    late = _connected(path)
    assert late.hung_up()
    late.close()
    while server.connections():
        for raw in slow:
            try:
                raw.send(b"I")
            except OSError:
                pass
        assert time.monotonic() < begun + 10
        time.sleep(0.2)
    _well_behaved(path)
    for raw in slow:
        raw.close()


def test_half_sent_payloads_take_no_memory_and_are_in_nobodys_way(listening: tuple[NbdServer, Path]) -> None:
    """A write of 32 MiB is announced by many, and a few bytes of it sent: what was not sent is not held."""
    server, path = listening
    half = [_connected(path).go() for _ in range(CONNECTIONS - 1)]
    memory = _resident()
    for raw in half:
        raw.request(p.WRITE, 0, p.MAX_PAYLOAD, payload=b"half")
    _well_behaved(path)
    assert _resident() - memory < _MEMORY
    for raw in half:
        raw.close()
    wait_until(lambda: not server.connections(), "they are gone")


def test_clients_that_never_read_hold_a_bounded_memory(
    listening: tuple[NbdServer, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks for far more than it takes, and is dropped; meanwhile another is served."""
    server, path = listening
    monkeypatch.setattr("incbak.nbd.connection.SEND_TIMEOUT", 1)
    deaf = [_connected(path).go() for _ in range(10)]
    memory = _resident()
    for raw in deaf:
        raw.sock.setblocking(False)
        for _ in range(500):
            try:
                raw.request(p.READ, 0, SIZE)
            except BlockingIOError:
                break
    _well_behaved(path)
    assert _resident() - memory < 10 * (64 << 20) // 2
    wait_until(lambda: not server.connections(), "they are dropped")
    for raw in deaf:
        raw.close()

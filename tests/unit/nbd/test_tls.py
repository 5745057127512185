"""TLS on both ends: that nothing goes without it, that certificates are looked at, that the data path is whole."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdError, NbdProtocolError, UsageError
from incbak.nbd import connection, tls
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.greeting import Greeting, TlsWish
from incbak.nbd.server import NbdServer
from incbak.nbd.tls import Tunnel, client_context, server_context
from incbak.nbd.uri import NbdUri, UriTls
from incbak.nbd.wire import close_hard
from tests.kit.certs import Authority, openssl
from tests.kit.serve import wait_until
from tests.unit.nbd.peers import PATIENCE, SIZE, DiskExport, Raw, hostile, string


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def certs(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the certificates of a server and of a client."""
    return authority.issue(tmp_path_factory.mktemp("certs"), "server", "client")


@dataclass
class Served:
    """A server on TCP."""

    server: NbdServer
    port: int
    export: DiskExport

    def uri(self, certs: Path | None = None, hostname: str | None = None) -> NbdUri:
        wish = UriTls(str(certs) if certs else None, hostname)
        return NbdUri("disk", host="127.0.0.1", port=self.port, tls=wish)

    def connect(self, certs: Path | None = None, hostname: str | None = None, window: int = 16) -> NbdClient:
        return NbdClient.connect(self.uri(certs, hostname), timeout=PATIENCE, window=window)

    def raw(self) -> Raw:
        return Raw(socket.create_connection(("127.0.0.1", self.port)))

    def tls(self, certs: Path) -> Raw:
        """Through STARTTLS, by hand."""
        raw = self.raw().greet()
        assert raw.ask(p.OPT_STARTTLS) == p.REP_ACK
        return Raw(client_context(certs, hostname="localhost").wrap_socket(raw.sock, server_hostname="localhost"))


@contextmanager
def serving(
    directory: Path | None, *, verify: bool = False, export: DiskExport | None = None, timeout: float = 10.0
) -> Iterator[Served]:
    export = export or DiskExport()
    context = server_context(directory, verify_peer=verify) if directory else None
    server = NbdServer(lambda: {"disk": export}, tls=context, handshake_timeout=timeout)
    _host, port = server.listen_tcp("127.0.0.1", 0)
    try:
        yield Served(server, port, export)
    finally:
        server.stop(PATIENCE)
        assert server.connections() == 0


@pytest.fixture
def served(certs: Path) -> Iterator[Served]:
    with serving(certs) as made:
        yield made


# -- what goes through -------------------------------------------------------------------------------------------------


def test_requests_go_through_whole(served: Served, certs: Path) -> None:
    """Random sizes, many in flight, both ways; then the image is what a byte array says."""
    client, rng, model = served.connect(certs, window=64), random.Random(1), bytearray(SIZE)
    for _ in range(200):
        offset = rng.randrange(SIZE)
        data = rng.randbytes(min(rng.choice([1, 511, 16384, 16385, 70_000, SIZE]), SIZE - offset))
        client.submit_write(data, offset)
        model[offset : offset + len(data)] = data
        if rng.random() < 0.1:
            client.submit_read_into(memoryview(bytearray(SIZE)), 0)
            client.drain()
    client.flush()
    assert client.read(0, SIZE) == model
    client.close()
    wait_until(lambda: served.export.closed == 1, "the device is closed with the connection")


def test_large_reads_and_writes_in_flight_do_not_block_each_other(served: Served, certs: Path) -> None:
    client = served.connect(certs, window=64)
    buf = memoryview(bytearray(SIZE))
    for i in range(12):
        client.submit_read_into(buf, 0)
        client.submit_write(bytes([i]) * SIZE, 0)
    client.drain()
    assert client.read(0, SIZE) == bytes([11]) * SIZE
    client.close()


def test_clients_at_once(served: Served, certs: Path) -> None:
    done: list[int] = []

    def work(number: int) -> None:
        client = served.connect(certs)
        for _ in range(30):
            client.write(bytes([number]) * 4096, number * 8192)
            assert client.read(number * 8192, 4096) == bytes([number]) * 4096
        client.close()
        done.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE * 3)
    assert sorted(done) == list(range(8))


def test_an_option_in_one_piece_with_the_end_of_the_handshake(served: Served, certs: Path) -> None:
    raw = served.raw().greet()
    assert raw.ask(p.OPT_STARTTLS) == p.REP_ACK
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    inside = client_context(certs, hostname="localhost").wrap_bio(incoming, outgoing, server_hostname="localhost")
    while True:
        try:
            inside.do_handshake()
            break
        except ssl.SSLWantReadError:
            raw.send(outgoing.read())
            incoming.write(raw.sock.recv(65536))
    inside.write(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STRUCTURED, 0))
    raw.send(outgoing.read())
    incoming.write(raw.sock.recv(65536))
    assert inside.read(100) == p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_STRUCTURED, p.REP_ACK, 0)
    raw.close()


def test_nothing_is_readable_on_the_way(certs: Path) -> None:
    """Between client and server there is somebody who looks at every byte."""
    seen = bytearray()
    secret = b"a secret of the guest" * 20
    with serving(certs) as there, socket.create_server(("127.0.0.1", 0)) as between:
        port = between.getsockname()[1]
        threading.Thread(target=_relay, args=(between, there.port, seen), daemon=True).start()
        uri = NbdUri("disk", host="127.0.0.1", port=port, tls=UriTls(str(certs)))
        client = NbdClient.connect(uri, timeout=PATIENCE)
        client.write(secret, 0)
        assert client.read(0, len(secret)) == secret
        client.close()
    assert len(seen) > 2 * len(secret)
    assert secret[:8] not in seen
    assert b"disk" not in seen


def _relay(listener: socket.socket, port: int, seen: bytearray) -> None:
    here, _address = listener.accept()
    there = socket.create_connection(("127.0.0.1", port))

    def pump(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                seen.extend(data)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)

    threading.Thread(target=pump, args=(there, here), daemon=True).start()
    pump(here, there)


def test_the_end_of_the_server_lets_requests_end(certs: Path) -> None:
    """What was answered goes out through TLS before the connection goes."""
    goes_on = threading.Event()
    faults = Faults(stall={"write": goes_on})
    with serving(certs, export=DiskExport(FaultyDisk(MemoryDisk(SIZE), faults))) as there:
        there.export.may_block = lambda _offset, _length: True
        raw = there.tls(certs)
        assert raw.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
        raw.request(p.WRITE, 0, 4, payload=b"last")
        wait_until(lambda: there.export.calls, "the write has begun")
        threading.Timer(0.5, goes_on.set).start()
        there.server.stop(PATIENCE)
        assert raw.simple() == (0, 7)
        assert raw.hung_up()
        assert there.export.disk.read(0, 4) == b"last"


def test_nothing_is_left_of_a_connection(served: Served, certs: Path) -> None:
    """Descriptors and threads, also of those that break off anywhere."""

    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd"))

    def tunnels() -> int:
        return sum(t.name == "nbd-tls" for t in threading.enumerate())

    before = descriptors()
    for _ in range(5):
        served.connect(certs).close()
        served.connect(certs).abort()
        raw = served.raw().greet()
        raw.ask(p.OPT_STARTTLS)
        raw.close()
        broken = served.tls(certs)
        broken.sock.close()
    wait_until(lambda: served.server.connections() == 0 and tunnels() == 0, "every connection is over")
    wait_until(lambda: descriptors() <= before, "descriptors are given back")


# -- nothing without it ------------------------------------------------------------------------------------------------


OPTIONS = [p.OPT_LIST, p.OPT_INFO, p.OPT_GO, p.OPT_STRUCTURED, p.OPT_LIST_META, p.OPT_SET_META, 4, 99]


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_before_tls_is_refused(served: Served, option: int) -> None:
    """faults row 74: also that of a name that is there, and none is told."""
    raw = served.raw().greet()
    for data in (b"", string("disk") + bytes(2)):
        assert raw.option(option, data) == [(p.ERR_TLS_REQD, b"this server wants TLS")]
    assert served.export.opened == 0
    raw.close()


def test_the_old_way_in_is_shut(served: Served) -> None:
    raw = served.raw().greet()
    raw.send(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk")
    assert raw.hung_up()
    assert served.export.opened == 0


def test_abort_before_tls(served: Served) -> None:
    raw = served.raw().greet()
    assert raw.ask(p.OPT_ABORT) == p.REP_ACK
    assert raw.hung_up()


def test_the_words_of_starttls(served: Served, certs: Path) -> None:
    """With data it is malformed, twice as well; both times the connection goes on."""
    raw = served.raw().greet()
    assert raw.ask(p.OPT_STARTTLS, b"x") == p.ERR_INVALID
    assert raw.ask(p.OPT_STARTTLS) == p.REP_ACK
    inside = Raw(client_context(certs, hostname="localhost").wrap_socket(raw.sock, server_hostname="localhost"))
    assert inside.ask(p.OPT_STARTTLS) == p.ERR_INVALID
    assert inside.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
    assert inside.alive()
    inside.close()


@pytest.mark.parametrize("more", [p.OPTION.pack(p.OPTION_MAGIC, p.OPT_LIST, 0), b"\x16\x03\x01", b"x"])
def test_bytes_before_the_handshake_end_the_connection(served: Served, more: bytes) -> None:
    """faults row 64: whoever speaks before TLS is answered to may be somebody else than who speaks after it."""
    raw = served.raw().greet()
    raw.send(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STARTTLS, 0) + more)
    assert raw.hung_up()


@pytest.mark.parametrize("option", [p.OPT_STRUCTURED, p.OPT_EXTENDED])
def test_what_was_agreed_on_before_tls_is_forgotten(certs: Path, option: int) -> None:
    """On a Unix socket TLS may come late; then nothing counts of what came before it."""
    export = DiskExport()
    server = NbdServer(lambda: {"disk": export}, tls=server_context(certs, verify_peer=False))
    ours, theirs = socket.socketpair()
    server.start_connection(theirs)
    raw = Raw(ours).greet()
    assert raw.ask(option) == p.REP_ACK
    assert raw.meta(p.OPT_SET_META, p.ALLOCATION) == [(1, p.ALLOCATION)]
    assert raw.ask(p.OPT_STARTTLS) == p.REP_ACK
    inside = Raw(client_context(certs, hostname="localhost").wrap_socket(raw.sock, server_hostname="localhost"))
    assert inside.meta(p.OPT_SET_META, p.ALLOCATION) == [(p.ERR_INVALID, "")]
    assert inside.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
    inside.request(p.READ, 0, 4)
    assert inside.simple() == (0, 7)
    assert inside.recv(4) == bytes(4)
    inside.request(p.STATUS, 0, 4)
    assert inside.simple()[0] == 22
    inside.close()
    server.stop(PATIENCE)


def test_a_unix_socket_does_without(certs: Path, tmp_path: Path) -> None:
    export = DiskExport()
    server = NbdServer(lambda: {"disk": export}, tls=server_context(certs, verify_peer=True))
    path = server.listen_unix(tmp_path / "s")
    for wish in (None, UriTls(str(certs)), UriTls(str(certs), "localhost")):
        client = NbdClient.connect(NbdUri("disk", path=str(path), tls=wish), timeout=PATIENCE)
        assert client.read(0, 4) == bytes(4)
        client.close()
    server.stop(PATIENCE)


def test_a_client_that_was_not_told(served: Served) -> None:
    with pytest.raises(NbdProtocolError, match="wants TLS") as caught:
        NbdClient.connect(NbdUri("disk", host="127.0.0.1", port=served.port), timeout=PATIENCE)
    assert "nbds://" in caught.value.hint


def test_a_client_that_was_told_goes_on_with_nothing_else(certs: Path) -> None:
    """Not even where somebody between the two takes STARTTLS away."""
    with serving(None) as there, pytest.raises(NbdProtocolError, match="does not do TLS"):
        there.connect(certs)
    heard: list[bytes] = []

    def unfixed(raw: Raw) -> None:
        raw.send(p.NBD_MAGIC + p.OPTION_MAGIC + bytes(2))
        heard.append(raw.recv(4) + raw.sock.recv(100))

    def policy(raw: Raw) -> None:
        _ask_for_tls(raw)
        raw.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_STARTTLS, p.ERR_POLICY, 0))
        heard.append(raw.sock.recv(100))

    for script in (unfixed, policy):
        with hostile(script) as sock, pytest.raises(NbdProtocolError, match="does not do TLS"):
            greet(sock, certs)
    assert heard == [bytes(4), b""]


def test_a_server_that_speaks_before_the_handshake(certs: Path) -> None:
    def script(raw: Raw) -> None:
        _ask_for_tls(raw)
        raw.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_STARTTLS, p.REP_ACK, 0) + b"more")
        assert raw.sock.recv(100) == b"", "the client went on"

    with hostile(script) as sock, pytest.raises(NbdProtocolError, match="between"):
        greet(sock, certs)


def _ask_for_tls(raw: Raw) -> None:
    raw.send(p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES))
    raw.recv(4)
    assert raw.recv(16) == p.OPTION.pack(p.OPTION_MAGIC, p.OPT_STARTTLS, 0)


def greet(sock: socket.socket, certs: Path, patience: float = PATIENCE) -> None:
    """As a client that wants TLS."""
    wish = TlsWish(client_context(certs, hostname="localhost"), "localhost")
    greeting = Greeting(sock, time.monotonic() + patience, wish)
    try:
        greeting.run("disk", ())
    finally:
        greeting.close()


# -- bounds ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("drips", [False, True])
def test_the_handshake_has_a_deadline(certs: Path, drips: bool) -> None:
    """faults row 66: whether the client says nothing, or a little now and then; a good one gets through."""
    with serving(certs, timeout=1.5) as there:
        raw = there.raw().greet()
        assert raw.ask(p.OPT_STARTTLS) == p.REP_ACK
        began = time.monotonic()
        hello = [b"\x16\x03\x01\x02\x00", *[b"\x01"] * 1000]
        client = there.connect(certs)
        while time.monotonic() - began < PATIENCE and there.server.connections() > 1:
            if drips:
                with suppress(OSError):
                    raw.send(hello.pop(0))
            time.sleep(0.02)
        assert 1 < time.monotonic() - began < PATIENCE
        assert client.read(0, 4) == bytes(4)
        client.close()
        raw.close()


def test_the_deadline_holds_for_options_inside_tls(certs: Path) -> None:
    with serving(certs, timeout=1.5) as there:
        inside = there.tls(certs)
        assert inside.ask(p.OPT_STRUCTURED) == p.REP_ACK
        assert inside.hung_up()


def test_a_clients_handshake_has_a_deadline(certs: Path) -> None:
    def script(raw: Raw) -> None:
        _ask_for_tls(raw)
        raw.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, p.OPT_STARTTLS, p.REP_ACK, 0))
        while raw.sock.recv(4096):
            pass

    with hostile(script) as sock, pytest.raises(NbdProtocolError, match="took too long over the TLS handshake"):
        greet(sock, certs, 1)


def test_a_client_that_does_not_read_is_dropped(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 68; and what waits for it meanwhile is bounded."""
    monkeypatch.setattr(connection, "SEND_TIMEOUT", 1)
    monkeypatch.setattr(tls, "LINGER", 0.5)
    with serving(certs, export=DiskExport(MemoryDisk(8 << 20))) as there:
        inside = there.tls(certs)
        assert inside.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
        with suppress(OSError):
            for _ in range(64):
                inside.request(p.READ, 0, 8 << 20)
        wait_until(lambda: there.server.connections() == 0, "the client is dropped")
        inside.close()


def test_a_peer_that_only_makes_us_answer_is_no_longer_heard(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What TLS itself makes us say, such as new keys, does not pile up where nobody reads it."""

    def answers(self: Tunnel, sealed: bytes) -> tuple[bytes, bool]:
        self._outgoing.write(sealed)
        return b"", True

    monkeypatch.setattr(tls, "LINGER", 0.5)
    monkeypatch.setattr(Tunnel, "_opened", answers)
    outer, theirs = socket.socketpair()
    tunnel = Tunnel(theirs, server_context(certs, verify_peer=False))
    tunnel.start()
    outer.settimeout(1)
    sent = 0
    with pytest.raises(TimeoutError):
        while sent < 16 << 20:
            sent += outer.send(bytes(65536))
    assert sent < 4 << 20
    tunnel.close()
    outer.close()


def test_a_client_that_breaks_off_leaves_nothing_behind(certs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the server does not read what was on its way."""
    monkeypatch.setattr(tls, "LINGER", 0.5)
    outer, theirs = socket.socketpair()
    server = server_context(certs, verify_peer=False)
    shaking = threading.Thread(target=lambda: server.wrap_socket(theirs, server_side=True).detach())
    shaking.start()
    tunnel = Tunnel(outer, client_context(certs, hostname=None))
    tunnel.shake_hands(time.monotonic() + PATIENCE)
    shaking.join()
    tunnel.start()
    tunnel.inner.settimeout(0.5)
    with pytest.raises(TimeoutError):
        while True:
            tunnel.inner.sendall(bytes(65536))
    close_hard(tunnel.inner)
    assert tunnel._thread
    tunnel._thread.join(PATIENCE)
    assert not tunnel._thread.is_alive()


# -- certificates ------------------------------------------------------------------------------------------------------


def refused(there: Served, certs: Path, match: str, hostname: str | None = None) -> None:
    """Our client is refused, or refuses, and says why; nothing was opened."""
    with pytest.raises(NbdError, match=match) as caught:
        there.connect(certs, hostname)
    assert "certificates" in caught.value.hint
    assert there.export.opened == 0


def test_a_server_of_another_authority(served: Served, tmp_path: Path) -> None:
    other = Authority(tmp_path / "other").issue(tmp_path / "theirs")
    refused(served, other, "unable to get local issuer|self-signed|self signed|certificate verify failed")
    with pytest.raises(NbdError, match="TLS handshake failed"):
        served.connect(None)


def test_a_server_of_another_name(served: Served, certs: Path) -> None:
    refused(served, certs, "Hostname mismatch", "other.example")
    served.connect(certs, "localhost").close()


def test_a_server_whose_certificate_is_over(authority: Authority, tmp_path: Path) -> None:
    with serving(authority.issue(tmp_path / "old", "server", days=-1)) as there:
        refused(there, tmp_path / "old", "expired")


def test_a_certificate_for_clients_makes_no_server(authority: Authority, tmp_path: Path) -> None:
    made = authority.issue(tmp_path / "swapped", "client")
    for part in ("cert", "key"):
        (made / f"client-{part}.pem").rename(made / f"server-{part}.pem")
    with serving(made) as there:
        refused(there, made, "unsuitable certificate purpose|unsupported certificate purpose")


def test_a_client_must_show_a_certificate(authority: Authority, certs: Path, tmp_path: Path) -> None:
    """None, one of another authority, one that is over, one for servers: refused. The right one is taken."""
    nothing = authority.issue(tmp_path / "nothing")
    stranger = Authority(tmp_path / "other").issue(tmp_path / "stranger", "client")
    (stranger / "ca-cert.pem").write_bytes((certs / "ca-cert.pem").read_bytes())
    over = authority.issue(tmp_path / "over", "client", days=-1)
    wrong = authority.issue(tmp_path / "wrong", "server")
    for part in ("cert", "key"):
        (wrong / f"server-{part}.pem").rename(wrong / f"client-{part}.pem")
    with serving(certs, verify=True) as there:
        refused(there, nothing, "certificate required|handshake failure")
        refused(there, stranger, "unknown ca")
        refused(there, over, "certificate expired")
        refused(there, wrong, "unsupported certificate|bad certificate|certificate")
        client = there.connect(certs)
        assert client.read(0, 4) == bytes(4)
        client.close()


def test_a_certificate_that_was_revoked(authority: Authority, certs: Path, tmp_path: Path) -> None:
    bad = authority.issue(tmp_path / "bad", "client")
    strict = authority.issue(tmp_path / "strict", "server")
    authority.revoke(bad / "client-cert.pem", strict)
    with serving(strict, verify=True) as there:
        refused(there, bad, "certificate revoked")
        there.connect(certs).close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions_of_tls_are_refused(served: Served, certs: Path) -> None:
    raw = served.raw().greet()
    assert raw.ask(p.OPT_STARTTLS) == p.REP_ACK
    context = client_context(certs, hostname=None)
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.raises(ssl.SSLError):
        context.wrap_socket(raw.sock)


def _encrypt(directory: Path) -> None:
    openssl(directory, "ec", "-in", "server-key.pem", "-out", "k.pem", "-aes128", "-passout", "pass:x")
    (directory / "k.pem").replace(directory / "server-key.pem")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: (d / "server-cert.pem").unlink(), "cannot read .*server-cert.pem: No such file"),
        (lambda d: (d / "server-key.pem").unlink(), "cannot read .*server-key.pem: No such file"),
        (lambda d: (d / "ca-cert.pem").unlink(), "cannot read .*ca-cert.pem: No such file"),
        (lambda d: (d / "ca-cert.pem").write_text("nonsense"), "cannot use the certificates of .*ca-cert.pem"),
        (lambda d: (d / "server-cert.pem").write_text("nonsense"), "cannot use certificate .*server-cert.pem"),
        (lambda d: (d / "server-key.pem").write_bytes((d / "client-key.pem").read_bytes()), "values mismatch"),
        (_encrypt, "has a passphrase"),
    ],
)
def test_certificates_that_cannot_be_used(
    certs: Path, tmp_path: Path, spoil: Callable[[Path], object], message: str
) -> None:
    """Said at the start, by name; and nobody is asked for a passphrase."""
    for path in certs.glob("*.pem"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    server_context(tmp_path, verify_peer=True)
    spoil(tmp_path)
    with pytest.raises(UsageError, match=message):
        server_context(tmp_path, verify_peer=True)


def test_a_server_on_ipv6() -> None:
    """``[::1]:0`` is an address as any other."""
    if not socket.has_ipv6 or not _has_ipv6():
        pytest.skip("no IPv6 here")
    export = DiskExport()
    server = NbdServer(lambda: {"disk": export})
    host, port = server.listen_tcp("::1", 0)
    client = NbdClient.connect(NbdUri("disk", host=host, port=port), timeout=PATIENCE)
    assert client.read(0, 4) == bytes(4)
    client.close()
    server.stop(PATIENCE)


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True

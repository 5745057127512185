"""TLS: certificates from a directory, as libnbd and QEMU lay it out, and a tunnel between TLS and a plain socket.

The directory has ``ca-cert.pem``, and ``server-cert.pem`` with ``server-key.pem`` or ``client-cert.pem`` with
``client-key.pem``; ``ca-crl.pem``, if it is there, names certificates that are revoked.

A TLS connection of OpenSSL may be used by one thread at a time, while an NBD connection is read by one thread and
written by others. So one thread of the `Tunnel` has it to itself, and passes what it carries through a pair of sockets
to whoever speaks NBD, who needs to know nothing of it: the path of a plain connection stays as it is. At most `CHUNK`
bytes wait each way, beside what the kernel holds for the pair.
"""

from __future__ import annotations

import select
import socket
import ssl
import threading
import time
from contextlib import suppress
from pathlib import Path

from incbak.errors import NbdError, NbdProtocolError, UsageError
from incbak.nbd.wire import close_hard
from incbak.opening import open_text

CHUNK = 256 << 10
LINGER = 5.0
"""Seconds that what was said last may take to go out."""
_HANDSHAKE_LIMIT = 1 << 20
"""Bytes that a peer may send before the handshake is over."""
_CONTROL_LIMIT = 2 * CHUNK
"""Bytes to be sent at which nothing more is read: a peer can make us answer to what carries no data."""


def server_context(directory: Path, *, verify_peer: bool) -> ssl.SSLContext:
    """For a server; with ``verify_peer`` clients must show a certificate of the CA. Raises `UsageError`."""
    context = _context(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0
    _load_own(context, directory, "server")
    if verify_peer:
        _load_ca(context, directory)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(directory: Path | None, *, hostname: str | None) -> ssl.SSLContext:
    """For a client of ``hostname`` that believes the CA in ``directory``, or else those of the system.

    It shows its own certificate where the directory has one. Raises `UsageError`.
    """
    context = _context(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = hostname is not None
    if directory is None:
        context.load_default_certs()
        return context
    _load_ca(context, directory)
    if (directory / "client-cert.pem").exists():
        _load_own(context, directory, "client")
    return context


def _context(protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION
    return context


def _load_own(context: ssl.SSLContext, directory: Path, role: str) -> None:
    certificate, key = directory / f"{role}-cert.pem", directory / f"{role}-key.pem"
    for path in (certificate, key):
        _readable(path)
    try:
        context.load_cert_chain(certificate, key, password=_no_passphrase)
    except ssl.SSLError as e:
        raise UsageError(f"cannot use certificate {certificate} with key {key}: {_reason(e)}") from e


def _load_ca(context: ssl.SSLContext, directory: Path) -> None:
    authority, revoked = directory / "ca-cert.pem", directory / "ca-crl.pem"
    _readable(authority)
    try:
        context.load_verify_locations(authority)
        if revoked.exists():
            _readable(revoked)
            context.load_verify_locations(revoked)
            context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF
    except (ssl.SSLError, OSError) as e:
        raise UsageError(f"cannot use the certificates of {authority}: {e}") from e


def _readable(path: Path) -> None:
    try:
        open_text(path).close()
    except OSError as e:
        hint = "The directory needs ca-cert.pem, and a certificate and key as libnbd and QEMU name them."
        raise UsageError(f"cannot read {path}: {e.strerror}", hint=hint) from e


def _no_passphrase() -> str:
    raise UsageError("the TLS key has a passphrase", hint="Give a key without one, in a directory that is private.")


def _reason(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    return (error.reason or str(error)).lower().replace("_", " ")


def refuse_early_bytes(sock: socket.socket) -> None:
    """Raises `NbdProtocolError` where the peer did not wait for TLS: what it said so far, anybody may have said."""
    sock.settimeout(0)
    with suppress(BlockingIOError):
        if sock.recv(1, socket.MSG_PEEK):
            raise NbdProtocolError("the peer sent something between the request for TLS and the handshake")


class Tunnel:
    """TLS on ``outer``, which it owns from now on; whoever has `inner` speaks plainly. `start` after `shake_hands`."""

    def __init__(self, outer: socket.socket, context: ssl.SSLContext, *, hostname: str | None = None) -> None:
        self._outer = outer
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        server = context.protocol == ssl.PROTOCOL_TLS_SERVER
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=server, server_hostname=hostname)
        self.inner, self._plain = socket.socketpair()
        self._thread: threading.Thread | None = None
        self.error = ""
        """Why TLS ended, if not as it should."""

    # -- the handshake --------------------------------------------------------------------------------------------

    def shake_hands(self, deadline: float) -> None:
        """Be done by ``deadline``, a `time.monotonic` time. Raises `NbdProtocolError`; an alert tells the peer."""
        received = 0
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                self._send_handshake(deadline)
                received += self._receive_handshake(deadline)
                if received > _HANDSHAKE_LIMIT:
                    raise NbdProtocolError("the peer's TLS handshake is too long") from None
            except ssl.SSLError as e:
                with suppress(NbdError, OSError):
                    self._send_handshake(deadline)
                raise NbdProtocolError(f"TLS handshake failed: {_reason(e)}") from e
            else:
                self._send_handshake(deadline)
                return

    def _arm(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise NbdProtocolError("the peer took too long over the TLS handshake")
        self._outer.settimeout(left)

    def _send_handshake(self, deadline: float) -> None:
        if data := self._outgoing.read():
            self._arm(deadline)
            try:
                self._outer.sendall(data)
            except TimeoutError:
                raise NbdProtocolError("the peer took too long over the TLS handshake") from None

    def _receive_handshake(self, deadline: float) -> int:
        self._arm(deadline)
        try:
            data = self._outer.recv(16384)
        except TimeoutError:
            raise NbdProtocolError("the peer took too long over the TLS handshake") from None
        if not data:
            raise NbdProtocolError("the peer closed the connection in the TLS handshake")
        self._incoming.write(data)
        return len(data)

    # -- passing on -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Pass on, in a thread of its own, until `inner` is closed; then the peer's connection is closed too."""
        self._thread = threading.Thread(target=self._run, name="nbd-tls", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close `inner`, let what was said last go out, close all."""
        close_hard(self.inner)
        if self._thread:
            self._thread.join(2 * LINGER)
        close_hard(self._plain)
        close_hard(self._outer)

    def _run(self) -> None:
        for sock in (self._outer, self._plain):
            sock.settimeout(0)
        try:
            self._pass_on()
        except ssl.SSLError as e:
            self.error = _reason(e)
            self._say_last()
        except (OSError, ValueError) as e:
            self.error = self.error or str(e)
        finally:
            close_hard(self._plain)
            close_hard(self._outer)

    def _pass_on(self) -> None:
        to_plain, hears = self._opened(b"")  # what came in one piece with the end of the handshake
        to_outer, ends = self._outgoing.read(), False
        deadline = float("inf")
        while to_outer or not ends:
            reads_outer = hears and not to_plain and len(to_outer) < _CONTROL_LIMIT
            reads_plain = not ends and not to_outer
            if self._wait((reads_outer, bool(to_outer)), (reads_plain, bool(to_plain)), deadline):
                deadline = time.monotonic() + LINGER
            if reads_outer and (sealed := _receive(self._outer)) is not None:
                to_plain, hears = self._opened(sealed) if sealed else (b"", False)
                to_outer += self._outgoing.read()
            if to_plain:
                try:
                    to_plain = _send(self._plain, to_plain)
                except BrokenPipeError:  # nobody wants it; what was said before that still goes out
                    to_plain, hears = b"", False
            if not hears and not to_plain:
                with suppress(OSError):
                    self._plain.shutdown(socket.SHUT_WR)
            if reads_plain and (said := _receive(self._plain)) is not None:
                ends = not said
                to_outer += self._sealed(said)
                deadline = min(deadline, time.monotonic() + LINGER) if ends else deadline
            if to_outer:
                to_outer = _send(self._outer, to_outer)

    def _wait(self, outer: tuple[bool, bool], plain: tuple[bool, bool], deadline: float) -> bool:
        """Until one of them is ready for what is wanted of it, or `inner` is known to be closed: then true, once."""
        left = deadline - time.monotonic()
        poll = select.poll()
        for sock, (reads, writes) in ((self._outer, outer), (self._plain, plain)):
            events = (select.POLLIN if reads else 0) | (select.POLLOUT if writes else 0)
            if events or (sock is self._plain and left == float("inf")):
                poll.register(sock, events)  # what hung up wakes also whoever asks nothing of it
        ready = dict(poll.poll(None if left == float("inf") else max(left, 0) * 1000))
        if left != float("inf") and (left <= 0 or not ready):
            raise TimeoutError("the peer does not read")
        return left == float("inf") and bool(ready.get(self._plain.fileno(), 0) & select.POLLHUP)

    def _opened(self, sealed: bytes) -> tuple[bytes, bool]:
        """What the peer said, and whether more may come. An end without TLS's own is kept from TLS: it would take
        that for an error, and let nothing out any more.
        """
        self._incoming.write(sealed)
        parts: list[bytes] = []
        while True:
            try:
                part = self._tls.read(CHUNK)
            except ssl.SSLWantReadError:
                return b"".join(parts), True
            except ssl.SSLZeroReturnError:
                return b"".join(parts), False
            if not part:
                return b"".join(parts), False
            parts.append(part)

    def _sealed(self, said: bytes) -> bytes:
        """What to send for it; for nothing, the end of TLS."""
        if said:
            self._tls.write(said)
        else:
            with suppress(ssl.SSLError):
                self._tls.unwrap()
        return self._outgoing.read()

    def _say_last(self) -> None:
        """An alert tells the peer why we hang up."""
        with suppress(OSError, ValueError):
            self._outer.send(self._outgoing.read())


def _receive(sock: socket.socket) -> bytes | None:
    """What is there, nothing at the end, `None` while there is nothing."""
    try:
        return sock.recv(CHUNK)
    except BlockingIOError:
        return None


def _send(sock: socket.socket, data: bytes) -> bytes:
    """What could not be sent now."""
    try:
        return data[sock.send(data) :]
    except BlockingIOError:
        return data

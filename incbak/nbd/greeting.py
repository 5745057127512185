"""The client's side of negotiation. Trusts no server: bounded in time, replies and bytes."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from incbak.errors import NbdError, NbdProtocolError, UsageError
from incbak.nbd import protocol as p
from incbak.nbd.protocol import Dialect
from incbak.nbd.tls import Tunnel, client_context, refuse_early_bytes
from incbak.nbd.uri import NbdUri
from incbak.nbd.wire import ClosedError, Wire, close_hard

MAX_SIZE = 1 << 60
_MAX_REPLY = 1 << 20
_MAX_REPLIES = 64
"""Replies that a server may send for one option."""
_HANDSHAKE = 30.0
"""Seconds for TLS where the caller sets no limit."""


@dataclass
class Offer:
    """What negotiation ended with."""

    size: int = 0
    flags: int = 0
    max_payload: int = p.MAX_PAYLOAD
    contexts: dict[str, int] = field(default_factory=dict)
    dialect: Dialect = Dialect.SIMPLE


@dataclass
class TlsWish:
    """TLS as the client wants it: whom the server's certificate has to name, if anybody."""

    context: ssl.SSLContext
    hostname: str | None

    @classmethod
    def of(cls, uri: NbdUri) -> TlsWish | None:
        """What a URI asks for. Raises `UsageError` when its certificates cannot be used."""
        if uri.tls is None:
            return None
        directory = Path(uri.tls.certificates) if uri.tls.certificates is not None else None
        hostname = uri.tls.hostname or uri.host
        return cls(client_context(directory, hostname=hostname), hostname)


class Greeting:
    """One connection's negotiation; afterwards `sock` is the one to speak on. With ``tls`` nothing goes without it;
    ``dialect`` is the best to ask for.
    """

    def __init__(
        self,
        sock: socket.socket,
        deadline: float | None,
        tls: TlsWish | None = None,
        dialect: Dialect = Dialect.EXTENDED,
    ) -> None:
        self.sock, self._deadline, self._tls, self._dialect = sock, deadline, tls, dialect
        self._tunnel: Tunnel | None = None
        self._offer = Offer()

    def run(self, name: str, contexts: Sequence[str]) -> Offer:
        """Negotiate an export. Raises `NbdError`, `UsageError` for a name that cannot be."""
        encoded = _encoded(name)
        try:
            self._negotiate(encoded, contexts)
        except (OSError, ClosedError) as e:
            if self._tunnel and self._tunnel.error:
                raise NbdProtocolError(f"the NBD server ended TLS: {self._tunnel.error}", hint=_HINT) from e
            why = (e.strerror or e) if isinstance(e, OSError) else e.message
            raise NbdError(f"the NBD server of export {p.printable(name)!r} went away: {why}") from e
        return self._offer

    def close(self) -> None:
        """After a failure."""
        if self._tunnel:
            self._tunnel.close()
        close_hard(self.sock)

    def _negotiate(self, encoded: bytes, contexts: Sequence[str]) -> None:
        wire = Wire(self.sock, self._deadline)
        head = wire.recv(18)
        (flags,) = p.U16.unpack_from(head, 16)
        if head[:16] != p.NBD_MAGIC + p.OPTION_MAGIC:
            raise NbdProtocolError("the server does not speak newstyle NBD")
        fixed = bool(flags & p.FLAG_FIXED_NEWSTYLE)
        wire.send(p.U32.pack(flags & (p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES)))
        if self._tls:
            wire = self._start_tls(wire, self._tls, fixed, p.printable(encoded.decode()))
        if fixed:
            self._offer.dialect = self._best_dialect(wire)
            if contexts and self._offer.dialect:
                self._set_contexts(wire, encoded, contexts)
            go = p.U32.pack(len(encoded)) + encoded + p.U16.pack(1) + p.U16.pack(p.INFO_BLOCK_SIZE)
            replies = self._ask(wire, p.OPT_GO, go)
        else:
            replies = [(p.ERR_UNSUP, b"")]
        if replies[-1][0] == p.ERR_UNSUP and self._offer.dialect is not Dialect.EXTENDED:  # they go with GO only
            self._export_name(wire, encoded, bool(flags & p.FLAG_NO_ZEROES))
        elif replies[-1][0] == p.ERR_TLS_REQD:
            raise NbdProtocolError("the server wants TLS", hint="Write nbds://HOST/EXPORT?tls-certificates=DIR.")
        elif replies[-1][0] != p.REP_ACK:
            name = p.printable(encoded.decode())
            raise NbdProtocolError(f"the server refuses export {name!r}: {_why(replies[-1])}")
        else:
            self._take_info([data for kind, data in replies if kind == p.REP_INFO])

    def _best_dialect(self, wire: Wire) -> Dialect:
        """Of what the server has: extended headers, structured replies, neither."""
        for option, dialect in ((p.OPT_EXTENDED, Dialect.EXTENDED), (p.OPT_STRUCTURED, Dialect.STRUCTURED)):
            if dialect <= self._dialect and self._ask(wire, option, b"")[0][0] == p.REP_ACK:
                return dialect
        return Dialect.SIMPLE

    def _start_tls(self, wire: Wire, tls: TlsWish, fixed: bool, name: str) -> Wire:
        """Never goes on without TLS where TLS was asked for."""
        reply = self._ask(wire, p.OPT_STARTTLS, b"")[-1] if fixed else (p.ERR_UNSUP, b"")
        if reply[0] != p.REP_ACK:
            raise NbdProtocolError(f"the server does not do TLS: {_why(reply)}", hint="Write nbd:// to do without.")
        refuse_early_bytes(self.sock)
        self._tunnel = Tunnel(self.sock, tls.context, hostname=tls.hostname)
        try:
            self._tunnel.shake_hands(self._deadline or time.monotonic() + _HANDSHAKE)
        except NbdProtocolError as e:
            raise NbdProtocolError(f"the NBD server of export {name!r}: {e.message}", hint=_HINT) from e
        self.sock = self._tunnel.inner
        self._tunnel.start()
        return Wire(self.sock, self._deadline)

    def _ask(self, wire: Wire, option: int, data: bytes) -> list[tuple[int, bytes]]:
        wire.send(p.OPTION.pack(p.OPTION_MAGIC, option, len(data)) + data)
        replies: list[tuple[int, bytes]] = []
        while len(replies) < _MAX_REPLIES:
            magic, echoed, kind, length = p.OPTION_REPLY.unpack(wire.recv(p.OPTION_REPLY.size))
            if magic != p.OPTION_REPLY_MAGIC or echoed != option or length > _MAX_REPLY:
                raise NbdProtocolError("malformed reply to an option")
            replies.append((kind, wire.recv(length) if length else b""))
            if kind == p.REP_ACK or kind & p.REP_ERROR:
                return replies
        raise NbdProtocolError("too many replies to an option")

    def _set_contexts(self, wire: Wire, name: bytes, contexts: Sequence[str]) -> None:
        data = p.U32.pack(len(name)) + name + p.U32.pack(len(contexts))
        for context in contexts:
            data += p.U32.pack(len(context.encode())) + context.encode()
        found = self._offer.contexts
        for kind, reply in self._ask(wire, p.OPT_SET_META, data):
            if kind == p.REP_META and len(reply) > 4:
                name_of = reply[4:].decode(errors="replace")
                if name_of not in contexts or name_of in found:
                    wrong = p.printable(name_of)
                    raise NbdProtocolError(f"the server offers context {wrong!r}, which nobody asked for")
                found[name_of] = p.U32.unpack_from(reply)[0]

    def _export_name(self, wire: Wire, name: bytes, no_zeroes: bool) -> None:
        wire.send(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, len(name)) + name)
        self._set_export(wire.recv(10))
        if not no_zeroes:
            wire.recv(124)

    def _take_info(self, infos: list[bytes]) -> None:
        for info in infos:
            kind = p.U16.unpack_from(info)[0] if len(info) >= 2 else -1
            if kind == p.INFO_EXPORT and len(info) == 12:
                self._set_export(info[2:])
            elif kind == p.INFO_BLOCK_SIZE and len(info) == 14:
                self._offer.max_payload = min(max(p.U32.unpack_from(info, 10)[0], 65536), p.MAX_PAYLOAD)
        if not self._offer.flags & p.HAS_FLAGS:
            raise NbdProtocolError("the server does not describe its export")

    def _set_export(self, raw: bytes) -> None:
        (size,), (self._offer.flags,) = p.U64.unpack_from(raw), p.U16.unpack_from(raw, 8)
        if size > MAX_SIZE:
            raise NbdProtocolError(f"the server claims a size of {size} bytes")
        self._offer.size = size


_HINT = "Look at the certificates on both sides: who signed them, for which name, until when."


def _encoded(name: str) -> bytes:
    try:
        return name.encode()
    except UnicodeEncodeError as e:
        raise UsageError(f"not the name of an export: {p.printable(name)}") from e


def _why(reply: tuple[int, bytes]) -> str:
    kind, text = reply
    return p.printable(text.decode(errors="replace")) or f"error {kind & ~p.REP_ERROR}"

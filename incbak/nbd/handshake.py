"""The server's side of fixed newstyle negotiation: bounded in time, options and bytes; nothing is opened before GO.

Where TLS is required, every option but STARTTLS and ABORT is refused until it is there. What was agreed on before TLS
is forgotten: anybody may have said it. A client that says more before the handshake is dropped.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from incbak.errors import NbdProtocolError
from incbak.nbd import protocol as p
from incbak.nbd.export import Export
from incbak.nbd.protocol import Dialect
from incbak.nbd.tls import Tunnel, refuse_early_bytes
from incbak.nbd.wire import Wire

MAX_OPTIONS = 1024
MAX_OPTION_BYTES = 1 << 20
MAX_OPTION = 64 << 10
_QUERIES = 64


@dataclass
class Agreed:
    """What negotiation ended with."""

    export: Export
    dialect: Dialect
    contexts: list[tuple[int, str]] = field(default_factory=list)


def transmission_flags(export: Export, dialect: Dialect, *, status_payload: bool = False) -> int:
    """What the export can do, of what a client can ask for in ``dialect``."""
    flags = p.HAS_FLAGS | p.SEND_FLUSH | p.SEND_FUA | p.SEND_CACHE
    flags |= p.READ_ONLY if export.read_only else p.SEND_TRIM | p.SEND_ZEROES | p.SEND_FAST_ZERO
    flags |= p.SEND_DF if dialect else 0
    flags |= p.STATUS_PAYLOAD if dialect is Dialect.EXTENDED and status_payload else 0
    return flags | (p.MULTI_CONN if export.multi_conn else 0)


class Negotiation:
    """One connection's handshake with the exports as they are now; afterwards `sock` is the one to speak on.

    ``tls`` is on offer; with ``must`` nothing goes without it.
    """

    def __init__(
        self,
        sock: socket.socket,
        exports: Mapping[str, Export],
        timeout: float,
        *,
        tls: ssl.SSLContext | None = None,
        must: bool = False,
    ) -> None:
        self.sock, self.deadline = sock, time.monotonic() + timeout
        self.wire = Wire(sock, self.deadline)
        self.exports = exports
        self.tls, self.must = tls, must
        self._tunnel: Tunnel | None = None
        self.dialect, self.no_zeroes = Dialect.SIMPLE, False
        self.chosen: tuple[str, list[tuple[int, str]]] = ("", [])

    def run(self) -> Agreed | None:
        """Negotiate; ``None`` when the client aborts. Raises `NbdProtocolError` when it breaks the rules."""
        server = p.FLAG_FIXED_NEWSTYLE | p.FLAG_NO_ZEROES
        self.wire.send(p.NBD_MAGIC + p.OPTION_MAGIC + p.U16.pack(server))
        (flags,) = p.U32.unpack(self.wire.recv(4))
        if flags & ~server or not flags & p.FLAG_FIXED_NEWSTYLE:
            raise NbdProtocolError(f"unknown client flags {flags:#x}")
        self.no_zeroes = bool(flags & p.FLAG_NO_ZEROES)
        budget = MAX_OPTION_BYTES
        for _ in range(MAX_OPTIONS):
            magic, option, length = p.OPTION.unpack(self.wire.recv(p.OPTION.size))
            budget -= length
            if magic != p.OPTION_MAGIC or length > MAX_OPTION or budget < 0:
                raise NbdProtocolError("malformed or oversized option")
            done, agreed = self._option(option, self.wire.recv(length) if length else b"")
            if done:
                return agreed
        raise NbdProtocolError("too many options")

    def close(self) -> None:
        """The connection is over: what was said last goes out, in bounded time."""
        if self._tunnel:
            self._tunnel.close()

    def _option(self, option: int, data: bytes) -> tuple[bool, Agreed | None]:
        if self.must and not self._tunnel and option not in (p.OPT_STARTTLS, p.OPT_ABORT):
            if option == p.OPT_EXPORT_NAME:  # has no answer but the export
                raise NbdProtocolError("the client does without TLS")
            self._reply(option, p.ERR_TLS_REQD, b"this server wants TLS")
            return False, None
        if option == p.OPT_EXPORT_NAME:
            return True, self._export_name(data)
        if option == p.OPT_ABORT:
            self._reply(option, p.REP_ACK)
            return True, None
        if option in (p.OPT_INFO, p.OPT_GO):
            agreed = self._info(option, data)
            return agreed is not None and option == p.OPT_GO, agreed
        if option == p.OPT_LIST:
            self._list(option, data)
        elif option in (p.OPT_STRUCTURED, p.OPT_EXTENDED):
            self._set_dialect(option, data)
        elif option in (p.OPT_LIST_META, p.OPT_SET_META):
            self._meta(option, data)
        elif option == p.OPT_STARTTLS and self.tls:
            self._start_tls(data, self.tls)
        else:
            self._reply(option, p.ERR_UNSUP)
        return False, None

    def _set_dialect(self, option: int, data: bytes) -> None:
        """Structured replies, or extended headers, which nothing leads back from."""
        if data:
            self._reply(option, p.ERR_INVALID)
        elif option == p.OPT_STRUCTURED and self.dialect is Dialect.EXTENDED:
            self._reply(option, p.ERR_EXTENDED_REQD)
        else:
            self.dialect = Dialect.STRUCTURED if option == p.OPT_STRUCTURED else Dialect.EXTENDED
            self._reply(option, p.REP_ACK)

    def _start_tls(self, data: bytes, context: ssl.SSLContext) -> None:
        if data or self._tunnel:
            self._reply(p.OPT_STARTTLS, p.ERR_INVALID)
            return
        refuse_early_bytes(self.sock)
        self._reply(p.OPT_STARTTLS, p.REP_ACK)
        tunnel = Tunnel(self.sock, context)
        self._tunnel = tunnel
        tunnel.shake_hands(self.deadline)
        tunnel.start()
        self.sock = tunnel.inner
        self.wire = Wire(tunnel.inner, self.deadline)
        self.dialect, self.chosen = Dialect.SIMPLE, ("", [])

    def _reply(self, option: int, kind: int, data: bytes = b"") -> None:
        self.wire.send(p.OPTION_REPLY.pack(p.OPTION_REPLY_MAGIC, option, kind, len(data)) + data)

    def _find(self, name: str) -> Export | None:
        if not name and "" not in self.exports and len(self.exports) == 1:
            return next(iter(self.exports.values()))
        return self.exports.get(name)

    def _export_name(self, data: bytes) -> Agreed:
        name = data.decode(errors="replace")
        export = self._find(name)
        if export is None or self.dialect is Dialect.EXTENDED:  # has no answer but the export
            raise NbdProtocolError(f"no export {p.printable(name)}, or extended headers with the old way in")
        padding = b"" if self.no_zeroes else bytes(124)
        flags = transmission_flags(export, self.dialect)
        self.wire.send(p.U64.pack(export.size) + p.U16.pack(flags) + padding)
        return Agreed(export, self.dialect, self._contexts(name))

    def _contexts(self, name: str) -> list[tuple[int, str]]:
        """The contexts that were set, if they were set for this export."""
        return self.chosen[1] if self.chosen[0] == name else []

    def _list(self, option: int, data: bytes) -> None:
        if data:
            self._reply(option, p.ERR_INVALID)
            return
        for key, export in self.exports.items():
            if key != export.name:  # another way to one that is listed
                continue
            name = export.name.encode()
            self._reply(option, p.REP_SERVER, p.U32.pack(len(name)) + name + export.description.encode())
        self._reply(option, p.REP_ACK)

    def _info(self, option: int, data: bytes) -> Agreed | None:
        try:
            name, rest = _string(data)
            count = p.U16.unpack_from(rest)[0]
            requests = {p.U16.unpack_from(rest, 2 + 2 * i)[0] for i in range(count)}
            if len(rest) != 2 + 2 * count:
                raise ValueError
        except (ValueError, struct.error):
            self._reply(option, p.ERR_INVALID)
            return None
        export = self._find(name)
        if export is None:
            self._reply(option, p.ERR_UNKNOWN, f"no export {p.printable(name)}".encode())
            return None
        contexts = self._contexts(name)
        flags = transmission_flags(export, self.dialect, status_payload=bool(contexts) or option == p.OPT_INFO)
        self._describe(option, export, flags, requests)
        self._reply(option, p.REP_ACK)
        return Agreed(export, self.dialect, contexts)

    def _describe(self, option: int, export: Export, flags: int, requests: set[int]) -> None:
        info = [p.U16.pack(p.INFO_EXPORT) + p.U64.pack(export.size) + p.U16.pack(flags)]
        info.append(p.U16.pack(p.INFO_BLOCK_SIZE) + p.U32.pack(1) + p.U32.pack(4096) + p.U32.pack(p.MAX_PAYLOAD))
        if p.INFO_NAME in requests:
            info.append(p.U16.pack(p.INFO_NAME) + export.name.encode())
        if p.INFO_DESCRIPTION in requests and export.description:
            info.append(p.U16.pack(p.INFO_DESCRIPTION) + export.description.encode())
        for item in info:
            self._reply(option, p.REP_INFO, item)

    def _meta(self, option: int, data: bytes) -> None:
        listing = option == p.OPT_LIST_META
        if not listing:
            self.chosen = ("", [])
        try:
            name, rest = _string(data)
            queries = _queries(rest)
        except (ValueError, struct.error):
            self._reply(option, p.ERR_INVALID)
            return
        export = self._find(name)
        if not self.dialect or export is None:
            self._reply(option, p.ERR_INVALID if export else p.ERR_UNKNOWN)
            return
        offered = list(export.contexts())
        wanted = [c for c in offered if _matches(c, queries, listing=listing)]
        found = list(enumerate(wanted, start=1))
        for number, context in found:
            self._reply(option, p.REP_META, p.U32.pack(0 if listing else number) + context.encode())
        self._reply(option, p.REP_ACK)
        if not listing:
            self.chosen = (name, found)


def _string(data: bytes) -> tuple[str, bytes]:
    (length,) = p.U32.unpack_from(data)
    if length > p.MAX_NAME or len(data) < 4 + length:
        raise ValueError("a string is too long")
    return data[4 : 4 + length].decode(), data[4 + length :]


def _queries(data: bytes) -> list[str]:
    (count,) = p.U32.unpack_from(data)
    if count > _QUERIES:
        raise ValueError("too many queries")
    rest, found = data[4:], []
    for _ in range(count):
        query, rest = _string(rest)
        found.append(query)
    if rest:
        raise ValueError("trailing bytes")
    return found


def _matches(context: str, queries: list[str], *, listing: bool) -> bool:
    """LIST without queries means all; a query that ends in a colon means all below it, in LIST only."""
    if listing and not queries:
        return True
    return any(context == q or (listing and q.endswith(":") and context.startswith(q)) for q in queries)

"""An NBD client: blocking, pipelined, for one thread; another thread may only `abort` it. Trusts no server."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator, Sequence

from incbak.errors import NbdError, NbdProtocolError, NbdRequestError, NbdSilentError
from incbak.nbd import protocol as p
from incbak.nbd.dial import dial
from incbak.nbd.greeting import Greeting, Offer, TlsWish
from incbak.nbd.protocol import Dialect
from incbak.nbd.request import Request
from incbak.nbd.uri import NbdUri, parse_uri
from incbak.nbd.wire import bound_waits, close_hard, keep_alive

_MAX_REPLY = 1 << 20
_MAX_STATUS = p.MAX_EXTENTS * p.EXT_EXTENT.size + 8
_MAX_REPLIES = 64
"""Error chunks that a server may send for one request."""
REPLY_SECONDS, SLOW_SECONDS = 75.0, 600.0
_SLOW = {p.FLUSH, p.ZEROES, p.TRIM, p.CACHE}
_FAREWELL_SECONDS, _SLOWEST = 2.0, 8 << 10  # and bytes per second of an answer that has begun
_ANY_LENGTH = (1 << 63) - 1
_SILENT_HINT = "Look whether the server runs, and whether its storage does."
_STATUS_STEP = 1 << 31
"""Bytes asked about at once where a length has 32 bits."""


class NbdClient:
    """A connection in transmission. ``window`` requests may be in flight (`submit_write` and the like).

    A server that neither sends what it owes nor takes what is sent for `REPLY_SECONDS` is given up; an answer for which
    it has to write to its storage (a flush, zeroes, a discard) has `SLOW_SECONDS`.
    """

    def __init__(self, sock: socket.socket, *, window: int = 16) -> None:
        self.sock, self.window = sock, window
        self._patience, self._slow = 0.0, 0
        self.size = self.flags = 0
        self.max_payload = p.MAX_PAYLOAD
        self.contexts: dict[str, int] = {}
        self.dialect = Dialect.SIMPLE
        self._cookie = self._reads = 0
        self._flying: dict[int, Request] = {}
        self._failed: NbdRequestError | None = None
        self.refused: list[tuple[int, int]] = []
        """(offset, length) of every request that the server answered with an error."""

    @classmethod
    def connect(
        cls,
        where: str | socket.socket | NbdUri,
        export: str | None = None,
        *,
        contexts: Sequence[str] = (),
        timeout: float | None = 30.0,
        window: int = 16,
        dialect: Dialect = Dialect.EXTENDED,
    ) -> NbdClient:
        """Connect to a URI (or take a connected socket, which is then owned) and negotiate within ``timeout`` seconds.

        ``dialect`` is the best to ask for; the server decides.
        Raises `NbdError` when nobody answers, `NbdProtocolError` when the server breaks the rules or lacks the export,
        `UsageError` for an address or name that cannot be.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        if isinstance(where, socket.socket):
            greeting, name = Greeting(where, deadline, dialect=dialect), export or ""
        else:
            uri = parse_uri(where) if isinstance(where, str) else where
            name = uri.export if export is None else export
            tls = TlsWish.of(uri)
            greeting = Greeting(dial(uri, timeout), deadline, tls, dialect)
        try:
            offer = greeting.run(name, contexts)
        except BaseException:
            greeting.close()
            raise
        client = cls(greeting.sock, window=window)
        client._take(offer)
        return client

    def _take(self, offer: Offer) -> None:
        self.size, self.flags, self.max_payload = offer.size, offer.flags, offer.max_payload
        self.contexts, self.dialect = offer.contexts, offer.dialect
        self.sock.settimeout(None)
        bound_waits(self.sock, REPLY_SECONDS, socket.SO_SNDTIMEO)
        self._have_patience(REPLY_SECONDS)
        if self.sock.family != socket.AF_UNIX:
            keep_alive(self.sock)

    @property
    def read_only(self) -> bool:
        """Whether the server refuses writes."""
        return bool(self.flags & p.READ_ONLY)

    def can(self, flag: int) -> bool:
        """Whether the server advertises a transmission flag, such as ``SEND_ZEROES``."""
        return bool(self.flags & flag)

    @property
    def longest(self) -> int:
        """Bytes that a request without data may be about: any number with extended headers, else below 4 GiB."""
        return _ANY_LENGTH if self.dialect is Dialect.EXTENDED else (1 << 32) - 1

    # -- requests -------------------------------------------------------------------------------------------------

    def submit_write(self, buf: memoryview | bytes, offset: int, *, fua: bool = False) -> None:
        """Send a write; its error, if any, is raised by a later call. ``buf`` may be reused at once.

        Reads in flight are taken first: a server that waits to send their data may not receive this.
        """
        self._submit(Request(p.WRITE, offset, len(buf)), p.CMD_FUA if fua else 0, buf)

    def submit_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """Send a write of zeroes; ``length`` up to `longest`."""
        self._submit(Request(p.ZEROES, offset, length), p.CMD_NO_HOLE if no_hole else 0)

    def submit_read_into(self, buf: memoryview, offset: int) -> None:
        """Send a read; ``buf`` is filled when `drain` has returned."""
        self._submit(Request(p.READ, offset, len(buf), into=buf), 0)

    def drain(self) -> None:
        """Wait for all replies. Raises the first `NbdRequestError` since the last call."""
        while self._flying:
            self._take_reply()
        failed, self._failed = self._failed, None
        if failed:
            raise failed

    def write(self, buf: memoryview | bytes, offset: int, *, fua: bool = False) -> None:
        """Write and wait."""
        self.submit_write(buf, offset, fua=fua)
        self.drain()

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Read and wait, in pieces of the server's maximum."""
        for start in range(0, len(buf), self.max_payload):
            self.submit_read_into(buf[start : start + self.max_payload], offset + start)
        self.drain()

    def read(self, offset: int, length: int) -> bytes:
        """``length`` bytes at ``offset``."""
        buf = bytearray(length)
        self.read_into(memoryview(buf), offset)
        return bytes(buf)

    def write_zeroes(self, offset: int, length: int, *, no_hole: bool = False) -> None:
        """Zero and wait."""
        self.submit_zeroes(offset, length, no_hole=no_hole)
        self.drain()

    def trim(self, offset: int, length: int) -> None:
        """Discard and wait."""
        self._submit(Request(p.TRIM, offset, length), 0)
        self.drain()

    def flush(self) -> None:
        """All writes that were answered are durable."""
        self.drain()
        self._submit(Request(p.FLUSH, 0, 0), 0)
        self.drain()

    def block_status(self, offset: int, length: int, context: str) -> list[tuple[int, int]]:
        """(length, flags) extents from ``offset`` on, at least one, none empty, cut at ``length``.

        Raises `NbdProtocolError` when the server's answer is no tiling.
        """
        if context not in self.contexts:
            raise NbdProtocolError(f"the server has no meta context {context!r}")
        self.drain()
        number = self.contexts[context]
        if len(self.contexts) > 1 and self.dialect is Dialect.EXTENDED and self.can(p.STATUS_PAYLOAD):
            request = Request(p.STATUS, offset, length, contexts=frozenset([number]))
            self._submit(request, 0, p.U64.pack(length) + p.U32.pack(number))
        else:
            request = Request(p.STATUS, offset, length, contexts=frozenset(self.contexts.values()))
            self._submit(request, 0)
        self.drain()
        form = p.EXT_EXTENT if self.dialect is Dialect.EXTENDED else p.EXTENT
        found, left = [], length
        for size, flags in form.iter_unpack(request.extents.get(number, b"")):
            if not size or not left or flags >> 32:
                raise NbdProtocolError("the server's block status has an extent that cannot be")
            found.append((min(size, left), flags))
            left -= min(size, left)
        if not found:
            raise NbdProtocolError("the server's block status is empty")
        return found

    def extents(self, context: str) -> Iterator[tuple[int, int, int]]:
        """(offset, length, flags) over the whole disk, adjacent equal ones not joined."""
        offset = 0
        step = self.size if self.dialect is Dialect.EXTENDED else _STATUS_STEP
        while offset < self.size:
            for length, flags in self.block_status(offset, min(self.size - offset, step), context):
                yield offset, length, flags
                offset += length

    def close(self) -> None:
        """Say goodbye and close; idempotent."""
        try:
            bound_waits(self.sock, _FAREWELL_SECONDS, socket.SO_SNDTIMEO)
            self._send(self._head(Request(p.DISC, 0, 0), 0, None))
        except (NbdError, OSError):
            pass
        close_hard(self.sock)

    def abort(self) -> None:
        """Break the connection, from any thread: whoever waits on it gets an `NbdError`."""
        close_hard(self.sock)

    # -- the wire -------------------------------------------------------------------------------------------------

    def _submit(self, request: Request, flags: int, payload: memoryview | bytes | None = None) -> None:
        if request.offset + request.length > self.size:
            raise NbdRequestError(f"request past the end of the export ({self.size} bytes)", errno=22)
        if payload is not None and len(payload) > self.max_payload:
            raise NbdRequestError(f"a write of {len(payload)} bytes is over the server's maximum", errno=22)
        if request.length > self.longest:
            raise NbdRequestError(
                f"a request over {request.length} bytes is more than the server can be told", errno=22
            )
        while len(self._flying) >= self.window or (payload is not None and self._reads):
            self._take_reply()
        if self._failed:
            self.drain()
        self._cookie += 1
        self._flying[self._cookie] = request
        if request.command in _SLOW or flags & p.CMD_FUA:
            request.slow = True
            self._slow += 1
            self._have_patience(SLOW_SECONDS)
        self._reads += request.into is not None
        self._send(self._head(request, flags, payload), payload)

    def _head(self, request: Request, flags: int, payload: memoryview | bytes | None) -> bytes:
        if self.dialect is not Dialect.EXTENDED:
            what = (flags, request.command, self._cookie, request.offset, request.length)
            return p.REQUEST.pack(p.REQUEST_MAGIC, *what)
        length = request.length if payload is None else len(payload)
        flags |= 0 if payload is None else p.CMD_PAYLOAD
        return p.EXT_REQUEST.pack(p.EXT_REQUEST_MAGIC, flags, request.command, self._cookie, request.offset, length)

    def _send(self, head: bytes, payload: memoryview | bytes | None = None) -> None:
        try:
            if payload is None or len(payload) > 65536:
                self.sock.sendall(head)
                if payload is not None:
                    self.sock.sendall(payload)
            else:
                self.sock.sendall(b"".join((head, payload)))
        except BlockingIOError as e:
            raise NbdSilentError(f"the NBD server took nothing for {REPLY_SECONDS:g} s", hint=_SILENT_HINT) from e
        except OSError as e:
            raise NbdError(f"the NBD server went away: {e.strerror or e}") from e

    def _recv(self, view: memoryview) -> None:
        try:
            done = self.sock.recv_into(view, len(view), socket.MSG_WAITALL)
            if done != len(view):
                self._recv_rest(view, done)
        except BlockingIOError as e:
            raise self._silent() from e
        except OSError as e:
            raise NbdError(f"the NBD server went away: {e.strerror or e}") from e

    def _recv_rest(self, view: memoryview, done: int) -> None:
        until, got = time.monotonic() + self._patience + len(view) / _SLOWEST, done
        while got and done < len(view):
            if time.monotonic() > until:
                raise self._silent()
            got = self.sock.recv_into(view[done:], len(view) - done, socket.MSG_WAITALL)
            done += got
        if not got:
            raise NbdError("the NBD server closed the connection")

    def _have_patience(self, seconds: float) -> None:
        if self._patience != seconds:
            self._patience = seconds
            bound_waits(self.sock, seconds, socket.SO_RCVTIMEO)

    def _silent(self) -> NbdSilentError:
        return NbdSilentError(f"the NBD server did not answer for {self._patience:g} s", hint=_SILENT_HINT)

    def _recv_bytes(self, count: int) -> bytearray:
        self._recv(memoryview(buf := bytearray(count)))
        return buf

    def _take_reply(self) -> None:
        if self.dialect is Dialect.EXTENDED:
            magic, flags, kind, cookie, offset, length = p.EXT_CHUNK.unpack(self._recv_bytes(p.EXT_CHUNK.size))
            if magic != p.EXT_CHUNK_MAGIC:
                raise NbdProtocolError("the server's reply has a wrong magic number")
            request = self._flying.get(cookie)
            if request and request.offset != offset:
                raise NbdProtocolError("the server's reply names another offset than the request")
            self._take_chunk(flags, kind, cookie, length)
            return
        head = self._recv_bytes(p.SIMPLE.size)
        (magic,) = p.U32.unpack_from(head)
        if magic == p.SIMPLE_MAGIC:
            _magic, error, cookie = p.SIMPLE.unpack(head)
            self._take_simple(error, cookie)
        elif magic == p.CHUNK_MAGIC and self.dialect:
            _magic, *rest = p.CHUNK.unpack(head + self._recv_bytes(p.CHUNK.size - len(head)))
            self._take_chunk(*rest)
        else:
            raise NbdProtocolError("the server's reply has a wrong magic number")

    def _take_simple(self, error: int, cookie: int) -> None:
        request = self._flying.get(cookie)
        if request is None or (self.dialect and request.command in (p.READ, p.STATUS) and not error):
            raise NbdProtocolError("the server answered a request that it was not asked")
        if request.into is not None and not error:
            self._recv(request.into)
            request.filled = request.length
        request.error = request.error or error
        self._conclude(cookie, request)

    def _take_chunk(self, flags: int, kind: int, cookie: int, length: int) -> None:
        request = self._flying.get(cookie)
        if request is None:
            raise NbdProtocolError("the server answered a request that it was not asked")
        if kind == p.CHUNK_DATA and request.into is not None:
            self._take_data(request, length)
        elif length > (_MAX_STATUS if request.contexts else _MAX_REPLY):
            raise NbdProtocolError("the server's reply is too long")
        else:
            self._take_small(request, kind, bytes(self._recv_bytes(length)), bool(flags & p.CHUNK_DONE))
        if flags & p.CHUNK_DONE:
            self._conclude(cookie, request)

    def _take_data(self, request: Request, length: int) -> None:
        assert request.into is not None
        count = length - 8
        at = p.U64.unpack(self._recv_bytes(8))[0] - request.offset if count > 0 else -1
        if count <= 0 or at < 0 or at + count > request.length or request.filled + count > request.length:
            raise NbdProtocolError("the server sent data that was not asked for")
        self._recv(request.into[at : at + count])
        request.filled += count

    def _take_small(self, request: Request, kind: int, body: bytes, done: bool) -> None:
        try:
            if kind == p.CHUNK_HOLE and request.into is not None:
                (offset,), (count,) = p.U64.unpack_from(body), p.U32.unpack_from(body, 8)
                at = offset - request.offset
                if not count or at < 0 or request.filled + count > request.length or at + count > request.length:
                    raise NbdProtocolError("the server sent a hole that was not asked for")
                request.into[at : at + count] = bytes(count)
                request.filled += count
            elif kind in (p.CHUNK_STATUS, p.CHUNK_EXT_STATUS) and request.contexts:
                self._take_status(request, kind, body)
            elif kind & 1 << 15 and request.errors < _MAX_REPLIES:
                request.errors += 1
                request.error = request.error or p.U32.unpack_from(body)[0] or 5
            elif kind != p.CHUNK_NONE or body or not done:
                raise NbdProtocolError(f"the server sent a chunk of type {kind} that cannot be")
        except struct.error as e:
            raise NbdProtocolError("the server's reply is cut short") from e

    def _take_status(self, request: Request, kind: int, body: bytes) -> None:
        extended = kind == p.CHUNK_EXT_STATUS
        (context,), extents = p.U32.unpack_from(body), body[8 if extended else 4 :]
        fits = extended == (self.dialect is Dialect.EXTENDED)
        if extended:
            fits &= p.U32.unpack_from(body, 4)[0] * p.EXT_EXTENT.size == len(extents)
        known = context in request.contexts and context not in request.extents
        if not known or not fits or len(extents) % p.EXTENT.size:
            raise NbdProtocolError("the server's block status is malformed")
        request.extents[context] = extents

    def _conclude(self, cookie: int, request: Request) -> None:
        del self._flying[cookie]
        if request.slow:
            self._slow -= 1
            self._have_patience(SLOW_SECONDS if self._slow else REPLY_SECONDS)
        self._reads -= request.into is not None
        if request.error:
            self.refused.append((request.offset, request.length))
            if self._failed is None:
                what = f"request {request.command} of {request.length} bytes at {request.offset}"
                reason = os.strerror(request.error) if request.error < 4096 else f"error {request.error}"
                self._failed = NbdRequestError(f"the NBD server failed {what}: {reason}", errno=request.error)
        elif request.into is not None and request.filled != request.length:
            raise NbdProtocolError("the server's answer to a read is incomplete")

"""How a server's replies look in each dialect; pure.

Every reply repeats what the client called its request by: a *tag*, the cookie and, with extended headers, the offset.
"""

from __future__ import annotations

from collections.abc import Sequence

from incbak.nbd import protocol as p
from incbak.nbd.protocol import Dialect

Tag = tuple[int, int]
"""Cookie and offset of a request."""


def _simple_head(out: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
    p.SIMPLE.pack_into(out, at, p.SIMPLE_MAGIC, 0, cookie)


def _structured_head(out: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
    p.CHUNK.pack_into(out, at, p.CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_DATA, cookie, length + 8)
    p.U64.pack_into(out, at + 20, offset)


def _extended_head(out: bytearray, at: int, cookie: int, offset: int, length: int) -> None:
    p.EXT_CHUNK.pack_into(out, at, p.EXT_CHUNK_MAGIC, p.CHUNK_DONE, p.CHUNK_DATA, cookie, offset, length + 8)
    p.U64.pack_into(out, at + 32, offset)


_DATA_HEADS = (
    (p.SIMPLE.size, _simple_head),
    (p.CHUNK.size + 8, _structured_head),
    (p.EXT_CHUNK.size + 8, _extended_head),
)


class Replies:
    """The replies of one connection. ``data_head``: bytes before the data of a read, which ``pack_data_head`` packs:
    all of the data follows, in one piece.
    """

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        self.data_head, self.pack_data_head = _DATA_HEADS[dialect]

    def done(self, tag: Tag, command: int) -> bytes:
        """It is done, and there is nothing to send for it."""
        if self.dialect is Dialect.EXTENDED or (self.dialect and command in (p.READ, p.STATUS)):
            return self._chunk(tag, p.CHUNK_NONE, b"")
        return p.SIMPLE.pack(p.SIMPLE_MAGIC, 0, tag[0])

    def error(self, tag: Tag, error: int, command: int) -> bytes:
        """It failed, or was refused."""
        if self.dialect is Dialect.EXTENDED or (self.dialect and command in (p.READ, p.STATUS)):
            return self._chunk(tag, p.CHUNK_ERROR, p.U32.pack(error) + p.U16.pack(0))
        return p.SIMPLE.pack(p.SIMPLE_MAGIC, error, tag[0])

    def status(self, tag: Tag, context: int, extents: Sequence[tuple[int, int]], *, last: bool) -> bytes:
        """(length, flags) extents of one context; ``last``: no other context follows."""
        if self.dialect is Dialect.EXTENDED:
            body = p.U32.pack(context) + p.U32.pack(len(extents)) + b"".join(p.EXT_EXTENT.pack(*e) for e in extents)
            return self._chunk(tag, p.CHUNK_EXT_STATUS, body, done=last)
        body = p.U32.pack(context) + b"".join(p.EXTENT.pack(*e) for e in extents)
        return self._chunk(tag, p.CHUNK_STATUS, body, done=last)

    def _chunk(self, tag: Tag, kind: int, body: bytes, *, done: bool = True) -> bytes:
        flags = p.CHUNK_DONE if done else 0
        if self.dialect is Dialect.EXTENDED:
            return p.EXT_CHUNK.pack(p.EXT_CHUNK_MAGIC, flags, kind, *tag, len(body)) + body
        return p.CHUNK.pack(p.CHUNK_MAGIC, flags, kind, tag[0], len(body)) + body

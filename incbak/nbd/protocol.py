"""The wire format of NBD, pure: what server and client share. After the protocol's own document, ``doc/proto.md``.

Fixed newstyle negotiation, simple and structured replies, extended headers, meta contexts. All integers are big endian.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Collection
from enum import IntEnum
from typing import Final

NBD_MAGIC: Final = b"NBDMAGIC"
OPTION_MAGIC: Final = b"IHAVEOPT"
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_MAGIC: Final = 0x67446698
CHUNK_MAGIC: Final = 0x668E33EF
EXT_REQUEST_MAGIC: Final = 0x21E41C71
EXT_CHUNK_MAGIC: Final = 0x6E8A278C

OPTION = struct.Struct(">8sII")
"""Magic, option, length of its data."""
OPTION_REPLY = struct.Struct(">QIII")
REQUEST = struct.Struct(">IHHQQI")
"""Magic, flags, type, cookie, offset, length."""
SIMPLE = struct.Struct(">IIQ")
"""Magic, error, cookie."""
CHUNK = struct.Struct(">IHHQI")
"""Magic, flags, type, cookie, length of what follows."""
EXT_REQUEST = EXT_CHUNK = struct.Struct(">IHHQQQ")
"""Magic, flags, type, cookie, offset, length: of the request, or of what follows."""
U16, U32, U64 = struct.Struct(">H"), struct.Struct(">I"), struct.Struct(">Q")
EXTENT, EXT_EXTENT = struct.Struct(">II"), struct.Struct(">QQ")

FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES = 1, 2

OPT_EXPORT_NAME, OPT_ABORT, OPT_LIST, OPT_STARTTLS = 1, 2, 3, 5
OPT_INFO, OPT_GO, OPT_STRUCTURED, OPT_LIST_META, OPT_SET_META = 6, 7, 8, 9, 10
OPT_EXTENDED = 11

REP_ACK, REP_SERVER, REP_INFO, REP_META = 1, 2, 3, 4
REP_ERROR = 1 << 31
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_TLS_REQD, ERR_UNKNOWN, ERR_TOO_BIG = (REP_ERROR + n for n in (1, 2, 3, 5, 6, 9))
ERR_EXTENDED_REQD = REP_ERROR + 10

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA = 1, 2, 4, 8
SEND_TRIM, SEND_ZEROES, SEND_DF, MULTI_CONN = 1 << 5, 1 << 6, 1 << 7, 1 << 8
SEND_CACHE, SEND_FAST_ZERO, STATUS_PAYLOAD = 1 << 10, 1 << 11, 1 << 12

READ, WRITE, DISC, FLUSH, TRIM, CACHE, ZEROES, STATUS = 0, 1, 2, 3, 4, 5, 6, 7
CMD_FUA, CMD_NO_HOLE, CMD_DF, CMD_REQ_ONE, CMD_FAST_ZERO = 1, 2, 4, 8, 16
CMD_PAYLOAD = 32

CHUNK_DONE = 1
CHUNK_NONE, CHUNK_DATA, CHUNK_HOLE, CHUNK_STATUS, CHUNK_EXT_STATUS = 0, 1, 2, 5, 6
CHUNK_ERROR, CHUNK_ERROR_OFFSET = (1 << 15) + 1, (1 << 15) + 2

STATE_HOLE, STATE_ZERO, STATE_DIRTY = 1, 2, 1

ALLOCATION: Final = "base:allocation"
DIRTY_BITMAP: Final = "qemu:dirty-bitmap:"

MAX_PAYLOAD: Final = 32 << 20
MAX_NAME: Final = 4096
MAX_EXTENTS: Final = 1 << 20
"""Extents that one chunk of a block status should not exceed."""


class Dialect(IntEnum):
    """Which headers both ends use after negotiation; each goes beyond the one before."""

    SIMPLE = 0
    STRUCTURED = 1
    EXTENDED = 2


_ALLOWED_FLAGS = {
    READ: CMD_DF,
    WRITE: CMD_FUA,
    FLUSH: 0,
    TRIM: CMD_FUA,
    CACHE: 0,
    ZEROES: CMD_FUA | CMD_NO_HOLE | CMD_FAST_ZERO,
    STATUS: CMD_REQ_ONE,
}
_CHANGES = {WRITE, TRIM, ZEROES}
_ALLOWED_EXTENDED = {c: flags | (CMD_PAYLOAD if c in (WRITE, STATUS) else 0) for c, flags in _ALLOWED_FLAGS.items()}
_ON_WIRE = {errno.EPERM, errno.EIO, errno.ENOMEM, errno.EINVAL, errno.ENOSPC, errno.EOVERFLOW, 95, 108}


def wire_error(code: int | None) -> int:
    """The protocol's number for an errno: itself where the protocol has it, a near one, or EIO."""
    if code in _ON_WIRE:
        return code or errno.EIO
    if code in (errno.EDQUOT, errno.EFBIG):
        return errno.ENOSPC
    return errno.EPERM if code == errno.EROFS else errno.EIO


def refuse(
    command: int,
    flags: int,
    offset: int,
    length: int,
    size: int,
    read_only: bool,
    contexts: bool,
    extended: bool = False,
) -> int:
    """The one place where a request is judged before anything acts on it: 0, or the error to answer with.

    ``length`` is how much of the export it is about; ``contexts``: whether any meta context was negotiated, and
    ``extended`` headers. The bound on payloads is the reader's business, since a payload must be taken off the wire
    whatever the answer.
    """
    allowed = (_ALLOWED_EXTENDED if extended else _ALLOWED_FLAGS).get(command)
    if allowed is None or flags & ~allowed:
        return errno.EINVAL
    if command == FLUSH:
        return errno.EINVAL if offset or length else 0
    if read_only and command in _CHANGES:
        return errno.EPERM
    if offset + length > size:
        return errno.ENOSPC if command in (WRITE, ZEROES) else errno.EINVAL
    if command == READ and length > MAX_PAYLOAD:
        return errno.EOVERFLOW
    if command == STATUS and (not contexts or not length):
        return errno.EINVAL
    return 0


def status_payload(payload: bytes | memoryview, known: Collection[int]) -> tuple[int, list[int]] | None:
    """The effect length and the contexts that a block status asks for; ``None`` for a payload that cannot be."""
    count, rest = divmod(len(payload) - U64.size, U32.size)
    if rest or not 0 < count <= len(known):
        return None
    wanted = [number for (number,) in U32.iter_unpack(payload[U64.size :])]
    if len(set(wanted)) != count or not set(wanted) <= set(known):
        return None
    return U64.unpack_from(payload)[0], wanted


def printable(name: str) -> str:
    """A peer's string, safe for logs and messages: control characters escaped, cut at 100 characters."""
    return name[:100].encode("unicode_escape").decode("ascii")

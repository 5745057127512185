"""The server with extended headers: 64-bit lengths, payloads of requests that are no writes, chosen contexts."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable, Iterator

import pytest

from incbak.nbd import connection
from incbak.nbd import protocol as p
from tests.kit.huge import HUGE, HugeDisk
from tests.unit.nbd.peers import DIRTY, SIZE, DiskExport, Raw, served, string


@pytest.fixture
def extended(raw: Raw) -> Raw:
    return raw.go(p.ALLOCATION, DIRTY, extended=True)


@pytest.fixture
def huge() -> Iterator[tuple[Raw, HugeDisk, DiskExport]]:
    """A client of an export of a pebibyte."""
    export = DiskExport(HugeDisk())
    with served(export) as (_server, connect):
        yield connect().go(p.ALLOCATION, extended=True), export.disk, export  # type: ignore[misc]


# -- negotiation -------------------------------------------------------------------------------------------------------


def test_nothing_leads_back_from_extended_headers(raw: Raw) -> None:
    raw.greet()
    assert raw.ask(p.OPT_EXTENDED, b"x") == p.ERR_INVALID
    assert raw.ask(p.OPT_STRUCTURED) == p.REP_ACK
    for _ in range(2):
        assert raw.ask(p.OPT_EXTENDED) == p.REP_ACK
    assert raw.ask(p.OPT_STRUCTURED) == p.ERR_EXTENDED_REQD
    assert raw.meta(p.OPT_SET_META, p.ALLOCATION) == [(1, p.ALLOCATION)]
    assert raw.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
    raw.extended = True
    assert raw.alive()


def test_the_old_way_in_is_shut(raw: Raw, export: DiskExport) -> None:
    """It has no answer but the export, which would be taken for another dialect."""
    raw.greet()
    assert raw.ask(p.OPT_EXTENDED) == p.REP_ACK
    raw.send(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk")
    assert raw.hung_up()
    assert export.opened == 0


def _flags(raw: Raw, option: int) -> int:
    replies = raw.option(option, string("disk") + bytes(2))
    (info,) = [body for _kind, body in replies if body[:2] == p.U16.pack(p.INFO_EXPORT)]
    return int(p.U16.unpack_from(info, 10)[0])


def test_a_choice_of_contexts_is_on_offer_where_there_are_any(connect: Callable[[], Raw]) -> None:
    for contexts, offered in (((), False), ((p.ALLOCATION,), True)):
        raw = connect().greet()
        assert raw.ask(p.OPT_EXTENDED) == p.REP_ACK
        assert not contexts or raw.meta(p.OPT_SET_META, *contexts)
        assert _flags(raw, p.OPT_INFO) & p.STATUS_PAYLOAD
        assert bool(_flags(raw, p.OPT_GO) & p.STATUS_PAYLOAD) == offered


# -- what requests do --------------------------------------------------------------------------------------------------


def test_write_and_read(extended: Raw, export: DiskExport) -> None:
    data = random.Random(1).randbytes(70_000)
    assert extended.error(p.WRITE, 123, payload=data) == 0
    assert extended.error(p.WRITE, 1, flags=p.CMD_FUA, payload=b"fua") == 0
    for length in (1, connection.INLINE, connection.INLINE + 1, SIZE - 122):
        extended.request(p.READ, 122, length, flags=p.CMD_DF, cookie=1 << 63)
        flags, kind, cookie, body = extended.ext_chunk(122)
        assert (flags, kind, cookie) == (p.CHUNK_DONE, p.CHUNK_DATA, 1 << 63)
        assert body == p.U64.pack(122) + (b"\0" + data + bytes(SIZE))[:length]
    assert export.calls == [("write", 123, 70_000), ("write", 1, 3), ("flush",)]


def test_nothing_at_all(extended: Raw, export: DiskExport) -> None:
    """faults row 63: length 0 is answered and does nothing."""
    for command in (p.READ, p.WRITE, p.TRIM, p.ZEROES, p.CACHE):
        assert extended.error(command, SIZE, 0) == 0
    assert extended.error(p.FLUSH) == 0
    assert export.calls == [("flush",)]


@pytest.mark.parametrize("length", [5, 70_000])
def test_a_write_without_the_flag_is_a_write(extended: Raw, export: DiskExport, length: int) -> None:
    """QEMU 10.0 forgets the flag, and sends the payload; its own server lets that pass too."""
    head = p.EXT_REQUEST.pack(p.EXT_REQUEST_MAGIC, 0, p.WRITE, 5, 8, length)
    extended.send(head + b"x" * length)
    assert extended.ext_chunk(8) == (p.CHUNK_DONE, p.CHUNK_NONE, 5, b"")
    assert export.calls == [("write", 8, length)]
    assert extended.alive()


def test_lengths_of_64_bits(huge: tuple[Raw, HugeDisk, DiskExport]) -> None:
    raw, _disk, export = huge
    assert raw.error(p.TRIM, 1 << 40, 1 << 41) == 0
    assert raw.error(p.ZEROES, 0, HUGE, flags=p.CMD_NO_HOLE) == 0
    assert raw.error(p.CACHE, 5, HUGE - 5) == 0
    assert export.calls == [("trim", 1 << 40, 1 << 41), ("zero", 0, HUGE, False, False), ("cache", 5, HUGE - 5)]
    raw.request(p.STATUS, 4096, HUGE - 4096)
    extents = p.EXT_EXTENT.pack(HUGE - 4096, 3)
    assert raw.ext_chunk(4096) == (p.CHUNK_DONE, p.CHUNK_EXT_STATUS, 7, p.U32.pack(1) + p.U32.pack(1) + extents)


def _asks(length: int, *contexts: int) -> bytes:
    return p.U64.pack(length) + b"".join(map(p.U32.pack, contexts))


def test_block_status_of_all_and_of_chosen_contexts(extended: Raw, export: DiskExport) -> None:
    export.disk.write(b"x" * 4096, 8192)
    allocation = p.U32.pack(1) + p.U32.pack(3)
    allocation += b"".join(p.EXT_EXTENT.pack(*e) for e in ((4096, 3), (4096, 0), (200_000 - 8192, 3)))
    dirty = p.U32.pack(2) + p.U32.pack(1) + p.EXT_EXTENT.pack(61_440, 1)
    extended.request(p.STATUS, 4096, 200_000)
    assert extended.ext_chunk(4096) == (0, p.CHUNK_EXT_STATUS, 7, allocation)
    assert extended.ext_chunk(4096)[:3] == (p.CHUNK_DONE, p.CHUNK_EXT_STATUS, 7)
    extended.request(p.STATUS, 4096, payload=_asks(200_000, 1))
    assert extended.ext_chunk(4096) == (p.CHUNK_DONE, p.CHUNK_EXT_STATUS, 7, allocation)
    extended.request(p.STATUS, 4096, flags=p.CMD_REQ_ONE, payload=_asks(200_000, 2))
    assert extended.ext_chunk(4096) == (p.CHUNK_DONE, p.CHUNK_EXT_STATUS, 7, dirty)
    extended.request(p.STATUS, 4096, payload=_asks(200_000, 2, 1))
    assert [extended.ext_chunk(4096)[0] for _ in range(2)] == [0, p.CHUNK_DONE]


# -- what is refused ---------------------------------------------------------------------------------------------------

STATUSES = {
    "an unknown context": _asks(100, 3),
    "a context twice": _asks(100, 1, 1),
    "one of them unknown": _asks(100, 1, 9),
    "no context": _asks(100),
    "more contexts than there are": _asks(100, 1, 2, 1, 2),
    "no length": b"1234567",
    "a cut context": _asks(100, 1) + b"x",
    "of nothing": _asks(0, 1),
    "past the end": _asks(SIZE + 1, 1),
    "beyond all bounds": _asks((1 << 64) - 1, 1),
    "of megabytes": bytes(1 << 20),
}


@pytest.mark.parametrize("payload", STATUSES.values(), ids=STATUSES.keys())
def test_a_choice_of_contexts_that_cannot_be(extended: Raw, payload: bytes) -> None:
    assert extended.error(p.STATUS, 0, payload=payload) == errno.EINVAL
    assert extended.alive()


REFUSED = [
    (p.READ, 0, p.MAX_PAYLOAD + 1, errno.EOVERFLOW),
    (p.READ, 0, HUGE, errno.EOVERFLOW),
    (p.READ, 0, HUGE + 1, errno.EINVAL),
    (p.READ, (1 << 64) - 1, (1 << 64) - 1, errno.EINVAL),
    (p.TRIM, 1, HUGE, errno.EINVAL),
    (p.TRIM, 1 << 63, 1 << 63, errno.EINVAL),
    (p.ZEROES, HUGE, 1, errno.ENOSPC),
    (p.ZEROES, (1 << 64) - 5, (1 << 64) - 1, errno.ENOSPC),
    (p.CACHE, 0, (1 << 64) - 1, errno.EINVAL),
    (p.STATUS, 0, HUGE + 1, errno.EINVAL),
    (p.FLUSH, 0, 1 << 40, errno.EINVAL),
    (8, 0, (1 << 64) - 1, errno.EINVAL),
]


@pytest.mark.parametrize(("command", "offset", "length", "error"), REFUSED)
def test_bounds_of_64_bits(
    huge: tuple[Raw, HugeDisk, DiskExport], command: int, offset: int, length: int, error: int
) -> None:
    """faults row 63: nothing wraps, and nothing is allocated by a length that the client chose."""
    raw, disk, export = huge
    assert raw.error(command, offset, length) == error
    assert export.calls == disk.calls == []
    assert raw.alive()


@pytest.mark.parametrize("command", [p.READ, p.TRIM, p.ZEROES, p.CACHE, p.FLUSH, 8, 0xFFFF])
@pytest.mark.parametrize("length", [1, 100_000])
def test_the_payload_of_a_refused_request_is_drained(
    extended: Raw, export: DiskExport, command: int, length: int
) -> None:
    """faults row 63: a payload that looks like requests is not taken for them."""
    evil = (p.EXT_REQUEST.pack(p.EXT_REQUEST_MAGIC, 0, p.ZEROES, 666, 0, 4096) * (length // 32 + 1))[:length]
    assert extended.error(command, 0, payload=evil) == errno.EINVAL
    assert extended.alive()
    assert export.calls == [("write", 0, 4)]


@pytest.mark.parametrize("command", [p.WRITE, p.TRIM, p.STATUS, 9])
def test_an_oversized_payload_ends_the_connection_and_allocates_nothing(
    extended: Raw, export: DiskExport, command: int
) -> None:
    extended.request(command, 0, p.MAX_PAYLOAD + 1, flags=p.CMD_PAYLOAD)
    assert extended.hung_up()
    assert export.calls == []


def test_without_extended_headers_there_are_no_such_payloads(connect: Callable[[], Raw], export: DiskExport) -> None:
    raw = connect().go(p.ALLOCATION)
    assert raw.error(p.TRIM, 0, 12, flags=p.CMD_PAYLOAD) == errno.EINVAL
    raw.request(p.STATUS, 0, 12, flags=p.CMD_PAYLOAD)
    assert raw.chunk() == (p.CHUNK_DONE, p.CHUNK_ERROR, 7, p.U32.pack(errno.EINVAL) + bytes(2))
    assert raw.error(p.WRITE, 0, 4, flags=p.CMD_PAYLOAD, payload=b"abcd") == errno.EINVAL
    assert raw.alive()
    assert export.calls == [("write", 0, 4)]


@pytest.mark.parametrize("magic", [0, p.REQUEST_MAGIC, p.EXT_CHUNK_MAGIC])
def test_a_wrong_magic_ends_the_connection(extended: Raw, magic: int) -> None:
    """faults row 64: also the request of another dialect."""
    extended.send(p.EXT_REQUEST.pack(magic, 0, p.READ, 1, 0, 1))
    assert extended.hung_up()


@pytest.mark.parametrize("payload", [b"", b"farewell"])
def test_disconnect(extended: Raw, payload: bytes) -> None:
    extended.request(p.DISC, payload=payload)
    assert extended.hung_up()


def test_a_read_only_export(connect: Callable[[], Raw], export: DiskExport) -> None:
    export.read_only = True
    raw = connect().go(extended=True)
    assert raw.error(p.WRITE, 0, payload=b"abcd") == errno.EPERM
    for command in (p.TRIM, p.ZEROES):
        assert raw.error(command, 0, 4) == errno.EPERM
    assert raw.error(p.FLUSH) == 0
    assert export.calls == [("flush",)]

"""The server's side of negotiation: every option, and every way to get one wrong."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from incbak.nbd import handshake
from incbak.nbd import protocol as p
from incbak.nbd.handshake import transmission_flags
from incbak.nbd.protocol import Dialect
from tests.kit.serve import wait_until
from tests.unit.nbd.peers import DIRTY, PATIENCE, SIZE, DiskExport, Raw, served, string


def test_go(raw: Raw, export: DiskExport) -> None:
    """Size, flags and block sizes are told; nothing is opened before (faults row 65)."""
    raw.greet()
    replies = raw.option(p.OPT_INFO, string("disk") + bytes(2))
    assert replies[-1] == (p.REP_ACK, b"")
    assert export.opened == 0
    assert raw.option(p.OPT_GO, string("disk") + bytes(2)) == replies
    infos = {p.U16.unpack_from(body)[0]: body[2:] for kind, body in replies if kind == p.REP_INFO}
    assert infos[p.INFO_EXPORT] == p.U64.pack(SIZE) + p.U16.pack(transmission_flags(export, Dialect.SIMPLE))
    assert infos[p.INFO_BLOCK_SIZE] == p.U32.pack(1) + p.U32.pack(4096) + p.U32.pack(p.MAX_PAYLOAD)
    assert raw.alive()
    assert export.opened == 1
    raw.close()
    wait_until(lambda: export.closed == 1, "the device is closed with the connection")


def test_what_is_asked_for_is_told(raw: Raw) -> None:
    raw.greet()
    asked = p.U16.pack(2) + p.U16.pack(p.INFO_NAME) + p.U16.pack(p.INFO_DESCRIPTION)
    infos = {p.U16.unpack_from(b)[0]: b[2:] for k, b in raw.option(p.OPT_INFO, string("") + asked) if k == p.REP_INFO}
    assert infos[p.INFO_NAME] == b"disk"
    assert infos[p.INFO_DESCRIPTION] == b"a disk"


def test_flags(export: DiskExport) -> None:
    """DF is for those who read chunks, a block status of some contexts for those who have extended headers."""
    flags = transmission_flags(export, Dialect.SIMPLE, status_payload=True)
    writable = p.SEND_TRIM | p.SEND_ZEROES | p.SEND_FAST_ZERO
    assert flags == p.HAS_FLAGS | p.SEND_FLUSH | p.SEND_FUA | p.SEND_CACHE | p.MULTI_CONN | writable
    assert transmission_flags(export, Dialect.STRUCTURED, status_payload=True) == flags | p.SEND_DF
    assert transmission_flags(export, Dialect.EXTENDED) == flags | p.SEND_DF
    extended = transmission_flags(export, Dialect.EXTENDED, status_payload=True)
    assert extended == flags | p.SEND_DF | p.STATUS_PAYLOAD
    export.read_only, export.multi_conn = True, False
    assert transmission_flags(export, Dialect.SIMPLE) == flags & ~writable & ~p.MULTI_CONN | p.READ_ONLY


def test_list() -> None:
    with served(DiskExport(), DiskExport(name="zwei ü")) as (_server, connect):
        replies = connect().greet().option(p.OPT_LIST)
    assert replies == [(p.REP_SERVER, string(n) + b"a disk") for n in ("disk", "zwei ü")] + [(p.REP_ACK, b"")]


def test_another_way_to_an_export_is_found_and_not_listed(export: DiskExport) -> None:
    other = DiskExport(name="other")
    with served(export, other, alias={"": export}) as (_server, connect):
        raw = connect().greet()
        assert raw.option(p.OPT_LIST) == [(p.REP_SERVER, string(n) + b"a disk") for n in ("disk", "other")] + [
            (p.REP_ACK, b"")
        ]
        asked = p.U16.pack(1) + p.U16.pack(p.INFO_NAME)
        assert (p.REP_INFO, p.U16.pack(p.INFO_NAME) + b"disk") in raw.option(p.OPT_INFO, string("") + asked)


@pytest.mark.parametrize("zeroes", [True, False])
def test_export_name(raw: Raw, export: DiskExport, zeroes: bool) -> None:
    """The old way in; 124 zeroes follow unless both sides do without."""
    raw.greet(p.FLAG_FIXED_NEWSTYLE | (0 if zeroes else p.FLAG_NO_ZEROES))
    raw.send(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 4) + b"disk")
    assert raw.recv(10) == p.U64.pack(SIZE) + p.U16.pack(transmission_flags(export, Dialect.SIMPLE))
    if zeroes:
        assert raw.recv(124) == bytes(124)
    assert raw.alive()


def test_the_only_export_is_the_default(connect: Callable[[], Raw]) -> None:
    connect().go(name="").alive()
    with served(DiskExport(), DiskExport(name="other")) as (_server, connect_two):
        assert connect_two().greet().ask(p.OPT_GO, string("") + bytes(2)) == p.ERR_UNKNOWN


def test_abort(raw: Raw, export: DiskExport) -> None:
    assert raw.greet().ask(p.OPT_ABORT) == p.REP_ACK
    assert raw.hung_up()
    assert export.opened == 0


@pytest.mark.parametrize("option", [4, p.OPT_STARTTLS, 12, 0x7FFFFFFF])
def test_an_unknown_option_is_answered_and_the_next_one_works(raw: Raw, option: int) -> None:
    """faults row 64: its data is taken off the wire."""
    raw.greet()
    assert raw.ask(option, b"data") == p.ERR_UNSUP
    assert raw.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
    assert raw.alive()


@pytest.mark.parametrize(
    ("option", "data"),
    [
        (p.OPT_LIST, b"x"),
        (p.OPT_STRUCTURED, b"x"),
        (p.OPT_GO, b""),
        (p.OPT_GO, b"\0\0"),
        (p.OPT_GO, string("disk")),
        (p.OPT_GO, string("disk") + b"\0\1"),
        (p.OPT_GO, string("disk") + b"\0\0\0"),
        (p.OPT_GO, p.U32.pack(0xFFFFFFFF) + b"disk\0\0"),
        (p.OPT_GO, p.U32.pack(4) + b"\xff\xfe\xfd\xfc\0\0"),
        (p.OPT_GO, string("x" * 4097) + bytes(2)),
        (p.OPT_SET_META, b""),
        (p.OPT_SET_META, string("disk")),
        (p.OPT_SET_META, string("disk") + p.U32.pack(1)),
        (p.OPT_SET_META, string("disk") + p.U32.pack(0) + b"x"),
        (p.OPT_SET_META, string("disk") + p.U32.pack(0xFFFFFFFF)),
        (p.OPT_LIST_META, string("disk") + p.U32.pack(1) + p.U32.pack(5) + b"abc"),
    ],
)
def test_a_malformed_option_is_refused_and_the_next_one_works(raw: Raw, option: int, data: bytes) -> None:
    """faults rows 63, 64: lengths that lie, trailing bytes, what is no UTF-8."""
    raw.greet()
    if option in (p.OPT_SET_META, p.OPT_LIST_META):
        assert raw.ask(p.OPT_STRUCTURED) == p.REP_ACK
    assert raw.ask(option, data) == p.ERR_INVALID
    assert raw.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
    assert raw.alive()


@pytest.mark.parametrize("name", ["../../etc/shadow", "disk\0", "x" * 4096, "disk ", "\x1b[31m", "DISK"])
def test_a_name_is_a_key_and_its_answer_is_printable(raw: Raw, name: str) -> None:
    """faults row 71."""
    kind, text = raw.greet().option(p.OPT_GO, string(name) + bytes(2))[-1]
    assert kind == p.ERR_UNKNOWN
    assert text.decode().isprintable()
    assert len(text) < 200


@pytest.mark.parametrize(
    "head",
    [
        p.OPTION.pack(b"IHAVEOPX", p.OPT_LIST, 0),
        p.OPTION.pack(p.OPTION_MAGIC, p.OPT_LIST, 0xFFFFFFFF),
        p.OPTION.pack(p.OPTION_MAGIC, 99, handshake.MAX_OPTION + 1),
        p.OPTION.pack(p.OPTION_MAGIC, p.OPT_EXPORT_NAME, 5) + b"other",
    ],
)
def test_what_cannot_be_answered_ends_the_connection(raw: Raw, export: DiskExport, head: bytes) -> None:
    """faults row 64: wrong magic, an option of 4 GiB, an unknown name in the old way."""
    raw.greet().send(head)
    assert raw.hung_up()
    assert export.opened == 0


@pytest.mark.parametrize("flags", [0, p.FLAG_NO_ZEROES, p.FLAG_FIXED_NEWSTYLE | 4, 0xFFFFFFFF])
def test_client_flags_that_cannot_be(raw: Raw, flags: int) -> None:
    raw.greet(flags)
    assert raw.hung_up()


def test_a_flood_of_options_ends(export: DiskExport) -> None:
    """faults row 65: at their number, long before the deadline."""
    with served(export, timeout=3 * PATIENCE) as (_server, connect):
        raw = connect().greet()
        for _ in range(handshake.MAX_OPTIONS):
            assert raw.ask(p.OPT_LIST) == p.REP_ACK
        assert raw.hung_up()


def test_a_flood_of_bytes_ends(raw: Raw) -> None:
    """faults row 65: each option is allowed, all together are not."""
    raw.greet()
    for _ in range(handshake.MAX_OPTION_BYTES // handshake.MAX_OPTION):
        assert raw.ask(99, bytes(handshake.MAX_OPTION)) == p.ERR_UNSUP
    raw.send(p.OPTION.pack(p.OPTION_MAGIC, 99, 1) + b"x")
    assert raw.hung_up()


@pytest.mark.parametrize(("sent", "drip"), [(b"", b""), (b"\0", b""), (p.U32.pack(3), b"I"), (p.U32.pack(3), b"")])
def test_the_whole_handshake_has_one_deadline(sent: bytes, drip: bytes) -> None:
    """faults row 66: a byte now and then does not extend it."""
    export = DiskExport()
    with served(export, timeout=0.3) as (server, connect):
        raw = connect()
        raw.recv(18)
        begun = time.monotonic()
        raw.send(sent)
        raw.sock.settimeout(0.05)
        while time.monotonic() - begun < PATIENCE:
            try:
                assert raw.hung_up()
                break
            except TimeoutError:
                with suppress(OSError):
                    raw.send(drip)
        assert 0.2 < time.monotonic() - begun < 5
        wait_until(lambda: server.connections() == 0, "the connection is forgotten")
    assert export.opened == 0


def test_one_that_never_reads_its_replies_is_dropped() -> None:
    """faults rows 66, 68: the deadline holds for sending too."""
    with served(DiskExport(name="x" * 3000), timeout=0.3) as (server, connect):
        raw = connect().greet()
        with pytest.raises(OSError):
            for _ in range(5000):
                raw.send(p.OPTION.pack(p.OPTION_MAGIC, p.OPT_LIST, 0) * 10)
        wait_until(lambda: server.connections() == 0, "the connection is forgotten")


# -- meta contexts -----------------------------------------------------------------------------------------------------


def test_meta_contexts_need_structured_replies(raw: Raw) -> None:
    assert raw.greet().meta(p.OPT_SET_META, p.ALLOCATION) == [(p.ERR_INVALID, "")]
    assert raw.meta(p.OPT_LIST_META) == [(p.ERR_INVALID, "")]


def test_meta_contexts_are_listed_and_set(raw: Raw) -> None:
    """LIST knows prefixes and lists all when it asks for none; SET takes exact names, with numbers of their own."""
    raw.greet()
    assert raw.ask(p.OPT_STRUCTURED) == p.REP_ACK
    both = [(0, p.ALLOCATION), (0, DIRTY)]
    assert raw.meta(p.OPT_LIST_META) == both
    assert raw.meta(p.OPT_LIST_META, "qemu:") == raw.meta(p.OPT_LIST_META, p.DIRTY_BITMAP) == both[1:]
    assert raw.meta(p.OPT_LIST_META, "other:") == []
    assert raw.meta(p.OPT_SET_META, "qemu:", "nothing") == []
    assert raw.meta(p.OPT_SET_META, DIRTY, p.ALLOCATION, "nothing") == [(1, p.ALLOCATION), (2, DIRTY)]
    assert raw.meta(p.OPT_SET_META, p.ALLOCATION, name="other") == [(p.ERR_UNKNOWN, "")]


def _status_works(raw: Raw) -> bool:
    assert raw.ask(p.OPT_GO, string("disk") + bytes(2)) == p.REP_ACK
    raw.request(p.STATUS, 0, 4096)
    return raw.chunk()[1] == p.CHUNK_STATUS


def test_each_set_replaces_the_one_before_even_if_it_fails(connect: Callable[[], Raw]) -> None:
    """As the protocol says of NBD_OPT_SET_META_CONTEXT."""
    for last, works in (
        (lambda r: r.meta(p.OPT_SET_META, p.ALLOCATION), True),
        (lambda r: r.meta(p.OPT_LIST_META, "nothing"), True),
        (lambda r: r.meta(p.OPT_SET_META, "nothing"), False),
        (lambda r: r.meta(p.OPT_SET_META, p.ALLOCATION, name="other"), False),
        (lambda r: r.option(p.OPT_SET_META, b"malformed"), False),
    ):
        raw = connect().greet()
        assert raw.ask(p.OPT_STRUCTURED) == p.REP_ACK
        assert raw.meta(p.OPT_SET_META, p.ALLOCATION) == [(1, p.ALLOCATION)]
        last(raw)
        assert _status_works(raw) is works


def test_contexts_of_another_export_do_not_count() -> None:
    with served(DiskExport(), DiskExport(name="other")) as (_server, connect):
        raw = connect().greet()
        assert raw.ask(p.OPT_STRUCTURED) == p.REP_ACK
        assert raw.meta(p.OPT_SET_META, p.ALLOCATION, name="other") == [(1, p.ALLOCATION)]
        assert not _status_works(raw)

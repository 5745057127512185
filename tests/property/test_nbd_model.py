"""An export is a byte array: random requests over several connections, in flight together, against the model."""

from __future__ import annotations

import errno
from contextlib import ExitStack

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.disk.memory import MemoryDisk
from incbak.errors import NbdRequestError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from tests.unit.nbd.peers import DiskExport, served

SIZE = 300_007
offsets = st.one_of(st.integers(0, SIZE), st.sampled_from([0, 4095, 65_536, SIZE - 1, SIZE]))
lengths = st.one_of(st.integers(0, 600), st.integers(0, SIZE), st.sampled_from([512, 4096, 131_072, 131_073]))
requests = st.tuples(
    st.sampled_from(["read", "read", "write", "write", "fua", "zero", "keep", "trim", "flush", "status", "beyond"]),
    offsets,
    lengths,
    st.integers(0, 255),
    st.integers(0, 1),
)


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(requests, max_size=25), st.booleans(), st.sampled_from([p.Dialect.STRUCTURED, p.Dialect.EXTENDED]))
def test_an_export_is_a_byte_array(
    plan: list[tuple[str, int, int, int, int]], nowait: bool, dialect: p.Dialect
) -> None:
    """faults rows 60, 61, 63: odd offsets and lengths, nothing, and past the end; each reply is of its request."""
    export = DiskExport(MemoryDisk(SIZE))
    export.may_block = lambda offset, length: not nowait and bool((offset + length) % 2)
    model = bytearray(SIZE)
    with ExitStack() as stack:
        _server, connect = stack.enter_context(served(export))
        clients = [
            NbdClient.connect(connect().sock, "disk", contexts=[p.ALLOCATION], dialect=which)
            for which in (dialect, p.Dialect.EXTENDED)
        ]
        for what, offset, length, fill, which in plan:
            client, length = clients[which], min(length, SIZE - offset)
            data = bytes([fill]) * length
            if what == "read":
                assert client.read(offset, length) == model[offset : offset + length]
            elif what in ("write", "fua"):
                client.write(data, offset, fua=what == "fua")
                model[offset : offset + length] = data
            elif what in ("zero", "keep"):
                client.write_zeroes(offset, length, no_hole=what == "keep")
                model[offset : offset + length] = bytes(length)
            elif what == "trim":
                client.trim(offset, length)
                model[offset : offset + length] = client.read(offset, length)
            elif what == "status" and length:
                at = offset
                for count, flags in client.block_status(offset, length, p.ALLOCATION):
                    assert not flags or not any(model[at : at + count])
                    at += count
                assert at <= offset + length
            elif what == "beyond":
                _refused(client, offset, fill)
            else:
                client.flush()
        assert [c.read(0, SIZE) for c in clients] == [model, model]
        for client in clients:
            client.close()


def _refused(client: NbdClient, offset: int, fill: int) -> None:
    """Past the end; the client's own check is told that the disk is larger."""
    client.size = SIZE + 1000
    with pytest.raises(NbdRequestError) as caught:
        client.write(bytes([fill]) * (SIZE - offset + 1), offset)
    assert caught.value.errno == errno.ENOSPC
    client.size = SIZE


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 255)), min_size=1, max_size=120),
    st.integers(1, 32),
    st.booleans(),
)
def test_writes_in_flight_together_all_arrive(writes: list[tuple[int, int]], window: int, slow: bool) -> None:
    """faults row 70: each stripe has one of the values that were written to it, the last one if none were slow."""
    export = DiskExport(MemoryDisk(64 * 4096))
    export.may_block = lambda offset, _length: slow and not offset % 3
    with served(export) as (_server, connect):
        client = NbdClient.connect(connect().sock, "disk", window=window)
        for stripe, fill in writes:
            client.submit_write(bytes([fill]) * 4096, stripe * 4096)
        client.drain()
        found = [client.read(i * 4096, 4096) for i in range(64)]
        client.close()
    for stripe in range(64):
        values = [fill for at, fill in writes if at == stripe] or [0]
        allowed = values if slow and not stripe % 3 else values[-1:]
        assert found[stripe] in [bytes([v]) * 4096 for v in allowed]

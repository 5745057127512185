"""The header codec: what is written is read; what is torn, rotten or newer never passes for a header."""

from __future__ import annotations

from dataclasses import replace

import pytest
from blake3 import blake3
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.bitmap import format as fmt
from incbak.bitmap.format import Flag, Slot
from incbak.fingerprint import Beat, Fingerprint
from incbak.reasons import Reason

SLOT = Slot(
    name="incbak-01234567-89abcdef",
    size=(1 << 40) + 512,
    granularity=65536,
    disk_uuid=bytes(range(16)),
    flags=Flag.CLEAN | Flag.ENABLED,
    sequence=7,
    cache_id=bytes(range(16, 32)),
    owner_pid=4321,
    owner_start=987654,
    created_ns=1_700_000_000_000_000_000,
    reason="",
    fingerprint=Fingerprint(
        (1 << 40) + 512, 99, 1_600_000_000_000_000_000, bytes(range(32, 48)), 7, b"attribut", bytes(range(32))
    ),
    digest=bytes(range(64, 96)),
)
OLDER = replace(SLOT, sequence=6, flags=Flag.ENABLED)

blobs = st.binary(min_size=16, max_size=16)
names = st.text(min_size=1, max_size=32).filter(lambda s: "\0" not in s)
slots = st.builds(
    Slot,
    name=names,
    size=st.integers(0, fmt.SIZE_LIMIT),
    granularity=st.integers(9, 31).map(lambda n: 1 << n),
    disk_uuid=blobs,
    flags=st.integers(0, 7).map(Flag),
    sequence=st.integers(0, (1 << 63) - 1),
    cache_id=blobs,
    owner_pid=st.integers(0, (1 << 32) - 1),
    owner_start=st.integers(0, (1 << 64) - 1),
    created_ns=st.integers(0, (1 << 64) - 1),
    reason=st.sampled_from(["", *Reason]),
    fingerprint=st.builds(
        Fingerprint,
        st.integers(0, fmt.SIZE_LIMIT),
        st.integers(0, (1 << 64) - 1),
        st.integers(-(1 << 63), (1 << 63) - 1),
        blobs,
        st.integers(-(1 << 63), (1 << 63) - 1),
        st.binary(min_size=8, max_size=8),
        st.binary(min_size=32, max_size=32),
    ),
    digest=st.binary(min_size=32, max_size=32),
)


@given(slots)
def test_what_is_encoded_is_decoded(slot: Slot) -> None:
    sector = fmt.encode(slot)
    assert len(sector) == fmt.SECTOR
    assert fmt.decode(sector) == slot


@settings(max_examples=30)
@given(slots)
def test_the_parts_of_a_file_neither_overlap_nor_end_early(slot: Slot) -> None:
    start, coarse, end = fmt.layout(slot)
    assert start == fmt.HEADER >= fmt.HEARTBEAT + 16
    assert coarse - start >= -(-slot.clusters // 8)
    assert end - coarse >= slot.regions
    assert slot.clusters * slot.granularity >= slot.size
    assert not coarse % 4096
    assert not end % 4096


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("torn", [*range(17, 512, 30), 511])
def test_a_torn_sector_leaves_the_other_slot(which: int, torn: int) -> None:
    """faults row 20: the first ``torn`` bytes of one slot are of the new header, the rest of what was there before."""
    fresh, before = fmt.encode(SLOT), fmt.encode(replace(SLOT, sequence=5))
    half = fresh[:torn] + before[torn:]
    other = fmt.encode(OLDER)
    found, both = fmt.newest(half + other if which == 0 else other + half)
    assert isinstance(found, Slot)
    assert not both
    assert found == OLDER


def test_every_flipped_bit_is_noticed() -> None:
    """faults row 23: rot anywhere in a sector, its checksum included."""
    sector = fmt.encode(SLOT)
    for bit in range(0, 8 * fmt.SECTOR, 5):
        rotten = bytearray(sector)
        rotten[bit >> 3] ^= 1 << (bit & 7)
        assert isinstance(fmt.decode(bytes(rotten)), Reason)


@pytest.mark.parametrize("order", [(SLOT, OLDER), (OLDER, SLOT)])
def test_the_newest_slot_decides_wherever_it_lies(order: tuple[Slot, Slot]) -> None:
    assert fmt.newest(fmt.encode(order[0]) + fmt.encode(order[1])) == (SLOT, True)


def _with(sector: bytes, offset: int, value: bytes) -> bytes:
    changed = sector[:offset] + value + sector[offset + len(value) : -16]
    return changed + blake3(changed).digest(length=16)


def test_another_version_is_a_format_of_its_own() -> None:
    """faults row 83: a newer file is refused for what it is, not called rotten."""
    newer = _with(fmt.encode(SLOT), 8, (fmt.VERSION + 1).to_bytes(4, "little"))
    assert fmt.decode(newer) is Reason.FORMAT
    assert fmt.newest(newer * 2) == (Reason.FORMAT, False)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb" * 300, bytes(1024), fmt.MAGIC])
def test_what_is_no_bitmap_file_is_said_to_be_none(content: bytes) -> None:
    assert fmt.newest(content) == (Reason.FORMAT, False)


def test_two_rotten_slots_are_a_rotten_header() -> None:
    rotten = bytearray(fmt.encode(SLOT) + fmt.encode(OLDER))
    rotten[100] ^= 1
    rotten[612] ^= 1
    assert fmt.newest(bytes(rotten)) == (Reason.HEADER, False)


@pytest.mark.parametrize(
    ("offset", "value"),
    [(24, (1 << 57).to_bytes(8, "little")), (32, (0).to_bytes(4, "little")), (32, (3000).to_bytes(4, "little"))],
)
def test_numbers_that_cannot_be_are_refused_although_they_verify(offset: int, value: bytes) -> None:
    """A size beyond the limit, a granularity of nothing, one that is no power of two."""
    assert fmt.decode(_with(fmt.encode(SLOT), offset, value)) is Reason.HEADER


@given(st.integers(1, (1 << 64) - 1))
def test_a_heartbeat_is_read_back(now: int) -> None:
    assert fmt.decode_beat(fmt.encode_beat(Beat(now, 1, 2))) == Beat(now, 1, 2)


@given(st.binary(min_size=fmt.BEAT_SIZE, max_size=fmt.BEAT_SIZE))
def test_a_torn_heartbeat_is_none(raw: bytes) -> None:
    first, second = int.from_bytes(raw[:8], "little"), int.from_bytes(raw[8:16], "little")
    whole = first ^ second == (1 << 64) - 1 and first
    assert fmt.decode_beat(raw) == (Beat(first) if whole else None)


def test_a_heartbeat_that_is_torn_behind_its_clock_is_of_the_clock_only() -> None:
    """As that of an older version, which has nothing there."""
    raw = fmt.encode_beat(Beat(5, 6, 7, b"w" * 32))
    assert fmt.decode_beat(raw[:16].ljust(fmt.BEAT_SIZE, b"\0")) == Beat(5)
    assert fmt.decode_beat(raw[:-9] + b"x" + raw[-8:]) == Beat(5)

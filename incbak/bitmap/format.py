"""The bitmap file's header: a pure codec.

::

    offset  size
    0       512   slot 0                      one sector each, so that a torn write spoils one of them only;
    512     512   slot 1                      the newest that verifies decides
    1024    88    heartbeat                   the owner's last sign of life, see `Beat`; never synced
    1112    8     the owner's note of its writes: until when, the lowest bit for "at it" (`BUSY`); never synced
    1120    2976  reserved, zero
    4096          the bits, padded to 4096    cluster i is bit i & 7 of byte i >> 3
    ...           the coarse map, padded to 4096, one byte per 64 MiB region: 0x5A untouched, 0xA5 touched
"""

from __future__ import annotations

import struct
import sys
from dataclasses import dataclass, replace
from enum import IntFlag

from blake3 import blake3

from incbak.bitmap.bits import bytes_for
from incbak.fingerprint import Beat, Fingerprint
from incbak.reasons import Reason

MAGIC = b"INCBAKBM"
VERSION = 1
HEADER = 4096
SECTOR = 512
HEARTBEAT, NOTE, NOTE_SIZE = 1024, 1112, 8
BUSY = 1
REGION_SHIFT = 26
REGION = 1 << REGION_SHIFT
UNTOUCHED, TOUCHED = 0x5A, 0xA5
NAME_LIMIT = 128
SIZE_LIMIT = 1 << 56
SEQUENCE_LIMIT = 1 << 63

_SLOT = struct.Struct("<8sIIQQIHH16s16sIIQQ32sQQq16s32s128sq8s32s")
_BEAT = struct.Struct("<QQqq32sqq")
_CHECKSUM = 16
BEAT_SIZE = _BEAT.size + 8
assert HEARTBEAT + BEAT_SIZE <= NOTE
assert _SLOT.size <= SECTOR - _CHECKSUM


class Flag(IntFlag):
    """The state flags of a slot."""

    CLEAN = 1
    ENABLED = 2
    INVALID = 4


@dataclass(frozen=True)
class Slot:
    """One copy of the header. Sizes in bytes; ``cache_id``, ``owner_pid`` and ``owner_start`` are of the last owner.

    ``cache_id``: the page cache that has what the owner stored (`page_cache_id`). Early versions of incbak wrote the id
    of the boot there, which equals no page cache: after a kill, their file is taken for one of another boot.
    """

    name: str
    size: int
    granularity: int
    disk_uuid: bytes
    flags: Flag
    sequence: int
    cache_id: bytes
    owner_pid: int
    owner_start: int
    created_ns: int
    reason: str
    fingerprint: Fingerprint
    digest: bytes

    @property
    def clusters(self) -> int:
        """How many bits there are."""
        return -(-self.size // self.granularity)

    @property
    def regions(self) -> int:
        """How many coarse bytes there are."""
        return -(-self.size // REGION)

    def with_flags(self, flags: Flag) -> Slot:
        """The next state: other flags, a higher sequence."""
        return replace(self, flags=flags, sequence=self.sequence + 1)


def _padded(count: int) -> int:
    return -(-count // HEADER) * HEADER


def layout(slot: Slot) -> tuple[int, int, int]:
    """Offset of the bits, offset of the coarse map, and size of the file."""
    coarse = HEADER + _padded(bytes_for(slot.clusters))
    return HEADER, coarse, coarse + _padded(slot.regions)


def encode(slot: Slot) -> bytes:
    """One sector."""
    name = slot.name.encode()
    body = _SLOT.pack(
        MAGIC,
        VERSION,
        slot.flags,
        slot.sequence,
        slot.size,
        slot.granularity,
        REGION_SHIFT,
        len(name),
        slot.disk_uuid,
        slot.cache_id,
        slot.owner_pid,
        0,
        slot.owner_start,
        slot.created_ns,
        slot.reason.encode(),
        slot.fingerprint.size,
        slot.fingerprint.inode,
        slot.fingerprint.mtime_ns,
        slot.fingerprint.sample,
        slot.digest,
        name,
        slot.fingerprint.ctime_ns,
        slot.fingerprint.attributes,
        slot.fingerprint.writes,
    ).ljust(SECTOR - _CHECKSUM, b"\0")
    return body + blake3(body).digest(length=_CHECKSUM)


def decode(sector: bytes) -> Slot | Reason:
    """A slot, or why it is none: `Reason.FORMAT` (another kind or version of file) or `Reason.HEADER` (rot)."""
    if len(sector) < SECTOR or sector[:8] != MAGIC:
        return Reason.FORMAT
    if blake3(sector[:-_CHECKSUM]).digest(length=_CHECKSUM) != sector[-_CHECKSUM:]:
        return Reason.HEADER
    fields = _SLOT.unpack_from(sector)
    if fields[1] != VERSION or fields[6] != REGION_SHIFT:
        return Reason.FORMAT
    slot = Slot(
        name=fields[20][: fields[7]].decode(errors="replace"),
        size=fields[4],
        granularity=fields[5],
        disk_uuid=fields[8],
        flags=Flag(fields[2]),
        sequence=fields[3],
        cache_id=fields[9],
        owner_pid=fields[10],
        owner_start=fields[12],
        created_ns=fields[13],
        reason=fields[14].rstrip(b"\0").decode(errors="replace"),
        fingerprint=Fingerprint(*fields[15:19], *fields[21:24]),
        digest=fields[19],
    )
    sane = 512 <= slot.granularity <= 1 << 31 and not slot.granularity & (slot.granularity - 1)
    return slot if sane and slot.size <= SIZE_LIMIT and slot.sequence < SEQUENCE_LIMIT else Reason.HEADER


def newest(sectors: bytes) -> tuple[Slot | Reason, bool]:
    """The newest slot of the first two sectors (or why there is none), and whether both verify."""
    slots = [decode(sectors[:SECTOR]), decode(sectors[SECTOR : 2 * SECTOR])]
    good = [s for s in slots if isinstance(s, Slot)]
    if not good:
        return (Reason.FORMAT if slots == [Reason.FORMAT, Reason.FORMAT] else Reason.HEADER), False
    return max(good, key=lambda s: s.sequence), len(good) == 2


def encode_beat(beat: Beat) -> bytes:
    """A heartbeat: the clock and its complement, what was seen of the disk, and a checksum of all."""
    clock = beat.clock_ns & (1 << 64) - 1
    body = _BEAT.pack(clock, clock ^ (1 << 64) - 1, beat.mtime_ns, beat.ctime_ns, beat.writes, *beat.durable_ns)
    return body + blake3(body).digest(length=8)


def decode_beat(raw: bytes) -> Beat | None:
    """The last heartbeat; ``None`` if there was none or its clock is torn. What else is torn is not known."""
    clock, complement, mtime_ns, ctime_ns, writes, *durable = _BEAT.unpack_from(raw)
    if clock ^ complement != (1 << 64) - 1 or not clock:
        return None
    whole = blake3(raw[: _BEAT.size]).digest(length=8) == raw[_BEAT.size : BEAT_SIZE]
    return Beat(clock, mtime_ns, ctime_ns, writes, 0, (durable[0], durable[1])) if whole else Beat(clock)


def decode_note(raw: bytes) -> tuple[int, bool]:
    """Return until when the owner writes, and whether it is at it; a time of 0 where it has noted nothing."""
    word = int.from_bytes(raw, sys.byteorder)
    return word & ~BUSY, bool(word & BUSY)

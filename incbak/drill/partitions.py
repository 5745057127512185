"""Where the partitions of a disk are: GPT, MBR with logical ones, or none. Pure; believes no number."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from incbak.files import systems

Read = Callable[[int, int], bytes]
"""Offset and length, inside of the disk."""
MOST = 128
"""Partitions that are looked at."""
_EXTENDED = (0x05, 0x0F, 0x85)
_PROTECTIVE = 0xEE
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_MOST_ENTRIES = 4 << 20
_SECTOR = 512


@dataclass(frozen=True)
class Part:
    """``number`` as kernels count, 0 for a disk without a table; bytes."""

    number: int
    start: int
    length: int


class TableError(Exception):
    """The partition table cannot be what a disk that works has."""


def partitions(read: Read, size: int) -> list[Part]:
    """In the order of the table. Raises `TableError`."""
    head = read(0, min(size, systems.HEAD))
    kind = systems.table_of(head) if len(head) >= _SECTOR else ""
    if not kind:
        return [Part(0, 0, size)] if size else []
    found = list(_gpt(read, size) if kind == "GPT" else _mbr(read, size, head))
    for part in found:
        if part.start + part.length > size:
            raise TableError(f"partition {part.number} reaches beyond the end of the disk")
    return found[:MOST]


def _gpt(read: Read, size: int) -> Iterator[Part]:
    for sector in (512, 4096):
        if 2 * sector <= size and (header := read(sector, sector))[:8] == b"EFI PART":
            yield from _entries(read, size, sector, header)
            return


def _entries(read: Read, size: int, sector: int, header: bytes) -> Iterator[Part]:
    fields = _HEADER.unpack_from(header)
    length, checksum, at, count, each, of_entries = fields[2], fields[3], fields[10], fields[11], fields[12], fields[13]
    if not _HEADER.size <= length <= sector or _without(header[:length], 16) != checksum:
        raise TableError("the GPT's header does not match its checksum")
    if each < 128 or each % 8 or count * each > _MOST_ENTRIES or at * sector + count * each > size:
        raise TableError("the GPT's entries are where they cannot be")
    data = read(at * sector, count * each)
    if zlib.crc32(data) != of_entries:
        raise TableError("the GPT's entries do not match their checksum")
    for n in range(count):
        entry = data[n * each : n * each + 48]
        first, last = struct.unpack_from("<QQ", entry, 32)
        if entry[:16].strip(b"\0"):
            if last < first:
                raise TableError(f"partition {n + 1} ends before it begins")
            yield Part(n + 1, first * sector, (last + 1 - first) * sector)


def _without(header: bytes, at: int) -> int:
    return zlib.crc32(header[:at] + bytes(4) + header[at + 4 :])


def _mbr(read: Read, size: int, head: bytes) -> Iterator[Part]:
    for n, (kind, start, count) in enumerate(_slots(head), 1):
        if kind in _EXTENDED and count:
            yield from _logical(read, size, start)
        elif kind not in (0, _PROTECTIVE) and count:
            yield Part(n, start * _SECTOR, count * _SECTOR)


def _logical(read: Read, size: int, base: int) -> Iterator[Part]:
    at = base
    for number in range(5, 5 + MOST):
        if (at + 1) * _SECTOR > size:
            raise TableError("a logical partition lies beyond the end of the disk")
        sector = read(at * _SECTOR, _SECTOR)
        if sector[510:] != b"\x55\xaa":
            raise TableError(f"the table of logical partition {number} is none")
        (kind, start, count), (_next_kind, ahead, more), *_ = _slots(sector)
        if kind and count:
            yield Part(number, (at + start) * _SECTOR, count * _SECTOR)
        if not more:
            return
        at = base + ahead
    raise TableError(f"there are more than {MOST} logical partitions")


def _slots(sector: bytes) -> list[tuple[int, int, int]]:
    """(type, start, count) of each, in sectors."""
    return [struct.unpack_from("<4xB3xII", sector, 446 + 16 * n) for n in range(4)]

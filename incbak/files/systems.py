"""What is on a disk or in a partition, by its first bytes. Pure."""

from __future__ import annotations

import struct
from dataclasses import dataclass

HEAD = 72 << 10
"""So many of the first bytes tell."""
EXT, NTFS, FAT, EXFAT = "ext", "NTFS", "FAT", "exFAT"
READABLE = frozenset({"ext2", "ext3", "ext4", NTFS, FAT, EXFAT})

_EXT_MAGIC = 0xEF53
_JOURNAL, _RECOVER, _EXTENTS = 0x4, 0x4, 0x40
_INCOMPAT = 0x2 | 0x4 | 0x40 | 0x80 | 0x200 | 0x2000 | 0x4000 | 0x8000 | 0x400 | 0x100 | 0x10 | 0x10000 | 0x20000
"""Features without which files would be read wrong, and with which the library was tried, or that change no content."""
_BIGALLOC = 0x200
_AT = {
    "XFS": (0, b"XFSB"),
    "LUKS": (0, b"LUKS\xba\xbe"),
    "btrfs": (0x10040, b"_BHRfS_M"),
    "Linux RAID": (4096, b"\xfc\x4e\x2b\xa9"),
    "swap": (4086, b"SWAPSPACE2"),
    "BitLocker": (3, b"-FVE-FS-"),
    "ReFS": (3, b"ReFS\0\0\0\0"),
    "ISO 9660": (0x8001, b"CD001"),
    NTFS: (3, b"NTFS    "),
    EXFAT: (3, b"EXFAT   "),
}


@dataclass(frozen=True)
class System:
    """``name``: of the file system, or of what else it is; ``note``: what a reader should know, or why not to read."""

    name: str
    readable: bool = False
    note: str = ""


def recognise(head: bytes) -> System:
    """What begins with ``head`` (up to `HEAD` bytes)."""
    if not head.strip(b"\0"):
        return System("empty")
    for name, (at, magic) in _AT.items():
        if head[at : at + len(magic)] == magic:
            return System(name, readable=name in READABLE)
    if any(head[at : at + 8] == b"LABELONE" for at in range(0, 2048, 512)):
        return System("LVM")
    if (found := _ext(head)) is not None:
        return found
    return System(FAT, readable=True) if _is_fat(head) else System("unknown")


def _ext(head: bytes) -> System | None:
    if len(head) < 2048 or struct.unpack_from("<H", head, 1024 + 56)[0] != _EXT_MAGIC:
        return None
    compat, incompat, ro_compat = struct.unpack_from("<III", head, 1024 + 92)
    name = "ext4" if incompat & ~(0x2 | 0x4 | 0x10) else "ext3" if compat & _JOURNAL else "ext2"
    if incompat & ~_INCOMPAT or ro_compat & _BIGALLOC:
        return System(name, note="it has features that are not known here")
    note = "it was in use: what is in its journal only is not seen" if incompat & _RECOVER else ""
    return System(name, readable=True, note=note)


def _is_fat(head: bytes) -> bool:
    if len(head) < 512 or head[510:512] != b"\x55\xaa":
        return False
    sector, per_cluster, reserved, tables = struct.unpack_from("<HBHB", head, 11)
    return (
        sector in (512, 1024, 2048, 4096)
        and per_cluster.bit_count() == 1
        and reserved > 0
        and tables in (1, 2)
        and head[21] >= 0xF0
    )


def table_of(head: bytes) -> str:
    """``GPT``, ``MBR``, or nothing: whether the disk has partitions."""
    if any(head[at : at + 8] == b"EFI PART" for at in (512, 4096)):
        return "GPT"
    if head[510:512] != b"\x55\xaa" or recognise(head).name in (NTFS, EXFAT, FAT, "BitLocker", "ReFS"):
        return ""
    entries = [struct.unpack_from("<B3xB3xII", head, 446 + 16 * i) for i in range(4)]
    used = [e for e in entries if e[1]]
    return "MBR" if used and all(flag in (0, 0x80) and start and count for flag, _kind, start, count in used) else ""

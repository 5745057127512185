"""Packs: blobs one behind the other, then a table of them, so that the index can be rebuilt from packs alone.

::

    0     16     magic "INCBAKPK", version, flags
    16    ...    stored blobs
    ...   56 n   the table, in the order of the blobs: digest 32, offset 8, stored 4, raw 4, codec 1, salt 7
    ...   64     footer: magic "INCBAKPT", version, n, offset of the table, BLAKE3 of the table (32), zero

A pack is named after the BLAKE3 of its table (16 bytes, hex), so a swapped pack does not pass for another. The salt is
random in the first entry and zero in the others: a pack never has the name of one that is there, which may be damaged
though it has the same content, and is then the reason why this one is written.
"""

from __future__ import annotations

import secrets
import struct

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError, FormatTooNewError
from incbak.repo.blob import MAX_BLOB
from incbak.repo.seal import PLAIN, Seal
from incbak.repo.storage.base import Storage

VERSION = 1
TARGET = 64 << 20
MAX_ENTRIES = 1 << 22
HEAD = struct.Struct("<8sII")
FOOT = struct.Struct("<8sIIQ32s8s")
HEAD_MAGIC, FOOT_MAGIC = b"INCBAKPK", b"INCBAKPT"
ENTRY = np.dtype(
    [("digest", "V32"), ("offset", "<u8"), ("stored", "<u4"), ("raw", "<u4"), ("codec", "u1"), ("salt", "V7")]
)
assert ENTRY.itemsize == 56
assert FOOT.size == 64

Entries = NDArray[np.void]


def head() -> bytes:
    """How a pack begins."""
    return HEAD.pack(HEAD_MAGIC, VERSION, 0)


def tail(entries: Entries, offset: int, seal: Seal = PLAIN) -> tuple[bytes, str]:
    """How a pack ends, with the table at ``offset``; and its name. Salts ``entries``."""
    if len(entries):
        entries["salt"][0] = secrets.token_bytes(7)
    table = entries.tobytes()
    digest = seal.check(table)
    return table + FOOT.pack(FOOT_MAGIC, VERSION, len(entries), offset, digest, b""), digest[:16].hex()


def read_table(storage: Storage, name: str, size: int) -> Entries:
    """The table of a pack of ``size`` bytes, checked. Raises `DamagedError` naming the pack."""
    if size < HEAD.size + FOOT.size:
        raise DamagedError(f"pack {name} is {f'cut short: {size} bytes' if size else 'empty, or no plain file'}")
    foot = storage.read_range("packs", name, size - FOOT.size, FOOT.size)
    magic, version, count, offset, digest, _zero = FOOT.unpack(foot)
    if magic != FOOT_MAGIC:
        raise DamagedError(f"pack {name} has no footer")
    if version > VERSION:
        raise FormatTooNewError(f"pack {name} is of version {version}", hint="Use a newer incbak.")
    if count > MAX_ENTRIES or offset + count * ENTRY.itemsize + FOOT.size != size:
        raise DamagedError(f"pack {name} has an impossible table")
    table = storage.read_range("packs", name, offset, count * ENTRY.itemsize)
    if storage.seal.check(table) != digest or digest[:16].hex() != name:
        raise DamagedError(f"the table of pack {name} does not match its digest")
    entries = np.frombuffer(table, dtype=ENTRY)
    if len(entries) and not _possible(entries, offset):
        raise DamagedError(f"the table of pack {name} points outside it")
    return entries


def _possible(entries: Entries, end: int) -> bool:
    """Whether all blobs lie before ``end``, and none claims more than a blob may have."""
    if int(entries["offset"].max()) > end or int(entries["raw"].max()) > MAX_BLOB:
        return False
    return int((entries["offset"] + entries["stored"]).max()) <= end

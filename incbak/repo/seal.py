"""How a repository names and stores content: the plain way. `cipher` has the other, for encrypted repositories.

A storage carries the seal of its repository. Whatever hashes content, or the tables of packs and index files, and
whatever encodes or decodes a blob, asks the seal.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from incbak.repo import blob

SEALED = frozenset({"backups", "damaged", "condemned", "verified", "drills"})
"""The kinds of small files that `Seal.close` and `Seal.open` pass over on their way to and from the storage."""


class Seal:
    """Nothing is encrypted: BLAKE3 of the content, and files as they are. Safe for many threads."""

    encrypted = False
    overhead = 0
    """Bytes by which `close` makes a file larger."""

    def digest(self, data: bytes | memoryview) -> bytes:
        """The name of content, 32 bytes."""
        return blob.digest_of(data)

    def digests(self, clusters: memoryview, step: int) -> NDArray[np.uint8]:
        """As `blob.digests_of`."""
        return blob.digests_of(clusters, step)

    def encode(self, digest: bytes, data: bytes | memoryview, level: int = 1) -> tuple[int, bytes | memoryview]:
        """(codec, stored bytes) of the content with that digest."""
        return blob.encode(data, level)

    def decode(self, digest: bytes, codec: int, stored: bytes | memoryview, raw: int) -> bytes | memoryview:
        """The content again; its digest is for the caller to check. Raises `DamagedError`."""
        return blob.decode(codec, stored, raw)

    def check(self, table: bytes | memoryview) -> bytes:
        """What proves that a table, or the body of an index file, is ours and whole; 32 bytes."""
        return self.checker().update(table).digest()

    def checker(self) -> blake3:
        """As `check`, of what comes in pieces: its ``digest`` once it was given all of them by ``update``."""
        return blake3()

    def close(self, kind: str, name: str, data: bytes) -> bytes:
        """A small file as it is stored."""
        return data

    def open(self, kind: str, name: str, data: bytes) -> bytes:
        """A small file as it was before `close`. Raises `DamagedError` naming it."""
        return data


PLAIN = Seal()

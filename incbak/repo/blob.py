"""Blobs: content under its digest, as it is stored. Codec 0 is raw, 1 is zstd; higher ones are of a later version."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import numpy as np
import zstandard
from blake3 import blake3
from numpy.typing import NDArray

from incbak.errors import DamagedError

RAW, ZSTD = 0, 1
DIGEST = 32
ZERO_DIGEST = bytes(DIGEST)
"""Stands for a cluster or page of zeroes, which is not stored."""
MAX_BLOB = 16 << 20
"""No cluster and no page is larger."""
_WORTH = 0.97
_PROBE = 4096

_local = threading.local()

Digest = Callable[["bytes | memoryview"], bytes]


def digest_of(data: bytes | memoryview) -> bytes:
    """BLAKE3, 32 bytes."""
    return blake3(data).digest()


def digests_of(clusters: memoryview, step: int, digest: Digest = digest_of) -> NDArray[np.uint8]:
    """The digests of clusters of ``step`` bytes, the last perhaps shorter; zero for those of zeroes. Shape (n, 32)."""
    found = [digest(clusters[i : i + step]) for i in range(0, len(clusters), step)]
    tail = len(clusters) % step
    if tail and found[-1] == _digest_of_zeroes(tail, digest):
        found[-1] = ZERO_DIGEST
    zero = _digest_of_zeroes(step, digest)
    whole = b"".join([ZERO_DIGEST if d == zero else d for d in found])
    return np.frombuffer(whole, dtype=np.uint8).reshape(-1, DIGEST)


@functools.lru_cache(maxsize=64)
def _digest_of_zeroes(size: int, digest: Digest) -> bytes:
    return digest(bytes(size))


def _compressor(level: int) -> zstandard.ZstdCompressor:
    if getattr(_local, "level", None) != level:
        _local.level = level
        _local.compressor = zstandard.ZstdCompressor(level=level, write_checksum=False, write_content_size=True)
    found: zstandard.ZstdCompressor = _local.compressor
    return found


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_local, "decompressor", None)
    if found is None:
        found = _local.decompressor = zstandard.ZstdDecompressor()
    return found


def encode(data: bytes | memoryview, level: int = 1) -> tuple[int, bytes | memoryview]:
    """(codec, stored bytes): compressed where that saves more than a few per cent. One zstd context per thread."""
    packed = _compressor(level).compress(data)
    if len(packed) < len(data) * _WORTH:
        return ZSTD, packed
    return RAW, data


def decode(codec: int, stored: bytes | memoryview, raw: int) -> bytes | memoryview:
    """The ``raw`` bytes again; their digest is for the caller to check.

    Never makes more than ``raw`` bytes, whatever the data claims (faults row 76). Raises `DamagedError`.
    """
    if raw > MAX_BLOB:
        raise DamagedError(f"a blob of {raw} bytes is over the limit")
    if codec == RAW:
        if len(stored) != raw:
            raise DamagedError(f"a blob has {len(stored)} bytes instead of {raw}")
        return stored
    if codec != ZSTD:
        raise DamagedError(f"a blob has the unknown codec {codec}")
    try:
        if zstandard.frame_content_size(stored) != raw:
            raise DamagedError("a blob's frame has another size than recorded")
        data = _decompressor().decompress(stored, max_output_size=raw)
    except zstandard.ZstdError as e:
        raise DamagedError(f"a blob cannot be decompressed: {e}") from e
    if len(data) != raw:
        raise DamagedError(f"a blob has {len(data)} bytes instead of {raw}")
    return data

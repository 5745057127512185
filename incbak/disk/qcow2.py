"""The header of a qcow2 image, decoded without QEMU: what an image says of itself before anybody acts on it.

Every field has a limit, and a header outside of them is an error that names the image. The decoder reads the first
cluster only and follows nothing that it finds there: a backing file and a data file are names here, not files.

`Feature.DIRTY`: QEMU was killed while it had the image open with lazy refcounts. The guest's content is intact, the
refcounts are not: whoever allocates by them overwrites the guest's clusters. `Feature.CORRUPT`: QEMU has found tables
that contradict each other; what is read may be anything. Nothing is written to an image that has either.
"""

from __future__ import annotations

import enum
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from incbak.errors import DiskError
from incbak.opening import open_image

MAGIC = b"QFI\xfb"
MAX_NAME = 1023
_MIN_BITS, _MAX_BITS = 9, 21
_FIXED = struct.Struct(">4sIQIIQIIQQIIQ")  # of both versions: up to the offset of the snapshots
_LATER = struct.Struct(">QQQII")  # of version 3: three sets of features, refcount order, header length
_EXTENSION = struct.Struct(">II")
_BACKING_FORMAT, _DATA_FILE = 0xE2792ACA, 0x44415441
_MAX_EXTENSIONS = 64


class Feature(enum.IntFlag):
    """Incompatible features: a program that does not know one must not open the image."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION = 8
    EXTENDED_L2 = 16


@dataclass(frozen=True)
class Header:
    """``size``: of the disk. Names are as the image gives them, relative ones too; empty where there is none."""

    version: int
    size: int
    cluster_bits: int
    features: Feature
    encryption: int = 0
    backing: str = ""
    backing_format: str = ""
    data_file: str = ""

    def unwritable(self) -> str:
        """Why nothing may be written to the image, or an empty string."""
        if self.features & Feature.CORRUPT:
            return "its corrupt bit is set: QEMU has found tables in it that contradict each other"
        if self.features & Feature.DIRTY:
            return "its dirty bit is set: it was not closed, and its refcounts are not up to date"
        return ""


def repair_hint(path: Path) -> str:
    """What to type about a damaged image."""
    return f"Run: qemu-img check -r all {path}"


def read_header(path: Path) -> Header:
    """Decode the header of the image ``path``. Raises `DiskError`."""
    try:
        with open(open_image(path, os.O_RDONLY), "rb") as f:
            return decode(f.read(1 << _MAX_BITS))
    except OSError as e:
        raise DiskError(f"cannot read {path}: {e.strerror}") from e
    except ValueError as e:
        raise DiskError(f"{path} is not a valid qcow2 image: {e}", hint=repair_hint(path)) from e


def decode(data: bytes) -> Header:
    """Decode the first cluster of an image. Raises `ValueError` for anything that QEMU does not write."""
    if len(data) < _FIXED.size:
        raise ValueError("it ends in its header")
    magic, version, at, length, bits, size, encryption, *_ = _FIXED.unpack_from(data)
    if magic != MAGIC:
        raise ValueError("it does not begin as one")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not known")
    if not _MIN_BITS <= bits <= _MAX_BITS:
        raise ValueError(f"clusters of 2^{bits} bytes")
    if size >= 1 << 63:
        raise ValueError(f"a size of {size} bytes")
    features, end = Feature(0), _FIXED.size
    if version == 3:
        if len(data) < _FIXED.size + _LATER.size:
            raise ValueError("it ends in its header")
        found, _, _, _, end = _LATER.unpack_from(data, _FIXED.size)
        features = Feature(found)
        if end < _FIXED.size + _LATER.size or end % 8 or end > 1 << bits:
            raise ValueError(f"a header of {end} bytes")
    cluster = data[: 1 << bits]
    backing = _backing(cluster, at, length)
    extensions = dict(_extensions(cluster, end, at or len(cluster)))
    data_file = extensions.get(_DATA_FILE, "") if features & Feature.DATA_FILE else ""
    return Header(version, size, bits, features, encryption, backing, extensions.get(_BACKING_FORMAT, ""), data_file)


def _backing(cluster: bytes, at: int, length: int) -> str:
    if not at:
        return ""
    if not 0 < length <= MAX_NAME or at + length > len(cluster):
        raise ValueError("the name of its backing file is outside of the header")
    return _text(cluster[at : at + length])


def _extensions(cluster: bytes, start: int, end: int) -> Iterator[tuple[int, str]]:
    """(type, text) of the header extensions that are text."""
    for _ in range(_MAX_EXTENSIONS):
        if start + _EXTENSION.size > end:
            return
        kind, length = _EXTENSION.unpack_from(cluster, start)
        start += _EXTENSION.size
        if kind == 0:
            return
        if start + length > end:
            raise ValueError("a header extension is outside of the header")
        if kind in (_BACKING_FORMAT, _DATA_FILE):
            if length > MAX_NAME:
                raise ValueError(f"a name of {length} bytes")
            yield kind, _text(cluster[start : start + length])
        start += (length + 7) & ~7
    raise ValueError("too many header extensions")


def _text(data: bytes) -> str:
    if b"\0" in data:
        raise ValueError("a name with a zero byte")
    return data.decode("utf-8", "surrogateescape")

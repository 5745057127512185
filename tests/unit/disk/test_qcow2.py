"""The header of a qcow2 image: what is decoded, and that nothing outside of its limits is."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from incbak.disk import qcow2
from incbak.disk.qcow2 import Feature, decode, read_header
from incbak.errors import DiskError

BACKING_FORMAT, DATA_FILE = 0xE2792ACA, 0x44415441


def header(
    *extensions: tuple[int, bytes], version: int = 3, bits: int = 16, size: int = 1 << 20, features: int = 0,
    backing: bytes = b"", length: int = 104,
) -> bytes:  # fmt: skip
    body = b"".join(struct.pack(">II", k, len(v)) + v + bytes(-len(v) % 8) for k, v in extensions) + bytes(8)
    at = length + len(body) if backing else 0
    fixed = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", version, at, len(backing), bits, size, 0, 1, 0, 0, 1, 0, 0)
    later = struct.pack(">QQQII", features, 0, 0, 4, length)
    return (fixed + later + body + backing).ljust(1 << 16, b"\0")


def test_what_an_image_says_of_itself() -> None:
    data = header((BACKING_FORMAT, b"raw"), (DATA_FILE, b"d.raw"), features=5, backing=b"base.img")
    found = decode(data)
    assert (found.version, found.size, found.cluster_bits) == (3, 1 << 20, 16)
    assert (found.backing, found.backing_format, found.data_file) == ("base.img", "raw", "d.raw")
    assert found.features == Feature.DIRTY | Feature.DATA_FILE


@pytest.mark.parametrize(
    ("features", "why"), [(0, ""), (1, "dirty bit"), (2, "corrupt bit"), (3, "corrupt bit"), (4, ""), (24, "")]
)
def test_an_image_with_a_dirty_or_corrupt_bit_is_not_written(features: int, why: str) -> None:
    said = decode(header(features=features)).unwritable()
    assert (why in said) if why else not said


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"QFI\xfb", "ends"),
        (header()[:100], "ends"),
        (bytes(200), "does not begin"),
        (header(version=4), "version 4"),
        (header(bits=8), "2\\^8"),
        (header(bits=22), "2\\^22"),
        (header(size=1 << 63), "size"),
        (header(length=96), "96 bytes"),
        (header(length=105), "105 bytes"),
        (header(length=1 << 17), "bytes"),
        (header(backing=b"x" * 1024), "backing file is outside"),
        (header((DATA_FILE, b"x" * 1024)), "name of 1024"),
        (header((DATA_FILE, b"a\0b"), features=4), "zero byte"),
        (header(*[(7, b"")] * 65), "too many"),
        (header(length=104)[:104] + struct.pack(">II", 7, 1 << 20) + bytes(1 << 16), "extension is outside"),
    ],
)
def test_a_header_outside_of_its_limits_is_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        decode(data)


def test_a_header_that_is_cut_anywhere_is_an_error_and_nothing_else(tmp_path: Path) -> None:
    data = header((BACKING_FORMAT, b"qcow2"), backing=b"base")
    for end in range(0, 200):
        try:
            decode(data[:end])
        except ValueError:
            continue
        assert end >= 104


def test_the_error_names_the_image_and_what_to_type(tmp_path: Path) -> None:
    path = tmp_path / "web1.qcow2"
    path.write_bytes(b"QFI\xfb")
    with pytest.raises(DiskError, match=r"web1\.qcow2") as caught:
        read_header(path)
    assert caught.value.hint == qcow2.repair_hint(path) == f"Run: qemu-img check -r all {path}"

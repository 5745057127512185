"""Where partitions are, as sfdisk makes them; and tables of which no number can be believed."""

from __future__ import annotations

import random
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from incbak.drill.partitions import MOST, Part, TableError, partitions
from tests.kit.need import need

MiB = 1 << 20
SIZE = 64 * MiB


def _disk(path: Path, script: str) -> bytearray:
    need("sfdisk")
    path.write_bytes(bytes(SIZE))
    subprocess.run(["sfdisk", "-q", path], input=script, text=True, check=True, capture_output=True, timeout=60)
    return bytearray(path.read_bytes())


def _found(data: bytes) -> list[Part]:
    def read(offset: int, length: int) -> bytes:
        assert offset >= 0
        assert offset + length <= len(data)
        return bytes(data[offset : offset + length])

    return partitions(read, len(data))


GPT = "label: gpt\nfirst-lba: 34\n1: start=2048, size=4096\n5: start=8192, size=2048\n"


def test_gpt(tmp_path: Path) -> None:
    assert _found(_disk(tmp_path / "d", GPT)) == [Part(1, MiB, 2 * MiB), Part(5, 4 * MiB, MiB)]


def test_mbr_with_logical_ones(tmp_path: Path) -> None:
    script = "label: dos\n1: start=2048, size=4096\n2: start=8192, size=40960, type=5\n5: start=10240, size=2048\n"
    data = _disk(tmp_path / "d", script + "6: start=16384, size=2048\n")
    assert _found(data) == [Part(1, MiB, 2 * MiB), Part(5, 5 * MiB, MiB), Part(6, 8 * MiB, MiB)]


@pytest.mark.parametrize("size", [0, 1, 511, 512, 100_000])
def test_no_table(size: int) -> None:
    assert _found(bytes(size)) == ([Part(0, 0, size)] if size else [])


@pytest.mark.parametrize(("at", "what"), [(512 + 20, "header"), (1024 + 33, "entries do not match")])
def test_a_gpt_that_does_not_verify(tmp_path: Path, at: int, what: str) -> None:
    data = _disk(tmp_path / "d", GPT)
    data[at] ^= 1
    with pytest.raises(TableError, match=what):
        _found(data)


def _gpt_with(data: bytearray, **fields: int) -> bytearray:
    """Numbers in the header, with a checksum that fits."""
    at = {"entries": (72, "<Q"), "count": (80, "<I"), "each": (84, "<I"), "sum": (88, "<I")}
    for name, value in fields.items():
        struct.pack_into(at[name][1], data, 512 + at[name][0], value)
    struct.pack_into("<I", data, 512 + 16, 0)
    struct.pack_into("<I", data, 512 + 16, zlib.crc32(data[512 : 512 + 92]))
    return data


@pytest.mark.parametrize(
    "fields",
    [{"each": 0}, {"each": 4}, {"count": 2**32 - 1}, {"entries": 2**64 - 1}, {"entries": SIZE // 512 - 1}],
)
def test_a_gpt_whose_numbers_cannot_be(tmp_path: Path, fields: dict[str, int]) -> None:
    with pytest.raises(TableError, match="cannot be"):
        _found(_gpt_with(_disk(tmp_path / "d", GPT), **fields))


def test_a_partition_beyond_the_end(tmp_path: Path) -> None:
    data = _disk(tmp_path / "d", GPT)
    with pytest.raises(TableError, match="partition 5 reaches beyond"):
        _found(data[: 4 * MiB + 512])
    struct.pack_into("<QQ", data, 1024 + 32, 4096, 2048)
    entries = data[1024 : 1024 + 128 * 128]
    with pytest.raises(TableError, match="ends before it begins"):
        _found(_gpt_with(data, sum=zlib.crc32(entries)))


def test_logical_ones_that_go_round(tmp_path: Path) -> None:
    data = _disk(tmp_path / "d", "label: dos\n1: start=2048, size=40960, type=5\n5: start=4096, size=2048\n")
    struct.pack_into("<4xB3xII", data, MiB + 446 + 16, 5, 0, 100)
    with pytest.raises(TableError, match=f"more than {MOST}"):
        _found(data)
    struct.pack_into("<4xB3xII", data, MiB + 446 + 16, 5, 2**32 - 1, 100)
    with pytest.raises(TableError, match="beyond the end"):
        _found(data)


@pytest.mark.parametrize("table", ["gpt", "dos"])
def test_noise_is_a_table_error_or_nothing(tmp_path: Path, table: str) -> None:
    script = f"label: {table}\n1: start=2048, size=4096\n2: start=8192, size=4096" + (", type=5\n" * (table == "dos"))
    whole = _disk(tmp_path / "d", script)[: 8 * MiB]
    for seed in range(100):
        rng, data = random.Random(seed), bytearray(whole)
        for _ in range(rng.randrange(1, 30)):
            data[rng.choice((446, 512, 1024, 4 * MiB)) + rng.randrange(128)] = rng.randrange(256)
        if rng.random() < 0.5:
            _gpt_with(data)
        try:
            found = _found(data)
        except TableError:
            continue
        assert all(p.start >= 0 and p.start + p.length <= len(data) for p in found)

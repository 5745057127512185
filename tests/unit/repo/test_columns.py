"""Columns of large index files are the arrays that they hold, however they are read, and fail as errors."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from incbak.errors import DamagedError, StorageError
from incbak.repo import columns, mapping
from incbak.repo.columns import Column, StoredBytes
from incbak.repo.ids import new_id
from incbak.repo.index import PLACE, REBUILD, Index, IndexFile, encode
from incbak.repo.pack import ENTRY
from tests.unit.repo.scene import new

ROWS = 20_000


def stored(path: Path, array: np.ndarray, lead: int = 0) -> Column:
    path.write_bytes(bytes(lead) + array.tobytes())
    source = StoredBytes(os.open(path, os.O_RDONLY | os.O_CLOEXEC), "index", "x")
    return Column(source, array.dtype, len(array), lead)


@pytest.fixture(params=["kept", "not kept"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(columns, "IN_MEMORY", 0 if request.param == "not kept" else columns.IN_MEMORY)
    return str(request.param)


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1024, ROWS])
@pytest.mark.parametrize("spread", [3, 700, 1 << 60])
def test_it_is_searched_as_an_array(tmp_path: Path, limit: str, count: int, spread: int) -> None:
    """With keys that are equal, over more than a block of them, before the first and behind the last."""
    rng = np.random.default_rng(count)
    keys = np.sort(rng.integers(1, 1 + spread, count)).astype("<u8")
    column = stored(tmp_path / "x", keys, lead=128 + 24)
    wanted = np.concatenate([rng.integers(0, 3 + spread, 60).astype("<u8"), keys[:: max(count // 50, 1)], keys[-1:]])
    for number in (1, 2, 4, 5, 60, len(wanted)):
        some = rng.permutation(wanted)[:number]
        for side in ("left", "right"):
            expected = keys.searchsorted(some, side)  # type: ignore[call-overload]
            assert column.searchsorted(some, side).tolist() == expected.tolist()
            assert column.near(number).searchsorted(some, side).tolist() == expected.tolist()
        for key in some[:20]:
            assert column.span(key) == (keys.searchsorted(key, "left"), keys.searchsorted(key, "right"))


def test_its_rows_are_those_of_an_array(tmp_path: Path, limit: str) -> None:
    places = np.frombuffer(random.Random(1).randbytes(ROWS * PLACE.itemsize), dtype=PLACE)
    column = stored(tmp_path / "x", places, lead=77)
    rng = np.random.default_rng(2)
    for number in (0, 1, 7, 40, 3000, 2 * ROWS):
        rows = rng.integers(0, ROWS, number)
        assert column[rows].tobytes() == column.near(number)[rows].tobytes() == places[rows].tobytes()
        rows.sort()
        assert column[rows].tobytes() == places[rows].tobytes()
        for found, name in zip(column.fields(rows[::-1], "stored", "pack"), ("stored", "pack"), strict=True):
            assert found.tolist() == places[rows[::-1]][name].tolist()
    for part in (slice(0, 0), slice(5, 9), slice(ROWS - 3, ROWS + 10), slice(9, 5), slice(None)):
        assert column[part].tobytes() == places[part].tobytes()
    assert column[ROWS - 1].tobytes() == places[-1].tobytes()
    for outside in (ROWS, np.array([3, ROWS])):
        with pytest.raises(IndexError):
            column[outside]


def test_no_more_is_kept_than_is_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = np.arange(ROWS, dtype="<u8")
    monkeypatch.setattr(columns, "IN_MEMORY", columns._kept + int(1.5 * keys.nbytes))
    first, second = stored(tmp_path / "1", keys), stored(tmp_path / "2", keys)
    assert isinstance(first.near(9), np.ndarray)
    assert isinstance(second.near(9), Column)
    del first
    assert isinstance(second.near(9), np.ndarray)


def test_what_cannot_be_read_is_not_counted_as_kept(tmp_path: Path) -> None:
    keys, before = np.arange(ROWS, dtype="<u8"), columns._kept
    column = stored(tmp_path / "x", keys)
    os.truncate(tmp_path / "x", 100)
    for _ in range(3):
        with pytest.raises(DamagedError):
            column.near(9)
    assert columns._kept == before


@pytest.mark.parametrize("code", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_the_process_lacks_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    index, _ = large(tmp_path, monkeypatch)
    real = os.open

    def lacking(path: object, flags: int, *more: Any, **others: Any) -> int:
        if "/index/" in str(path):
            raise OSError(code, os.strerror(code))
        return real(path, flags, *more, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(mapping.os, "open", lacking)
    with pytest.raises(StorageError) as raised:
        Index(index._storage)
    assert "ulimit" in raised.value.hint


def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Index, np.ndarray]:
    """An index of one file that is not held in memory, and its digests."""
    monkeypatch.setattr(mapping, "IN_MEMORY", 0)
    repo, name = new(tmp_path / "repo"), "a" * 32
    digests = np.random.default_rng(4).integers(0, 256, (ROWS, 32), dtype=np.uint8)
    (tmp_path / "repo" / "packs" / name).write_bytes(b"x" * 100)
    entries = np.zeros(ROWS, dtype=ENTRY)
    entries["digest"] = digests.view("V32").ravel()
    repo.storage.write("index", new_id(), encode([(name, 100)], np.zeros(ROWS, dtype=np.uint32), entries))
    return Index(repo.storage), digests


USES: dict[str, Callable[[Index, np.ndarray], object]] = {
    "few": lambda index, digests: index.have(digests[:3]),
    "some": lambda index, digests: index.have(digests[:100]),
    "many": lambda index, digests: index.have(digests),
    "places": lambda index, digests: index.locate(digests[:3]),
    "one": lambda index, digests: next(index.places(digests[0].tobytes())),
    "entries": lambda index, digests: index.files[0].entries(),
    "numbers": lambda index, digests: index.files[0].numbers(),
    "matches": lambda index, digests: index.files[0].matches(np.arange(9, dtype=np.uint64) << np.uint64(50)),
}


@pytest.mark.parametrize("use", list(USES))
def test_a_sector_that_fails_later_is_an_error_that_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, limit: str
) -> None:
    """And not a signal; nor does it say that content is damaged."""
    index, digests = large(tmp_path, monkeypatch)
    assert isinstance(index.files[0].keys, Column)
    USES[use](index, digests)
    fresh = Index(index._storage)

    def failing(fd: int, buffers: list[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", failing)
    with pytest.raises(StorageError, match=f"index {fresh.files[0].name} cannot be read: Input/output") as caught:
        USES[use](fresh, digests)
    assert caught.value.hint == REBUILD


def test_a_file_that_is_cut_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, digests = large(tmp_path, monkeypatch)
    (file,) = (tmp_path / "repo" / "index").iterdir()
    os.truncate(file, 5000)
    with pytest.raises(StorageError, match="is cut off"):
        index.have(digests)


def test_a_large_file_that_does_not_verify(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, _ = large(tmp_path, monkeypatch)
    (file,) = (tmp_path / "repo" / "index").iterdir()
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)
    with pytest.raises(DamagedError, match="does not match its digest"):
        IndexFile("x", mapping.opened(index._storage, "index", file.name))


def test_a_file_that_was_removed_can_be_read_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index, digests = large(tmp_path, monkeypatch)
    (file,) = (tmp_path / "repo" / "index").iterdir()
    file.unlink()
    assert index.have(digests).all()
    descriptors = len(os.listdir("/proc/self/fd"))
    del index
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1

"""A backup that is read at random, and one that is written over: each is a byte array."""

from __future__ import annotations

import errno
import random
import resource
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from incbak.disk.memory import MemoryDisk
from incbak.export import image as module
from incbak.export.image import BackupImage
from incbak.export.overlay import BLOCK, Overlay
from incbak.repo.repository import Repository
from tests.kit.huge import HugeDisk
from tests.unit.repo.scene import CLUSTER, back_up, cluster, new

CONTENT = [1, 0, 2, 3, 1, 0, 0, 4, *range(5, 40)]
WANTED = b"".join(cluster(n) for n in CONTENT)


@pytest.fixture
def made(tmp_path: Path) -> BackupImage:
    path = tmp_path / "repo"
    record = back_up(new(path), CONTENT)
    return BackupImage(Repository.open(path), record, record.disks[0])


def _read(image: BackupImage | Overlay, offset: int, length: int) -> bytes:
    buf = bytearray(b"\xee" * length)
    image.read_into(memoryview(buf), offset)
    return bytes(buf)


def test_any_range_reads_as_it_was(made: BackupImage) -> None:
    rng = random.Random(1)
    for _ in range(200):
        offset = rng.randrange(len(WANTED))
        length = rng.randrange(1, min(5 * CLUSTER, len(WANTED) - offset) + 1)
        assert _read(made, offset, length) == WANTED[offset : offset + length], (offset, length)


def test_the_map_says_what_is_zero(made: BackupImage) -> None:
    found = list(made.extents(0, len(WANTED)))
    assert sum(e.length for e in found) == len(WANTED)
    for extent in found:
        part = WANTED[extent.offset : extent.offset + extent.length]
        assert extent.zero is not any(part), extent
    assert [(e.offset, e.length) for e in made.extents(CLUSTER + 5, 10)] == [(CLUSTER + 5, 10)]


@pytest.mark.parametrize("window", [1, 2, 64])
def test_the_map_is_looked_at_in_windows_that_grow(
    made: BackupImage, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever wants the first stretch only does not pay for the rest; the stretches are always the same."""
    whole = list(made.extents(0, len(WANTED)))
    assert all(a.zero is not b.zero for a, b in pairwise(whole))
    looked: list[int] = []
    zeroes = made._zeroes

    def counted(first: int, count: int) -> object:
        looked.append(count)
        return zeroes(first, count)

    monkeypatch.setattr(module, "_FIRST_WINDOW", window)
    monkeypatch.setattr(made, "_zeroes", counted)
    assert next(made.extents(0, len(WANTED))) == whole[0]
    assert sum(looked) <= 3 * window
    assert list(made.extents(0, len(WANTED))) == whole


def test_a_sequential_reader_finds_what_was_read_ahead(made: BackupImage, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    fetch = made._fetch

    def counted(wanted: list[bytes], ahead: list[bytes]) -> object:
        calls.append(len(wanted) + len(ahead))
        return fetch(wanted, ahead)

    monkeypatch.setattr(made, "_fetch", counted)
    for offset in range(0, len(WANTED), 512):
        assert _read(made, offset, 512) == WANTED[offset : offset + 512]
    assert len(calls) < len(set(CONTENT)) // 3


def test_the_cache_is_bounded(made: BackupImage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CACHE", 3 * CLUSTER)
    for offset in range(0, len(WANTED), CLUSTER):
        assert _read(made, offset, CLUSTER) == WANTED[offset : offset + CLUSTER]
        assert len(made._cache) <= 3


def test_damage_is_an_error_there_and_nowhere_else(tmp_path: Path) -> None:
    path = tmp_path / "repo"
    repo = new(path)
    record = back_up(repo, CONTENT)
    place = next(repo.index.places(module.blob.digest_of(cluster(3))))
    pack = path / "packs" / place.pack
    data = bytearray(pack.read_bytes())
    data[place.offset + place.stored // 2] ^= 4
    pack.write_bytes(data)
    image = BackupImage(Repository.open(path), record, record.disks[0])
    with pytest.raises(OSError) as caught:
        _read(image, 3 * CLUSTER + 5, 1)
    assert caught.value.errno == errno.EIO
    for offset in range(0, 3 * CLUSTER, 512):  # reads ahead into the damage
        assert _read(image, offset, 512) == WANTED[offset : offset + 512]


SIZE = 10 * BLOCK + 1000
ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * BLOCK)).map(lambda t: (t[0], min(t[1], SIZE - t[0])))
steps = st.lists(st.tuples(st.sampled_from(["write", "zero", "read", "map"]), ranges), max_size=20)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=steps)
def test_an_overlay_is_a_byte_array_over_another(tmp_path: Path, plan: list[tuple[str, tuple[int, int]]]) -> None:
    below = MemoryDisk(SIZE, name="vda")
    below.data[:] = bytes(n % 251 + 1 for n in range(SIZE))
    before, model = bytes(below.data), bytearray(below.data)
    overlay = Overlay(below, tmp_path)
    for number, (kind, (offset, length)) in enumerate(plan):
        if kind == "write":
            data = bytes([number + 100]) * length
            overlay.write(memoryview(data), offset)
            model[offset : offset + length] = data
        elif kind == "zero":
            overlay.write_zeroes(offset, length)
            model[offset : offset + length] = bytes(length)
        elif kind == "read":
            assert _read(overlay, offset, length) == model[offset : offset + length]
        else:
            found = list(overlay.extents(offset, length))
            assert [e.offset for e in found] == [offset + sum(x.length for x in found[:n]) for n in range(len(found))]
            assert sum(e.length for e in found) == length
    assert _read(overlay, 0, SIZE) == model
    assert below.data == before
    assert list(tmp_path.iterdir()) == []


def test_the_map_of_a_terabyte_takes_no_memory(tmp_path: Path) -> None:
    """A request with extended headers may ask about the whole disk, of which a block here is four KiB."""
    overlay = Overlay(HugeDisk(size=1 << 40), tmp_path)
    overlay.write(memoryview(b"x" * BLOCK), 1 << 39)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = list(overlay.extents(BLOCK, (1 << 40) - BLOCK))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10
    assert [(e.offset, e.length) for e in found if not e.zero] == [(1 << 39, BLOCK)]
    assert found[0].offset == BLOCK
    assert all(a.offset + a.length == b.offset for a, b in pairwise(found))
    assert found[-1].offset + found[-1].length == 1 << 40

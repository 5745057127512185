"""Requests over terabytes: in pieces, so that nobody waits for all of it, and in bounded memory."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk
from incbak.serve import export as export_module
from incbak.serve.cbw import CopyBeforeWrite, OnCbwError
from incbak.serve.export import CACHE_LIMIT, PIECE, DiskExport, TrackedDevice, dirty_status
from incbak.serve.memory_bitmap import MemoryBitmap
from incbak.serve.regrain import all_bits
from incbak.serve.scratch import Budget, Scratch
from incbak.serve.tracker import TrackedDisk
from tests.kit.huge import HugeDisk
from tests.kit.serve import DEADLINE, wait_until

TIB = 1 << 40
SIZE = 4 * TIB + 1000
GRAIN = 65536

CHANGES: dict[str, Callable[[TrackedDevice, int, int], None]] = {
    "trim": lambda d, offset, length: d.trim(offset, length),
    "zero": lambda d, offset, length: d.write_zeroes(offset, length, unmap=True, fast=False),
    "fast": lambda d, offset, length: d.write_zeroes(offset, length, unmap=True, fast=True),
}
change = pytest.mark.parametrize("kind", CHANGES)


class Rig:
    """A huge disk with a bitmap in memory and, from `copy` on, one point in time."""

    def __init__(self, directory: Path, disk: HugeDisk) -> None:
        self.directory, self.disk = directory, disk
        self.tracked = TrackedDisk("vda", disk)
        self.bitmap = MemoryBitmap("b", disk.size, GRAIN)
        self.tracked.bitmaps["b"] = self.bitmap
        self.tracked.refresh()
        self.device = DiskExport(self.tracked).open()

    def copy(self, **options: object) -> CopyBeforeWrite:
        scratch = Scratch(Budget(self.directory, 1 << 20), self.disk.size)
        made = CopyBeforeWrite(self.disk, GRAIN, scratch, **options)  # type: ignore[arg-type]
        made.prepare()
        made.begin(all_bits(self.disk.size, GRAIN))
        self.tracked.attach(made)
        self.tracked.refresh()
        return made


def memory() -> int:
    """The most that this process ever took."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path, HugeDisk(size=SIZE))


@change
def test_it_comes_in_pieces_and_all_of_it_is_recorded(rig: Rig, kind: str) -> None:
    before = memory()
    CHANGES[kind](rig.device, 1000, SIZE - 1000)
    at = 1000
    for what, offset, length in rig.disk.calls:
        assert (what, offset) == (kind, at)
        assert 0 < length <= PIECE
        at += length
    assert at == SIZE
    assert rig.bitmap.runs().tolist() == [[0, -(-SIZE // GRAIN)]]
    assert memory() - before < 200 << 20


@change
def test_a_transaction_gets_in_between(rig: Rig, kind: str) -> None:
    """I4: whoever drains the disk waits for one piece, and no longer."""
    gate, drained, order = rig.tracked.gate, threading.Event(), []

    def drain() -> None:
        with gate.drained(DEADLINE):
            order.append("drained")
        drained.set()

    def on_piece(what: str, offset: int, length: int) -> None:
        if not order:
            order.append("first piece")
            threading.Thread(target=drain).start()
            wait_until(lambda: gate._draining, "the drainer is at the gate")
        elif len(order) == 2:
            order.append("second piece")

    rig.disk.on_change = on_piece
    CHANGES[kind](rig.device, 0, 3 * PIECE)
    assert drained.wait(DEADLINE)
    assert order == ["first piece", "drained", "second piece"]


def test_one_sync_for_all_its_regions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = HugeDisk(size=TIB)
    store = BitmapStore(tmp_path / "state", "vm", "vda")
    store.lock()
    tracked = TrackedDisk("vda", disk, store)
    bitmap = store.create("b", TIB, GRAIN, disk.fingerprint())
    tracked.bitmaps["b"] = bitmap
    tracked.refresh()
    device = DiskExport(tracked).open()
    device.trim(0, 512)
    syncs: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: syncs.append(fd) or real(fd))
    device.trim(0, TIB)
    assert len(syncs) == 1
    assert all(bitmap.known)
    assert bitmap.runs().tolist() == [[0, TIB // GRAIN]]
    bitmap.close(None)
    store.unlock()


# -- beside a point in time --------------------------------------------------------------------------------------------


@change
def test_holes_are_passed_and_data_is_saved(tmp_path: Path, kind: str) -> None:
    """Terabytes of holes are told from the disk's map; what is data is read, and handed out as it was."""
    data = (TIB + 5000, TIB + 5000 + 3 * GRAIN)
    rig = Rig(tmp_path, HugeDisk(data, SIZE))
    copy = rig.copy()
    CHANGES[kind](rig.device, 0, SIZE)
    assert copy.broken is None
    read = [length for what, _offset, length in rig.disk.calls if what == "read"]
    assert 3 * GRAIN <= sum(read) <= 5 * GRAIN + 1000, "the clusters that have data, and the last piece, which is short"
    assert not copy.wants(0, SIZE)
    run = copy.next_run(TIB // GRAIN - 2, 8 * GRAIN)
    assert run
    assert (run.first, run.count, run.saved) == (TIB // GRAIN - 2, 8, True)
    content = bytearray(8 * GRAIN)
    rig.disk.data = (0, 0)  # from the disk it would be zeroes now
    copy.read_into(run, memoryview(content))
    assert content == bytes(2 * GRAIN + 5000) + b"d" * 3 * GRAIN + bytes(3 * GRAIN - 5000)
    copy.close()


@pytest.mark.parametrize("policy", OnCbwError)
def test_the_bound_on_saving_is_for_all_of_it(tmp_path: Path, policy: OnCbwError) -> None:
    """What earlier pieces took counts: a guest's request never waits longer than one that is short."""
    rig = Rig(tmp_path, HugeDisk((0, SIZE), SIZE))
    copy = rig.copy(on_error=policy, timeout=5.0)
    copy.before_write(0, GRAIN, 4.0)
    assert copy.broken is None
    copy.before_write(0, GRAIN, 6.0)  # is safe already
    if policy is OnCbwError.BREAK_SNAPSHOT:
        copy.before_write(GRAIN, GRAIN, 6.0)
        assert copy.broken
        assert copy.broken.errno == errno.ETIMEDOUT
    else:
        with pytest.raises(OSError, match="not saved within"):
            copy.before_write(GRAIN, GRAIN, 6.0)
        assert copy.broken is None
    copy.close()


def test_each_piece_says_what_was_spent(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr(export_module, "time", type("Clock", (), {"monotonic": staticmethod(lambda: next(clock))}))
    spent: list[float] = []
    monkeypatch.setattr(rig.tracked, "before_write", lambda _offset, _length, so_far: spent.append(so_far))
    rig.device.trim(0, 3 * PIECE)
    assert spent == [0, 3, 6]


# -- what is told and prefetched ---------------------------------------------------------------------------------------


def test_cache_is_a_hint(tmp_path: Path) -> None:
    rig = Rig(tmp_path, HugeDisk(size=3 << 30))
    rig.device.cache(5, (3 << 30) - 5)
    assert sum(length for _what, _offset, length in rig.disk.calls) == CACHE_LIMIT
    assert max(length for _what, _offset, length in rig.disk.calls) <= 1 << 20


@settings(deadline=None, max_examples=150)
@given(
    dirty=st.sets(st.integers(0, 90)),
    start=st.integers(0, 91 * 4096 - 2),
    length=st.integers(1, 91 * 4096),
    window=st.sampled_from([1, 2, 1 << 14]),
    most=st.sampled_from([1, 4, 4096]),
)
def test_dirty_stretches_are_those_of_the_bits(
    dirty: set[int], start: int, length: int, window: int, most: int
) -> None:
    size = 91 * 4096 - 1
    length = min(length, size - start)
    bitmap = MemoryBitmap("b", size, 4096)
    for cluster in dirty:
        bitmap.set_bits(cluster * 4096, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "_FIRST_WINDOW", min(window, 64))
        patch.setattr(export_module, "_WINDOW", window)
        found = dirty_status(bitmap, start, length, most)
    assert all(a[1] != b[1] for a, b in pairwise(found))
    told, at = bytearray(), start
    for count, flags in found:
        assert count > 0
        told += bytes([flags]) * count
        at += count
    expected = bytes(int((start + i) // 4096 in dirty) for i in range(len(told)))
    assert told == expected
    assert len(found) <= most
    assert at == start + length if most > len(found) else at <= start + length


def test_the_worst_bitmap_is_told_in_bounded_memory() -> None:
    """Every other cluster of 16 TiB: 128 million runs, of which one answer has a few thousand."""
    bitmap = MemoryBitmap("b", 16 * TIB, GRAIN)
    bitmap._bits[:] = 0x55
    before = memory()
    found = dirty_status(bitmap, 0, 16 * TIB, 4096)
    assert found[:2] == [(GRAIN, 1), (GRAIN, 0)]
    assert len(found) <= 4096
    assert memory() - before < 50 << 20


# -- fast zeroes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def device(tmp_path: Path) -> Iterator[tuple[TrackedDevice, Path, MemoryBitmap]]:
    """Of a file of data."""
    path = tmp_path / "disk"
    path.write_bytes(b"x" * (1 << 20))
    disk = open_disk(path)
    tracked = TrackedDisk("vda", disk)
    bitmap = MemoryBitmap("b", disk.size, GRAIN)
    tracked.bitmaps["b"] = bitmap
    tracked.refresh()
    yield DiskExport(tracked).open(), path, bitmap
    disk.close()


@pytest.mark.parametrize("unmap", [True, False])
def test_fast_zeroes(device: tuple[TrackedDevice, Path, MemoryBitmap], unmap: bool) -> None:
    """faults row 59: zeroes, recorded, and nothing is written for them."""
    opened, path, bitmap = device
    opened._disk.write = None  # type: ignore[method-assign,assignment]
    opened.write_zeroes(GRAIN, 3 * GRAIN, unmap=unmap, fast=True)
    assert path.read_bytes() == b"x" * GRAIN + bytes(3 * GRAIN) + b"x" * ((1 << 20) - 4 * GRAIN)
    assert bitmap.runs().tolist() == [[1, 3]]


def test_no_fast_zeroes_where_the_storage_has_none(
    device: tuple[TrackedDevice, Path, MemoryBitmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused at once: a client that asks for them would rather write zeroes itself."""
    opened, path, _bitmap = device
    monkeypatch.setattr(opened._disk, "_fallocate", lambda *_: False)
    with pytest.raises(OSError) as caught:
        opened.write_zeroes(0, GRAIN, unmap=True, fast=True)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert path.read_bytes() == b"x" * (1 << 20)
    opened.write_zeroes(0, GRAIN, unmap=True, fast=False)
    assert not any(path.read_bytes()[:GRAIN])


def test_a_device_zeroes_a_range_by_writing(
    device: tuple[TrackedDevice, Path, MemoryBitmap], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What keeps the space of a block device may be slow in the kernel, and is not tried."""
    disk, modes = device[0]._disk, []
    monkeypatch.setattr(disk, "is_block", True)
    monkeypatch.setattr(disk, "_fallocate", lambda mode, *_: modes.append(mode))
    assert not disk.zero_fast(0, GRAIN, unmap=False)
    assert not disk.zero_fast(0, GRAIN, unmap=True)
    assert modes == [0x03]

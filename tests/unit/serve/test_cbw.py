"""Copy-before-write: what is handed out is the disk at `begin`, and trouble is the backup's, not the guest's."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak.bitmap import bits as kernels
from incbak.disk.base import Disk
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from incbak.serve import cbw
from incbak.serve.cbw import BrokenError, CopyBeforeWrite, OnCbwError, Run
from incbak.serve.regrain import all_bits
from incbak.serve.scratch import Budget, Scratch
from tests.kit.serve import wait_until

GRAIN = 4096
CLUSTERS = 21
SIZE = CLUSTERS * GRAIN - 1000


def _filled(size: int = SIZE) -> MemoryDisk:
    disk = MemoryDisk(size)
    for cluster in range(0, -(-size // GRAIN)):
        if cluster % 5 != 4:
            end = min((cluster + 1) * GRAIN, size)
            disk.data[cluster * GRAIN : end] = bytes([cluster % 250 + 1]) * (end - cluster * GRAIN)
    return disk


class Rig:
    """A copy of ``disk``, begun, whose scratch is in ``directory``."""

    def __init__(self, directory: Path, disk: Disk, todo: kernels.Bits | None = None, **options: object) -> None:
        self.disk = disk
        self.budget = Budget(directory, int(options.pop("limit", 1 << 30)))  # type: ignore[call-overload]
        self.scratch = Scratch(self.budget, disk.size)
        self.copy = CopyBeforeWrite(disk, GRAIN, self.scratch, **options)  # type: ignore[arg-type]
        self.copy.prepare()
        self.copy.begin(all_bits(disk.size, GRAIN) if todo is None else todo)

    def guest(self, offset: int, data: bytes) -> None:
        """A guest's write, as the tracker does it."""
        self.copy.before_write(offset, len(data))
        self.disk.write(data, offset)

    def finish(self, run: Run) -> dict[int, bytes]:
        """The job's step on a claimed run: cluster by cluster what is handed out."""
        buffer = bytearray(min(run.count * GRAIN, self.disk.size - run.first * GRAIN))
        self.copy.read_into(run, memoryview(buffer))
        self.copy.done(run)
        return {run.first + i: bytes(buffer[i * GRAIN : (i + 1) * GRAIN]) for i in range(run.count)}

    def rest(self) -> dict[int, bytes]:
        """All that is left."""
        found: dict[int, bytes] = {}
        while run := self.copy.next_run(0, 3 * GRAIN):
            got = self.finish(run)
            assert not got.keys() & found.keys(), "a cluster was handed out twice"
            found |= got
        return found


@pytest.fixture
def rigs(tmp_path: Path) -> Iterator[Callable[..., Rig]]:
    made: list[Rig] = []

    def make(disk: Disk, **options: object) -> Rig:
        made.append(Rig(tmp_path, disk, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for rig in made:
        rig.copy.close()
    for rig in made:
        wait_until(lambda rig=rig: rig.scratch._fd < 0, "the scratch file is closed")
        assert rig.budget.used == 0, "all scratch is given back"


_RANGE = st.tuples(st.integers(0, SIZE - 1), st.integers(1, 3 * GRAIN)).map(lambda r: (r[0], min(r[1], SIZE - r[0])))
_STEP = st.one_of(
    st.tuples(st.just("write"), _RANGE, st.integers(1, 255)),
    st.tuples(st.just("zero"), _RANGE, st.just(0)),
    st.tuples(st.just("claim"), st.integers(0, CLUSTERS - 1), st.integers(1, 4)),
    st.tuples(st.just("saved"), st.integers(0, CLUSTERS - 1), st.integers(1, 4)),
    st.tuples(st.just("finish"), st.just(0), st.just(0)),
)


@settings(max_examples=150, deadline=None)
@given(
    todo=st.sets(st.integers(0, CLUSTERS - 1)),
    steps=st.lists(_STEP, max_size=40),
    memory=st.sampled_from([1, 8]),
    chunk=st.sampled_from([cbw.CHUNK, GRAIN]),
)
def test_what_is_handed_out_is_the_content_at_begin(
    tmp_path_factory: pytest.TempPathFactory,
    todo: set[int],
    steps: list[tuple[str, object, int]],
    memory: int,
    chunk: int,
) -> None:
    """I1: any mix of guest writes and steps of the job; the job may hold a claim while the guest writes elsewhere.

    Writes longer than a chunk pass the holes first.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cbw, "CHUNK", chunk)
        _handed_out_is_the_content_at_begin(tmp_path_factory, todo, steps, memory)


def _handed_out_is_the_content_at_begin(
    tmp_path_factory: pytest.TempPathFactory, todo: set[int], steps: list[tuple[str, object, int]], memory: int
) -> None:
    disk = _filled()
    before = bytes(disk.data)
    packed = np.zeros(kernels.bytes_for(CLUSTERS), dtype=np.uint8)
    for cluster in todo:
        kernels.set_range(packed, cluster, cluster)
    directory = tmp_path_factory.getbasetemp()
    rig = Rig(directory, disk, packed, memory=memory * GRAIN, timeout=5.0)
    model, got, claim = bytearray(before), dict[int, bytes](), None
    for kind, where, value in steps:
        if kind in ("write", "zero"):
            offset, length = where  # type: ignore[misc]
            if claim and offset < claim.end * GRAIN and offset + length > claim.first * GRAIN:
                continue
            rig.guest(offset, bytes([value]) * length)
            model[offset : offset + length] = bytes([value]) * length
        elif kind == "finish" and claim:
            got |= rig.finish(claim)
            claim = None
        elif kind in ("claim", "saved") and claim is None:
            claim = rig.copy.next_run(int(where), value * GRAIN, saved_only=kind == "saved", wait=0)  # type: ignore[call-overload]
    if claim:
        got |= rig.finish(claim)
    got |= rig.rest()
    rig.copy.close()
    assert got == {c: before[c * GRAIN : (c + 1) * GRAIN] for c in todo}
    assert bytes(disk.data) == bytes(model), "the guest has what it wrote"


def test_a_guest_and_a_job_that_race(rigs: Callable[..., Rig]) -> None:
    """The same with real threads: the guest writes all over while the job copies."""
    disk = _filled(400 * GRAIN)
    before = bytes(disk.data)
    rig = rigs(disk, memory=8 * GRAIN)
    stop = threading.Event()

    def write(seed: int) -> None:
        number = seed
        while not stop.is_set():
            number = number * 1103515245 + 12345 & 0x7FFFFFFF
            rig.guest(number % (disk.size - 9000), b"\xfe" * (number % 9000 + 1))

    guests = [threading.Thread(target=write, args=(seed,)) for seed in (1, 2)]
    for guest in guests:
        guest.start()
    got = rig.rest()
    stop.set()
    for guest in guests:
        guest.join(10)
    assert b"".join(got[c] for c in sorted(got)) == before


def _trouble(kind: str) -> tuple[Faults, dict[str, object]]:
    if kind == "source-read-error":
        return Faults(fail={"read": (1, errno.EIO)}), {}
    return Faults(), {"limit": 2 * GRAIN, "memory": 2 * GRAIN, "timeout": 0.3}


@pytest.mark.parametrize("kind", ["source-read-error", "scratch-full"])
def test_trouble_breaks_the_backup_and_not_the_guest(rigs: Callable[..., Rig], kind: str) -> None:
    """faults rows 27, 29, I4: the write goes out, the job hears of it, and content is never handed out again."""
    faults, options = _trouble(kind)
    broken: list[bool] = []
    rig = rigs(FaultyDisk(_filled(), faults), on_break=lambda: broken.append(True), **options)
    for cluster in range(CLUSTERS - 1):
        rig.guest(cluster * GRAIN, b"new")
    assert broken == [True]
    assert rig.copy.broken
    assert rig.copy.broken.errno == {"source-read-error": errno.EIO, "scratch-full": errno.ENOSPC}[kind]
    with pytest.raises(BrokenError):
        rig.copy.next_run(0, GRAIN)
    assert rig.disk.inner.read(3 * GRAIN, 3) == b"new"


@pytest.mark.parametrize("kind", ["source-read-error", "scratch-full"])
def test_trouble_breaks_the_write_where_that_is_asked_for(rigs: Callable[..., Rig], kind: str) -> None:
    """``break-guest-write``: the write fails with the cause, the point in time stands."""
    faults, options = _trouble(kind)
    rig = rigs(FaultyDisk(_filled(), faults), on_error=OnCbwError.BREAK_GUEST_WRITE, **options)
    with pytest.raises(OSError) as refused:
        for cluster in range(CLUSTERS - 1):
            rig.guest(cluster * GRAIN, b"new")
    assert refused.value.errno == {"source-read-error": errno.EIO, "scratch-full": errno.ENOSPC}[kind]
    assert rig.copy.broken is None


def test_a_write_that_was_refused_leaves_the_point_in_time_as_it_was(rigs: Callable[..., Rig]) -> None:
    """The read failed once: what was not read is still to be copied, and the job gets it from the disk."""
    disk = FaultyDisk(_filled(), Faults(fail={"read": (1, errno.EIO)}, once=True))
    before = bytes(disk.inner.data)  # type: ignore[attr-defined]
    rig = rigs(disk, on_error=OnCbwError.BREAK_GUEST_WRITE)
    with pytest.raises(OSError, match="Input/output error"):
        rig.guest(0, b"new")
    got = rig.rest()
    assert b"".join(got[c] for c in sorted(got)) == before


def test_a_full_scratch_has_room_again_once_the_job_took_what_is_held(rigs: Callable[..., Rig]) -> None:
    disk = _filled()
    before = bytes(disk.data)
    rig = rigs(disk, limit=2 * GRAIN, memory=2 * GRAIN, timeout=5.0)
    got: dict[int, bytes] = {}
    for clusters in ((0, 1), (2, 3), (5, 6), (7, 8)):
        for cluster in clusters:
            rig.guest(cluster * GRAIN, b"new")
        wait_until(lambda: rig.budget.used == 2 * GRAIN, "scratch is full")
        if clusters in ((2, 3), (7, 8)):
            while run := rig.copy.next_run(0, GRAIN, saved_only=True, wait=0):
                got |= rig.finish(run)
    assert rig.copy.broken is None
    assert set(got) == {0, 1, 2, 3, 5, 6, 7, 8}
    got |= rig.rest()
    assert b"".join(got[c] for c in sorted(got)) == before


@pytest.mark.alone
def test_a_stalled_scratch_holds_no_guest_write_longer_than_the_bound(
    rigs: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults row 85: writes that fit into memory do not wait; the one that does not waits for the timeout only."""
    hold = threading.Event()
    real = os.pwrite

    def stalled(fd: int, data: bytes, offset: int) -> int:
        hold.wait(20)
        return real(fd, data, offset)

    rig = rigs(_filled(), memory=4 * GRAIN, timeout=0.5)
    monkeypatch.setattr(os, "pwrite", stalled)
    took = []
    for cluster in (0, 1, 2, 3, 5, 6, 7):
        began = time.monotonic()
        rig.guest(cluster * GRAIN, b"new")
        took.append(time.monotonic() - began)
    hold.set()
    assert max(took[:4]) < 0.4
    assert 0.4 < max(took) < 2
    assert sum(t > 0.4 for t in took) == 1, "once broken, nobody waits any more"
    assert rig.copy.broken
    assert rig.copy.broken.errno == errno.ETIMEDOUT


@pytest.mark.alone
def test_a_stalled_read_of_the_job_holds_a_guest_write_no_longer_than_the_bound(rigs: Callable[..., Rig]) -> None:
    """The job reads a run from a disk that hangs; a write into that very run gives up on the backup in time."""
    rig = rigs(_filled(), timeout=0.4)
    run = rig.copy.next_run(0, 2 * GRAIN)
    assert run
    began = time.monotonic()
    rig.guest(0, b"new")
    assert 0.3 < time.monotonic() - began < 2
    with pytest.raises(BrokenError):
        rig.copy.done(run)


def test_a_write_waits_for_the_job_to_read_its_run_and_no_more(rigs: Callable[..., Rig]) -> None:
    rig = rigs(_filled(), timeout=10.0)
    run = rig.copy.next_run(0, 2 * GRAIN)
    assert run
    guest = threading.Thread(target=rig.guest, args=(GRAIN, b"new"))
    guest.start()
    guest.join(0.1)
    assert guest.is_alive()
    got = rig.finish(run)
    guest.join(5)
    assert not guest.is_alive()
    assert got[1] == bytes([2]) * GRAIN
    assert rig.disk.read(GRAIN, 3) == b"new"


@pytest.mark.parametrize(("cluster", "taken"), [(0, (1, CLUSTERS)), (3, (0, 3))])
def test_the_job_keeps_off_what_a_write_is_saving(
    rigs: Callable[..., Rig], cluster: int, taken: tuple[int, int]
) -> None:
    """I1: it would read the cluster while the guest, done with saving, overwrites it."""
    faults = Faults(stall={"read": threading.Event()})
    disk = FaultyDisk(_filled(), faults)
    before = bytes(disk.inner.data)  # type: ignore[attr-defined]
    rig = rigs(disk)
    guest = threading.Thread(target=rig.guest, args=(cluster * GRAIN, b"new"))
    guest.start()
    wait_until(lambda: faults.seen.get("read"), "the write is saving")
    run = rig.copy.next_run(0, CLUSTERS * GRAIN, wait=0)
    faults.stall["read"].set()
    guest.join(10)
    assert run
    assert (run.first, run.end) == taken
    got = rig.finish(run) | rig.rest()
    assert b"".join(got[c] for c in sorted(got)) == before


def test_close_lets_waiting_writes_go(rigs: Callable[..., Rig]) -> None:
    rig = rigs(_filled(), timeout=30.0)
    assert rig.copy.next_run(0, 2 * GRAIN)
    guest = threading.Thread(target=rig.guest, args=(GRAIN, b"new"))
    guest.start()
    guest.join(0.1)
    rig.copy.close()
    guest.join(5)
    assert not guest.is_alive()


def test_zeroes_take_no_scratch(rigs: Callable[..., Rig]) -> None:
    """Old content that is all zeroes is told from memory: nothing is written for it."""
    rig = rigs(MemoryDisk(SIZE), limit=0, memory=GRAIN)
    for cluster in range(CLUSTERS - 1):
        rig.guest(cluster * GRAIN, b"new")
    assert rig.copy.broken is None
    assert not any(any(content) for content in rig.rest().values())

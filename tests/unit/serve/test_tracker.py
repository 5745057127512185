"""The tracker: every write is on record, durably where it must be, before the disk sees it."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from incbak import durable
from incbak.bitmap import format as fmt
from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.format import REGION, TOUCHED, Flag, Slot
from incbak.bitmap.store import BitmapStore
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import open_disk
from incbak.disk.memory import MemoryDisk
from incbak.reasons import Reason
from incbak.serve import tracker
from incbak.serve.cbw import CopyBeforeWrite, OnCbwError
from incbak.serve.export import DiskExport, TrackedDevice
from incbak.serve.io_errors import IoErrors
from incbak.serve.memory_bitmap import MemoryBitmap
from incbak.serve.regrain import all_bits
from incbak.serve.scratch import Budget, Scratch
from incbak.serve.tracker import NOTED_NS, SettledMap, TrackedDisk
from tests.kit.serve import Machine, SpyDisk, raw_image, wait_until

GRAIN = 65536
SIZE = 3 * REGION + 1000


class Rig:
    """A spied disk with one persistent bitmap that a former session closed clean."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk = SpyDisk(SIZE)
        self.store = BitmapStore(directory / "state", "vm", "vda")
        self.store.lock()
        self.store.create("b", SIZE, GRAIN, self.disk.fingerprint()).close(self.disk.fingerprint())
        opened = self.store.open("b", self.disk.fingerprint())
        assert isinstance(opened, Bitmap)
        assert opened.state is State.CLEAN
        self.bitmap = opened
        self.tracked = TrackedDisk("vda", self.disk, self.store)
        self.tracked.bitmaps["b"] = opened
        self.tracked.refresh()
        self.device = DiskExport(self.tracked).open()
        self.on_disk = b""
        """The bitmap file as it is sure to survive a power cut."""
        self.syncs = 0
        real = os.fdatasync

        def fdatasync(fd: int) -> None:
            real(fd)
            path = os.readlink(f"/proc/self/fd/{fd}")
            if path.endswith(".bitmap"):
                self.on_disk = Path(path).read_bytes()
                self.syncs += 1

        monkeypatch.setattr(os, "fdatasync", fdatasync)

    def durable_region(self, number: int) -> bool:
        """Whether a power cut now would leave the flag clear and the region known as touched."""
        slot, _both = fmt.newest(self.on_disk[: 2 * fmt.SECTOR])
        if not isinstance(slot, Slot) or slot.flags & Flag.CLEAN:
            return False
        return self.on_disk[fmt.layout(slot)[1] + number] == TOUCHED


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(tmp_path, monkeypatch)
    yield made
    durable.arm()
    made.bitmap.close(None)
    made.store.unlock()


CHANGES: dict[str, Callable[[TrackedDevice, int, int], None]] = {
    "write": lambda d, offset, length: d.write(memoryview(b"x" * length), offset),
    "zero": lambda d, offset, length: d.write_zeroes(offset, length, unmap=False, fast=False),
    "trim": lambda d, offset, length: d.trim(offset, length),
}
change = pytest.mark.parametrize("kind", CHANGES)


@change
@pytest.mark.parametrize(("offset", "length"), [(0, 512), (GRAIN - 1, 2), (REGION - 10, 20), (SIZE - 1, 1)])
def test_bits_are_set_and_regions_durable_before_the_disk_is_changed(
    rig: Rig, kind: str, offset: int, length: int
) -> None:
    """faults rows 1, 17, 59, 60: at the moment of the write, all of it is on record."""
    seen: list[tuple[str, list[bool], list[bool]]] = []

    def look(what: str, at: int, count: int) -> None:
        clusters = range(at // GRAIN, (at + count - 1) // GRAIN + 1)
        regions = range(at // REGION, (at + count - 1) // REGION + 1)
        bits = [rig.bitmap.is_dirty(c * GRAIN, 1) for c in clusters]
        seen.append((what, bits, [rig.durable_region(r) for r in regions]))

    rig.disk.on_write = look
    CHANGES[kind](rig.device, offset, length)
    assert len(seen) == 1
    assert seen[0][0] == kind
    assert all(seen[0][1])
    assert all(seen[0][2])
    first, last = offset // GRAIN, (offset + length - 1) // GRAIN
    assert rig.bitmap.runs().tolist() == [[first, last - first + 1]]


def test_a_worker_that_finds_the_slot_taken_records_first_too(rig: Rig) -> None:
    """A slow write of a connection goes through the gate by counting, while the connection's own slot is in use."""
    seen: list[tuple[bool, bool]] = []
    rig.disk.on_write = lambda _kind, offset, _length: seen.append(
        (rig.bitmap.is_dirty(offset, 1), rig.durable_region(0))
    )
    with rig.device._slot:
        rig.device.write(memoryview(b"x"), GRAIN)
    assert seen == [(True, True)]
    assert rig.tracked.gate._inside == 0


def test_one_sync_per_region_and_none_for_later_writes(rig: Rig) -> None:
    """A write to a region that is known durable costs no sync, whatever cluster of it is written."""
    rig.device.write(memoryview(b"x"), 0)
    before = rig.syncs
    for offset in (GRAIN, REGION - 1, 5 * GRAIN):
        rig.device.write(memoryview(b"x"), offset)
    assert rig.syncs == before
    rig.device.write(memoryview(b"x"), REGION)
    assert rig.syncs == before + 1


@change
def test_bits_stay_when_the_disk_refuses(tmp_path: Path, kind: str) -> None:
    """faults row 62: the error reaches the guest, the cluster counts as written."""
    disk = FaultyDisk(MemoryDisk(SIZE), Faults(fail={kind: (1, errno.ENOSPC)}))
    tracked = TrackedDisk("vda", disk)
    bitmap = tracked.bitmaps["b"] = MemoryBitmap("b", SIZE, GRAIN)
    tracked.refresh()
    device = DiskExport(tracked).open()
    with pytest.raises(OSError, match="No space left") as failed:
        CHANGES[kind](device, 3 * GRAIN, 10)
    assert failed.value.errno == errno.ENOSPC
    assert bitmap.runs().tolist() == [[3, 1]]


def test_what_cannot_be_recorded_makes_the_bitmap_invalid_before_the_write_goes_out(rig: Rig) -> None:
    """faults row 26, L3: an untracked write never goes out while the bitmap can still be believed."""
    states: list[State] = []
    rig.disk.on_write = lambda *_: states.append(rig.bitmap.state)
    rig.device.write(memoryview(b"x"), 0)
    durable.arm(fault_at="bitmap.region-set:1:EIO")
    rig.device.write(memoryview(b"x"), REGION)
    assert states == [State.DIRTY, State.INVALID]
    slot, _both = fmt.newest(rig.on_disk[: 2 * fmt.SECTOR])
    assert isinstance(slot, Slot)
    assert slot.flags & Flag.INVALID
    rig.device.write(memoryview(b"y"), REGION + GRAIN)
    assert rig.disk.data[REGION + GRAIN] == ord("y")


def test_a_bitmap_that_is_invalid_is_not_on_offer(rig: Rig) -> None:
    """It would lie: not to who connects now, nor to who asked for it while it was valid."""
    export, context = DiskExport(rig.tracked), "qemu:dirty-bitmap:b"
    rig.device.write(memoryview(b"x"), 0)
    assert context in export.contexts()
    assert rig.device.status(0, 2 * GRAIN, context, 9) == [(GRAIN, 1), (GRAIN, 0)]
    rig.bitmap.invalidate(Reason.TRACKING_FAILED)
    assert context not in export.contexts()
    with pytest.raises(OSError, match="no valid bitmap"):
        rig.device.status(0, 2 * GRAIN, context, 9)


def test_a_write_is_refused_when_not_even_that_can_be_made_durable(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 26: neither recorded nor invalidated, so the write must not go out at all; nor may the next."""

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    changed: list[int] = []
    rig.disk.on_write = lambda _kind, offset, _length: changed.append(offset)
    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fail)
        broken.setattr(os, "rename", fail)
        for _ in range(2):
            with pytest.raises(OSError, match="cannot record"):
                rig.device.write(memoryview(b"x"), REGION)
    assert changed == []
    rig.device.write(memoryview(b"x"), REGION)
    assert rig.bitmap.state is State.INVALID, "storage works again: the write goes out, the bitmap is not believed"
    assert changed == [REGION]


def test_two_writers_of_one_new_region_both_wait_for_the_sync(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """L1 (dm-era): thread B sees A's mark while A is still syncing, and must not write before that is over."""
    rig.device.write(memoryview(b"x"), 0)
    hold, entered = threading.Event(), threading.Event()
    spied = os.fdatasync

    def slow(fd: int) -> None:
        entered.set()
        hold.wait(10)
        spied(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    out: list[bool] = []
    rig.disk.on_write = lambda *_: out.append(rig.durable_region(1))
    devices = [DiskExport(rig.tracked).open() for _ in range(2)]
    threads = [
        threading.Thread(target=d.write, args=(memoryview(b"x"), REGION + i * GRAIN)) for i, d in enumerate(devices)
    ]
    threads[0].start()
    entered.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert out == []
    hold.set()
    for thread in threads:
        thread.join(10)
    assert out == [True, True]


def test_a_disabled_bitmap_records_nothing_and_a_shadow_does(tmp_path: Path) -> None:
    tracked = TrackedDisk("vda", MemoryDisk(SIZE))
    off = tracked.bitmaps["off"] = MemoryBitmap("off", SIZE, GRAIN, enabled=False)
    shadow = MemoryBitmap("", SIZE, GRAIN)
    tracked.attach(None, shadow)
    tracked.refresh()
    DiskExport(tracked).open().write(memoryview(b"x"), 0)
    assert off.count() == 0
    assert shadow.count() == GRAIN
    tracked.detach(None, shadow)
    tracked.refresh()
    DiskExport(tracked).open().write(memoryview(b"x"), GRAIN)
    assert shadow.count() == GRAIN


def test_a_new_bitmap_records_what_was_settled_before_it_came(tmp_path: Path) -> None:
    """The settled map is of the bitmaps that were there: `refresh` starts it anew."""
    tracked = TrackedDisk("vda", MemoryDisk(SIZE))
    tracked.bitmaps["a"] = MemoryBitmap("a", SIZE, GRAIN)
    tracked.refresh()
    device = DiskExport(tracked).open()
    device.write(memoryview(b"x"), 0)
    late = tracked.bitmaps["late"] = MemoryBitmap("late", SIZE, 512)
    with tracked.gate.drained():
        tracked.refresh()
    device.write(memoryview(b"x"), 0)
    device.write(memoryview(b"x"), 600)
    assert late.runs().tolist() == [[0, 2]]


def test_a_write_whose_old_content_cannot_be_saved_is_not_settled(tmp_path: Path) -> None:
    """It was refused; the next one to that place saves the old content first, as if there had been none."""
    disk = FaultyDisk(MemoryDisk(4 * GRAIN), Faults(fail={"read": (1, errno.EIO)}, once=True))
    disk.inner.write(b"old", 0)
    tracked = TrackedDisk("vda", disk)
    scratch = Scratch(Budget(tmp_path, 1 << 20), disk.size)
    copy = CopyBeforeWrite(disk, GRAIN, scratch, on_error=OnCbwError.BREAK_GUEST_WRITE)
    copy.begin(all_bits(disk.size, GRAIN))
    tracked.attach(copy)
    tracked.refresh()
    device = DiskExport(tracked).open()
    with pytest.raises(OSError, match="Input/output error"):
        device.write(memoryview(b"new"), 0)
    device.write(memoryview(b"new"), 0)
    run = copy.next_run(0, GRAIN)
    assert run
    assert run.saved
    buffer = bytearray(GRAIN)
    copy.read_into(run, memoryview(buffer))
    assert buffer[:3] == b"old"
    copy.close()
    scratch.close()


@pytest.mark.parametrize("grain", [512, 4096, 65536, 1 << 20])
def test_the_settled_map_never_claims_more_than_the_finest_bitmap_holds(grain: int) -> None:
    settled = SettledMap(10 * grain, [1 << 20, grain])
    settled.settle(grain, 1)
    assert settled.holds(grain, 1)
    assert not settled.holds(grain - 1, 1)
    assert not settled.holds(2 * grain, 1)
    assert not settled.holds(grain - 1, 2)


def test_a_huge_disk_has_no_settled_map_and_is_tracked_all_the_same() -> None:
    settled = SettledMap(1 << 50, [512])
    settled.settle(0, 1)
    assert not settled.holds(0, 1)


@change
def test_the_gate_waits_for_a_change_in_flight_and_holds_new_ones_back(kind: str) -> None:
    """Drain before the instant: nothing is half done when a transaction swaps pointers, with a slot or without."""
    stall = threading.Event()
    disk = FaultyDisk(MemoryDisk(SIZE), Faults(stall={kind: stall}))
    tracked = TrackedDisk("vda", disk)
    device, other = DiskExport(tracked).open(), DiskExport(tracked).open()
    writer = threading.Thread(target=CHANGES[kind], args=(device, 0, 5))
    writer.start()
    wait_until(lambda: disk.faults.seen.get(kind), "the change is under way")
    inside, leave = threading.Event(), threading.Event()

    def drain() -> None:
        with tracked.gate.drained():
            inside.set()
            leave.wait(10)

    drainer = threading.Thread(target=drain)
    drainer.start()
    too_early = inside.wait(0.1)
    stall.set()
    assert inside.wait(10)
    late = [threading.Thread(target=CHANGES[k], args=(d, 0, 5)) for d, k in ((other, "write"), (device, "trim"))]
    for thread in late:
        thread.start()
    late[0].join(0.1)
    seen = dict(disk.faults.seen)
    leave.set()
    for thread in (writer, drainer, *late):
        thread.join(10)
    assert not too_early
    assert seen == {kind: 1}
    assert Counter(disk.faults.seen) == Counter([kind, "write", "trim"])


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_guests_request_that_fails_is_told(tmp_path: Path, code: int) -> None:
    """BLOCK_IO_ERROR: once for reads and once for writes, however often the guest tries; a job's reads are none."""
    kinds = ("read", "write", "zero", "trim", "flush")
    faults = Faults(fail=dict.fromkeys(kinds, (1, code)))
    with Machine(tmp_path, {"vda": FaultyDisk(MemoryDisk(16 * GRAIN), faults)}) as machine:
        machine.target("t0", 16 * GRAIN)
        machine("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
        machine.ended("j")
        assert [event for event, _ in machine.events if event == "BLOCK_IO_ERROR"] == []
        guest = machine.guest["vda"]
        acts = {
            "read": lambda: guest.read_into(memoryview(bytearray(10)), 0),
            "write": lambda: guest.write(memoryview(b"x"), 0),
            "zero": lambda: guest.write_zeroes(0, 10, unmap=True, fast=False),
            "trim": lambda: guest.trim(0, 10),
            "flush": guest.flush,
        }
        for kind, act in acts.items():
            machine.vm.disks["vda"].on_error = IoErrors("vda", machine.vm.emit).tell
            for _ in range(3):
                with pytest.raises(OSError, match=os.strerror(code)):
                    act()
            (told,) = [data for event, data in machine.events if event == "BLOCK_IO_ERROR"]
            assert told == {
                "device": "vda",
                "node-name": "vda",
                "operation": "read" if kind == "read" else "write",
                "action": "report",
                "nospace": code == errno.ENOSPC,
                "reason": os.strerror(code),
            }
            machine.events.clear()
        machine.vm.disks["vda"].disk.zero_fast = lambda *_, **__: False  # type: ignore[method-assign]
        with pytest.raises(OSError, match="fast zeroes"):
            guest.write_zeroes(0, 10, unmap=True, fast=True)
        assert machine.events == []


def test_a_read_that_fails_at_once_is_left_to_one_that_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So its error is told too."""

    def fails(*_: object) -> int:
        raise OSError(errno.EIO, "lost")

    disk = open_disk(raw_image(tmp_path / "image", SIZE))
    monkeypatch.setattr(os, "preadv", fails)
    assert not disk.read_nowait(memoryview(bytearray(10)), 0)
    monkeypatch.undo()
    assert disk.read_nowait(memoryview(bytearray(10)), 0)
    disk.close()


def _until(bitmap: Bitmap) -> tuple[int, bool]:
    with bitmap.path.open("rb") as f:
        f.seek(fmt.NOTE)
        return fmt.decode_note(f.read(fmt.NOTE_SIZE))


def test_the_file_says_until_when_writes_may_come(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before each, also one that has nothing to mark, and when the clock was set back; after the last in flight, that
    there are no more. So after a kill our last writes are told from those of others."""
    clock, seen = [time.time_ns() & ~1], list[tuple[int, bool]]()
    real = rig.disk.write
    monkeypatch.setattr(tracker.time, "time_ns", lambda: clock[0])

    def left() -> tuple[int, bool]:
        until, busy = _until(rig.bitmap)
        return until - clock[0], busy

    def write(buf: memoryview | bytes, offset: int) -> None:
        seen.append(left())
        clock[0] += 1000
        real(buf, offset)

    monkeypatch.setattr(rig.disk, "write", write)
    for step in (0, NOTED_NS // 4, NOTED_NS, 10**9, -3600 * 10**9):
        clock[0] += step
        rig.device.write(memoryview(b"x" * 512), 0)
        rig.tracked.rest()
        assert left() == (0, False)
    assert seen == [(NOTED_NS, True)] * 5


def test_a_write_beside_another_prolongs_the_note(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of one is not the end of both. Before they end, the clock may be set back."""
    clock = [time.time_ns() & ~1]
    monkeypatch.setattr(tracker.time, "time_ns", lambda: clock[0])
    rig.tracked.before_write(0, 512)
    for step, noted in ((NOTED_NS // 2, NOTED_NS // 2), (NOTED_NS, NOTED_NS), (-(10**9), NOTED_NS)):
        clock[0] += step
        rig.tracked.before_write(0, 512)
        assert _until(rig.bitmap) == (clock[0] + noted, True)
    slot = rig.tracked.gate.slot()
    with slot:
        rig.tracked.rest()
    with rig.tracked.gate.joined():
        rig.tracked.rest()
    with rig.tracked.gate.drained():
        pass
    rig.tracked.rest(lambda _milliseconds: [(3, 1)])
    assert _until(rig.bitmap)[1]
    rig.tracked.rest(lambda _milliseconds: [])
    assert _until(rig.bitmap) == (clock[0], False)


def test_a_bitmap_that_comes_between_two_notes_has_one_before_its_first_write(rig: Rig) -> None:
    rig.tracked.before_write(0, 512)
    new = rig.store.create("c", SIZE, GRAIN, rig.disk.fingerprint())
    rig.tracked.bitmaps["c"] = new
    rig.tracked.refresh()
    assert _until(new) == (0, False)
    rig.tracked.before_write(0, 512)
    assert _until(new) == _until(rig.bitmap)
    assert _until(new)[1]
    new.close(None)

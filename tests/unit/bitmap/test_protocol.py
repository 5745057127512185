"""The flag protocol while a bitmap is open: who syncs what before what, with many threads, and when it fails."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from incbak import durable
from incbak.bitmap import bits as kernels
from incbak.bitmap import format as fmt
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import REGION, TOUCHED, Flag, Slot
from incbak.errors import BitmapError, DurabilityError
from incbak.reasons import Reason
from tests.kit.need import need, need_root
from tests.kit.serve import wait_until
from tests.unit.bitmap.scene import CLUSTER, NAME, SIZE, Scene, clusters, dirty

WAIT = 20


def _flags(scene: Scene) -> list[Flag]:
    """Of both slots, the older one first."""
    raw = scene.path.read_bytes()
    slots = [fmt.decode(raw[:512]), fmt.decode(raw[512:1024])]
    good = [s for s in slots if isinstance(s, Slot)]
    return [s.flags for s in sorted(good, key=lambda s: s.sequence)]


def _coarse(scene: Scene) -> bytes:
    slot, _both = fmt.newest(scene.path.read_bytes())
    assert isinstance(slot, Slot)
    start = fmt.layout(slot)[1]
    return scene.path.read_bytes()[start : start + slot.regions]


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The syncs and header writes in their order, with the flags that a header write puts in place."""
    calls: list[str] = []
    sync, pwrite = durable.sync_file, os.pwrite

    def traced_sync(fd: int, what: str) -> None:
        calls.append("sync")
        sync(fd, what)

    def traced_pwrite(fd: int, data: bytes, offset: int) -> int:
        slot = fmt.decode(data)
        if isinstance(slot, Slot):
            names = [f.name for f in Flag if f in slot.flags and f is not Flag.ENABLED]
            calls.append("write " + ("+".join(str(n) for n in names) or "unclean"))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(durable, "sync_file", traced_sync)
    monkeypatch.setattr(os, "pwrite", traced_pwrite)
    return calls


# -- the order of one thread -------------------------------------------------------------------------------------------


def test_the_flag_is_cleared_and_synced_before_the_first_mark_returns(scene: Scene, trace: list[str]) -> None:
    """Both slots, one after the other, each synced before the next, then the region; later marks there pay nothing."""
    scene.clean()
    bitmap = scene.opened()
    assert _flags(scene) == [Flag.CLEAN | Flag.ENABLED] * 2
    trace.clear()
    bitmap.mark(REGION, 1)
    assert trace == ["write unclean", "sync", "write unclean", "sync", "sync"]
    assert _flags(scene) == [Flag.ENABLED] * 2
    trace.clear()
    bitmap.mark(REGION + CLUSTER, 3 * CLUSTER)
    assert trace == []
    bitmap.mark(2 * REGION - 1, 2)
    assert trace == ["sync"]
    bitmap.close(None)


@pytest.mark.parametrize("change", ["mark", "merge", "keep", "clear"])
def test_nothing_else_changes_before_the_flag_is_cleared(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    """Killed before the first slot is written, the flag is still set: the digest must still be that of the body."""
    scene.clean((0, 8), (REGION, 8))
    bitmap = scene.opened()
    before = scene.path.read_bytes()[fmt.HEADER :]
    same: list[bool] = []
    pwrite = os.pwrite

    def look(fd: int, data: bytes, offset: int) -> int:
        same.append(scene.path.read_bytes()[fmt.HEADER :] == before)
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", look)
    none = np.zeros(kernels.bytes_for(bitmap.slot.clusters), dtype=np.uint8)
    {
        "mark": lambda: bitmap.mark(2 * REGION, 8),
        "merge": lambda: bitmap.merge_bits(~none),
        "keep": lambda: bitmap.keep_bits(none),
        "clear": bitmap.clear,
    }[change]()
    assert same[:2] == [True, True]
    assert scene.path.read_bytes()[fmt.HEADER :] != before
    bitmap.close(None)


def test_the_coarse_byte_is_synced_after_it_was_set(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the sync of a region finds in the file is the byte it is to make durable."""
    bitmap = scene.create()
    seen: list[bytes] = []
    sync = durable.sync_file

    def look(fd: int, what: str) -> None:
        seen.append(_coarse(scene))
        sync(fd, what)

    monkeypatch.setattr(durable, "sync_file", look)
    bitmap.mark(2 * REGION, REGION + 1)
    assert [i for i, b in enumerate(seen[-1]) if b == TOUCHED] == [2, 3]
    bitmap.close(None)


def test_a_region_of_an_earlier_session_needs_no_sync_of_its_own(scene: Scene, trace: list[str]) -> None:
    """Opening made the old coarse map durable; only what is known durable is skipped."""
    scene.clean((0, 8))
    bitmap = scene.opened()
    bitmap.mark(3 * REGION, 1)
    trace.clear()
    bitmap.mark(CLUSTER, 1)
    assert trace == []
    bitmap.close(None)


def test_opening_makes_the_coarse_map_durable_again(scene: Scene, trace: list[str]) -> None:
    """A process that was killed between setting a coarse byte and its sync left a byte that is in memory only."""
    scene.create().close(None)
    trace.clear()
    bitmap = scene.opened()
    assert trace == ["sync", "write unclean", "sync", "write unclean", "sync"]
    bitmap.close(None)


def test_the_flag_is_set_last(scene: Scene, trace: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """At a clean end: the body synced; one slot with the flag, synced; the other, synced. The digest is of the body."""
    bitmap = scene.create()
    bitmap.mark(0, SIZE)
    trace.clear()
    bitmap.close(scene.fingerprint())
    assert trace == ["sync", "write CLEAN", "sync", "write CLEAN", "sync"]
    assert _flags(scene) == [Flag.CLEAN | Flag.ENABLED] * 2


def test_a_clean_bitmap_that_nobody_wrote_to_is_not_written_either(scene: Scene, trace: list[str]) -> None:
    scene.clean((0, 8))
    bitmap = scene.opened()
    trace.clear()
    bitmap.close(scene.fingerprint())
    assert trace == []
    assert scene.opened().found is Found.CLEAN


def test_the_older_slot_is_overwritten_first(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 20: a torn write never meets the newest slot."""
    bitmap = scene.create()
    newest: list[int] = []
    pwrite = os.pwrite

    def look(fd: int, data: bytes, offset: int) -> int:
        slot, _both = fmt.newest(scene.path.read_bytes())
        assert isinstance(slot, Slot)
        newest.append(slot.sequence % 2 * fmt.SECTOR)
        assert offset != newest[-1]
        return pwrite(fd, data, offset)

    def only_slots(fd: int, data: bytes, offset: int) -> int:
        return look(fd, data, offset) if offset < fmt.HEARTBEAT else pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", only_slots)
    bitmap.set_enabled(False)
    bitmap.clear()
    bitmap.close(scene.fingerprint())
    assert len(newest) == 8


def test_clearing_is_invalid_until_it_is_whole(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 5: at every sync within, the file is either whole or says that it is not to be believed."""
    scene.clean((0, 8), (REGION, 8))
    bitmap = scene.opened()
    seen: list[tuple[bool, int]] = []
    sync = durable.sync_file

    def look(fd: int, what: str) -> None:
        slot, _both = fmt.newest(scene.path.read_bytes())
        assert isinstance(slot, Slot)
        seen.append((bool(slot.flags & Flag.INVALID), len(dirty(bitmap))))
        sync(fd, what)

    monkeypatch.setattr(durable, "sync_file", look)
    bitmap.clear()
    assert all(invalid or marked == 2 for invalid, marked in seen[:-2])
    assert (True, 0) in seen
    assert seen[-1] == (False, 0)
    monkeypatch.undo()
    assert _coarse(scene).count(TOUCHED) == 0


def test_a_cleared_bitmap_records_again(scene: Scene, trace: list[str]) -> None:
    """A region that was durable before the clear is not any more; the new owner's boot is in the header."""
    scene.clean((0, 8))
    scene.reboot()
    bitmap = scene.opened()
    bitmap.clear()
    trace.clear()
    scene.write(bitmap, (0, 8))
    assert trace == ["sync"]
    bitmap.close(None)
    found = scene.opened()
    assert found.found is Found.RECOVERED
    assert dirty(found) == {0}
    found.close(None)


# -- many threads ------------------------------------------------------------------------------------------------------


def test_threads_lose_no_bit(scene: Scene) -> None:
    """Many threads set neighbouring bits of the same bytes, one by one and in ranges."""
    threads, span = 8, 512
    bitmap = scene.create()
    bitmap.touch(0, span * CLUSTER)
    barrier = threading.Barrier(threads)

    def work(me: int) -> None:
        barrier.wait(WAIT)
        for cluster in range(me, span, threads):
            length = CLUSTER + 1 if cluster % 64 == 7 else 1
            bitmap.mark(cluster * CLUSTER, length)

    for _ in range(5):
        bitmap.keep_bits(np.zeros(kernels.bytes_for(bitmap.slot.clusters), dtype=np.uint8))
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, range(threads)))
        assert dirty(bitmap) == set(range(span + 1)) - {span} | ({span} if (span - 1) % 64 == 7 else set())
    bitmap.close(None)


def test_a_bit_is_set_in_one_step(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit is lost: neighbours in one byte, and the interpreter switches threads at the worst moment."""
    bitmap = scene.create()
    bitmap.touch(0, 8 * CLUSTER)
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (time.sleep(0.02), pwrite(*args))[1])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda cluster: bitmap.set_bits(cluster * CLUSTER, 1), range(4)))
    assert dirty(bitmap) == {0, 1, 2, 3}
    bitmap.close(None)


class _Gate:
    """Lets syncs wait until told to go on; counts them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.entered, self.leave = threading.Semaphore(0), threading.Semaphore(0)
        self.fail: Callable[[], None] = lambda: None
        self.syncs = 0
        monkeypatch.setattr(durable, "sync_file", self._sync)

    def _sync(self, fd: int, what: str) -> None:
        self.syncs += 1
        self.entered.release()
        assert self.leave.acquire(timeout=WAIT)
        self.fail()

    def wait(self) -> None:
        """Until a thread is within a sync."""
        assert self.entered.acquire(timeout=WAIT)

    def open(self, count: int = 1000) -> None:
        """Let syncs pass."""
        self.leave.release(count)


@contextmanager
def _thread(target: Callable[[], object]) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=target)
    thread.start()
    yield thread
    thread.join(WAIT)
    assert not thread.is_alive()


def test_no_thread_skips_a_sync_that_another_has_only_begun(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race of dm-era (L1): A has set the coarse byte and still syncs; B must not write to that region yet."""
    bitmap = scene.create()
    gate = _Gate(monkeypatch)
    b_done = threading.Event()

    def b() -> None:
        bitmap.mark(REGION + CLUSTER, 8)
        b_done.set()

    with _thread(lambda: bitmap.mark(REGION, 8)):
        gate.wait()
        assert _coarse(scene)[1] == TOUCHED
        with _thread(b):
            assert not b_done.wait(0.2)
            assert not any(bitmap.known)
            gate.open()
    assert b_done.is_set()
    assert bitmap.known[1]
    monkeypatch.undo()
    bitmap.close(None)


def test_a_region_set_after_a_sync_began_waits_for_the_next(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sync of A may have passed the page before B set its byte: that sync proves nothing for B."""
    bitmap = scene.create()
    gate = _Gate(monkeypatch)
    b_done = threading.Event()

    def b() -> None:
        bitmap.mark(2 * REGION, 8)
        b_done.set()

    with _thread(lambda: bitmap.mark(REGION, 8)):
        gate.wait()
        with _thread(b):
            gate.open(1)
            gate.wait()
            assert gate.syncs == 2
            assert not b_done.wait(0.1)
            assert list(bitmap.known) == [0, 1, 0, 0, 0]
            gate.open()
    monkeypatch.undo()
    bitmap.close(None)


def test_regions_set_before_a_sync_share_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight threads, four regions: those that wait behind one sync share the next. And none returns too early."""
    bitmap = scene.create()
    gate = _Gate(monkeypatch)
    waiting = 8
    with ThreadPoolExecutor(waiting) as pool:
        first = pool.submit(bitmap.mark, 0, 8)
        gate.wait()
        others = [pool.submit(bitmap.mark, (1 + i % 3) * REGION, 8) for i in range(waiting - 1)]
        wait_until(lambda: _coarse(scene).count(TOUCHED) == 4, "all coarse bytes are set")
        gate.open()
        for future in (first, *others):
            future.result(WAIT)
    assert gate.syncs <= 1 + 3
    assert bitmap.known == bytearray(b"\1\1\1\1\0")
    monkeypatch.undo()
    bitmap.close(None)


def test_threads_wait_until_the_flag_is_cleared(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two first writes after a clean shutdown: neither goes out before the flag is off on disk."""
    scene.clean((0, 8), (REGION, 8))
    bitmap = scene.opened()
    gate = _Gate(monkeypatch)
    done: list[int] = []

    def mark(offset: int) -> None:
        bitmap.mark(offset, 8)
        done.append(offset)

    with _thread(lambda: mark(0)), _thread(lambda: mark(REGION)):
        gate.wait()
        gate.open(1)
        gate.wait()
        assert done == []
        assert bitmap.state is State.CLEAN
        gate.open()
    assert sorted(done) == [0, REGION]
    assert _flags(scene) == [Flag.ENABLED] * 2
    monkeypatch.undo()
    bitmap.close(None)


# -- failures ----------------------------------------------------------------------------------------------------------


def test_a_sync_that_fails_makes_the_bitmap_invalid_on_disk(scene: Scene) -> None:
    """faults row 26, L3: what cannot be recorded invalidates first; the bits are not believed, now or later."""
    bitmap = scene.create()
    bitmap.mark(0, 8)
    durable.arm(fault_at="durable.sync:1:EIO")
    with pytest.raises(BitmapError, match="cannot record writes") as caught:
        bitmap.mark(REGION, 8)
    assert caught.value.reason is Reason.TRACKING_FAILED
    assert bitmap.state is State.INVALID
    assert all(f & Flag.INVALID for f in _flags(scene))
    with pytest.raises(BitmapError, match="is invalid"):
        bitmap.mark(2 * REGION, 8)
    bitmap.close(scene.fingerprint())
    assert scene.open() is Reason.TRACKING_FAILED


def test_a_header_that_is_written_in_part_is_not_counted_on(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The old slot would still say that all is well."""
    scene.clean((0, 8))
    bitmap = scene.opened()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:100], offset))
    with pytest.raises(BitmapError, match="short write"):
        bitmap.mark(0, 8)
    assert bitmap.state is State.INVALID
    assert not scene.path.exists()
    bitmap.close(None)


def test_where_the_header_cannot_be_written_the_file_is_renamed(scene: Scene) -> None:
    """faults row 26: every sync of the file fails from now on; the name says what the header cannot."""
    bitmap = scene.create()
    durable.arm(fault_at="durable.sync:1+:EIO")
    with pytest.raises(BitmapError, match="cannot record writes"):
        bitmap.mark(0, 8)
    assert bitmap.state is State.INVALID
    assert not scene.path.exists()
    assert bitmap.path.name == f"{NAME}.bitmap.invalid"
    bitmap.close(scene.fingerprint())
    durable.arm()
    assert scene.open() is Reason.TRACKING_FAILED


def test_where_even_that_fails_no_write_may_go_out(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 26: ``state`` must not say invalid, since that lets writes go out untracked. Later it may work."""
    bitmap = scene.create()
    bitmap.mark(0, 8)
    durable.arm(fault_at="durable.sync:1+:EIO")

    def no_rename(*_args: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", no_rename)
        for _ in range(2):
            with pytest.raises(BitmapError, match="cannot invalidate"):
                bitmap.mark(REGION, 8)
            assert bitmap.state is not State.INVALID
            assert not bitmap.known[1]
    durable.arm()
    with pytest.raises(BitmapError, match="is invalid"):
        bitmap.mark(REGION, 8)
    assert bitmap.state is State.INVALID
    bitmap.close(scene.fingerprint())
    assert scene.open() is Reason.TRACKING_FAILED


def test_a_bitmap_that_failed_is_not_closed_as_clean(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the storage works again when the end comes."""
    bitmap = scene.create()
    durable.arm(fault_at="durable.sync:1+:EIO")
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", lambda *_args: (_ for _ in ()).throw(OSError(errno.EROFS, "read-only")))
        with pytest.raises(BitmapError):
            bitmap.mark(0, 8)
    durable.arm()
    with pytest.raises(BitmapError):
        bitmap.close(scene.fingerprint())
    assert scene.open() is Reason.TRACKING_FAILED


def test_a_failed_sync_is_final_for_the_threads_behind_it(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 31: the kernel tells of a lost page once; the next sync succeeds and proves nothing."""
    bitmap = scene.create()
    gate = _Gate(monkeypatch)

    def fail_once() -> None:
        gate.fail = lambda: None
        raise DurabilityError("cannot sync: Input/output error")

    gate.fail = fail_once
    outcomes: list[object] = []

    def mark(offset: int) -> None:
        try:
            bitmap.mark(offset, 8)
        except BitmapError as e:
            outcomes.append((e.reason, bitmap.state, bool(_flags(scene)[-1] & Flag.INVALID)))
        else:
            outcomes.append("went out")

    with _thread(lambda: mark(0)):
        gate.wait()
        with _thread(lambda: mark(REGION)):
            wait_until(lambda: _coarse(scene)[1] == TOUCHED, "the second thread is on its way")
            gate.open()
    assert outcomes == [(Reason.TRACKING_FAILED, State.INVALID, True)] * 2
    monkeypatch.undo()
    bitmap.close(None)


@pytest.mark.parametrize("nth", range(1, 6))
@pytest.mark.parametrize("change", ["clear", "disable", "keep"])
def test_a_change_that_fails_is_never_half_made(scene: Scene, change: str, nth: int) -> None:
    """faults rows 5, 26: whichever sync fails, what the next owner finds is invalid or whole, old or new."""
    scene.clean((0, 8), (REGION, 8))
    bitmap = scene.opened()
    durable.arm(fault_at=f"durable.sync:{nth}:EIO")
    act = {
        "clear": bitmap.clear,
        "disable": lambda: bitmap.set_enabled(False),
        "keep": lambda: bitmap.keep_bits(np.zeros(kernels.bytes_for(bitmap.slot.clusters), dtype=np.uint8)),
    }[change]
    failed = False
    try:
        act()
    except BitmapError:
        failed = True
    durable.arm()
    steps = {"clear": 7, "disable": 2, "keep": 2}[change]
    assert failed == (nth <= steps)
    bitmap.close(scene.fingerprint())
    found = scene.open()
    if failed:
        assert found is Reason.TRACKING_FAILED
    else:
        assert isinstance(found, Bitmap)
        assert dirty(found) == (clusters((0, 8), (REGION, 8)) if change == "disable" else set())
        assert found.enabled == (change != "disable")
        found.close(None)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_sync_that_fails_at_the_end(scene: Scene, nth: int) -> None:
    """faults row 31: the flag is not set on what may not be there; pages of a failed sync may be gone."""
    bitmap = scene.create()
    scene.write(bitmap, (0, 8))
    durable.arm(fault_at=f"durable.sync:{nth}:EIO")
    with pytest.raises(BitmapError):
        bitmap.close(scene.fingerprint())
    durable.arm()
    assert scene.open() is Reason.TRACKING_FAILED
    assert bitmap.state is State.CLOSED


def test_invalid_is_said_once_and_stays(scene: Scene, trace: list[str]) -> None:
    bitmap = scene.create()
    trace.clear()
    bitmap.invalidate(Reason.DISK_CHANGED)
    bitmap.invalidate(Reason.DIGEST)
    assert trace == ["write INVALID", "sync"] * 2
    bitmap.close(scene.fingerprint())
    assert scene.open() is Reason.DISK_CHANGED


# -- creation ----------------------------------------------------------------------------------------------------------


def test_a_new_file_is_preallocated_and_private(scene: Scene) -> None:
    """faults row 26: a sparse file under a mapping turns a full disk into SIGBUS."""
    scene.create().close(None)
    info = scene.path.stat()
    assert info.st_blocks * 512 >= info.st_size == fmt.layout(_slot(scene))[2]
    assert info.st_mode & 0o777 == 0o600
    assert sorted(p.name for p in scene.store.directory.iterdir()) == sorted(["disk.json", "lock", scene.path.name])


def test_a_new_file_is_whole_before_it_has_its_name(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 19: content synced, then the name, then the directory; `create` returns after that."""
    calls: list[str] = []

    def spy(name: str) -> None:
        real = getattr(os, name)

        def called(*args: object, **more: object) -> object:
            is_dir = name == "fsync" and os.path.isdir(os.readlink(f"/proc/self/fd/{args[0]}"))
            calls.append("fsync directory" if is_dir else name)
            return real(*args, **more)

        monkeypatch.setattr(os, name, called)

    for name in ("fsync", "link", "rename"):
        spy(name)
    scene.create().close(None)
    assert calls == ["fsync", "link", "fsync directory"]


def _slot(scene: Scene) -> Slot:
    slot, both = fmt.newest(scene.path.read_bytes())
    assert isinstance(slot, Slot)
    assert both
    return slot


def test_no_room_for_a_new_bitmap(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 26: refused before anything is tracked in it; nothing is left behind."""

    def full(*_args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(BitmapError, match="No space left") as caught:
        scene.create()
    assert caught.value.hint
    assert scene.store.names() == []
    assert not list(scene.store.directory.glob(".*"))


_SMALL = """
import subprocess, sys
from pathlib import Path
from incbak.bitmap.store import BitmapStore
from incbak.errors import BitmapError
from incbak.fingerprint import Fingerprint

mount, size, cluster = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "incbak-test", mount], check=True)
store = BitmapStore(mount, "vm", "disk")
store.lock()
fine = store.create("fine", size, cluster, Fingerprint(size, 0, 0, bytes(16)))
try:
    store.create("big", 1 << 42, cluster, Fingerprint(1 << 42, 0, 0, bytes(16)))
except BitmapError as e:
    print(e.message)
print(store.names())
try:
    with (mount / "filler").open("wb", buffering=0) as f:
        while True:
            f.write(bytes(65536))
except OSError as e:
    print(e.strerror)
fine.mark(0, size)
print(fine.count())
fine.close(Fingerprint(size, 0, 0, bytes(16)))
"""


@pytest.mark.root
def test_no_room_on_a_real_file_system(tmp_path: Path) -> None:
    """faults row 26: the same with a file system of one megabyte; what exists there can be marked when it is full.

    In a process with mounts of its own, which go when it does.
    """
    need_root()
    need("unshare")
    command = ["unshare", "--mount", sys.executable, "-c", _SMALL, str(tmp_path), str(SIZE), str(CLUSTER)]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    assert told[0].endswith("No space left on device")
    assert told[1:] == ["['fine']", "No space left on device", str(SIZE)]


def test_a_name_is_taken_once(scene: Scene) -> None:
    first = scene.create()
    first.mark(0, 8)
    with pytest.raises(BitmapError, match="exists already"):
        scene.create()
    first.close(None)
    assert dirty(scene.opened()) == {0}


@pytest.mark.parametrize("granularity", [0, 256, 65535, 3 << 16])
def test_what_is_no_granularity(scene: Scene, granularity: int) -> None:
    with pytest.raises(BitmapError, match="power of two"):
        scene.store.create(NAME, SIZE, granularity, scene.fingerprint())


def test_a_leftover_of_a_killed_creation_is_removed_by_the_next_owner(scene: Scene) -> None:
    """And is never taken for a bitmap."""
    (scene.store.directory / ".x.bitmap.1.1.tmp").write_bytes(bytes(100))
    assert scene.store.names() == []
    scene.store.unlock()
    scene.store.lock()
    assert not list(scene.store.directory.glob(".*"))

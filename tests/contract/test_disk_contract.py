"""What every disk promises (`incbak.disk.base.Disk`), checked on each implementation and on awkward sizes."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from incbak.disk.base import Disk
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import MAGICS, FileDisk, open_disk, probe_format
from incbak.disk.memory import MemoryDisk
from incbak.errors import DiskError
from incbak.extents import whole_sectors
from incbak.fingerprint import take_path
from tests.kit.need import missing, need, need_root
from tests.kit.serve import wait_until

SIZES = [512, 1_000_003, 65_536 + 512, 4 << 20]
KINDS = [f"{kind}-{size}" for kind in ("memory", "file", "faulty") for size in SIZES] + ["loop-1049088"]


def _file(path: Path, size: int) -> Path:
    with path.open("wb") as f:
        f.truncate(size)
    return path


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes loop devices."""
    devices: list[str] = []

    def make(size: int) -> Path:
        need_root()
        need("losetup")
        backing = _file(tmp_path / f"backing-{len(devices)}", size)
        made = subprocess.run(
            ["losetup", "--find", "--show", str(backing)], capture_output=True, text=True, check=False
        )
        if made.returncode:
            missing("root", f"no loop device can be had: {made.stderr.strip()}")
        devices.append(made.stdout.strip())
        return Path(devices[-1])

    yield make
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


@pytest.fixture(params=[pytest.param(k, marks=pytest.mark.root if k.startswith("loop") else ()) for k in KINDS])
def disk(request: pytest.FixtureRequest, tmp_path: Path, loop: Callable[[int], Path]) -> Iterator[Disk]:
    """A disk of zeroes."""
    kind, size = request.param.split("-")
    made: Disk
    if kind == "memory":
        made = MemoryDisk(int(size))
    elif kind == "loop":
        made = open_disk(loop(int(size)))
    else:
        made = open_disk(_file(tmp_path / "image", int(size)))
        if kind == "faulty":
            made = FaultyDisk(made, Faults())
    yield made
    made.close()
    made.close()


def _ranges(size: int, count: int, seed: int = 1) -> list[tuple[int, int]]:
    """Ranges at odd places, the first and the last byte among them."""
    rng = random.Random(seed)
    found = [(0, 1), (size - 1, 1), (0, size)]
    while len(found) < count:
        offset = rng.choice([0, 511, 512, 4095, 4096, 65_535, 65_536, rng.randrange(size), size - 1]) % size
        found.append((offset, 1 + rng.randrange(min(size - offset, 200_000))))
    rng.shuffle(found)
    return found


def _check_extents(disk: Disk, content: bytes | bytearray, offset: int, length: int) -> None:
    at = offset
    for extent in disk.extents(offset, length):
        assert extent.offset == at
        assert extent.length > 0
        if extent.zero:
            assert not any(content[at : at + extent.length]), "data was reported as zero"
        at += extent.length
    assert at == offset + length


def test_it_reads_as_what_was_written(disk: Disk) -> None:
    """faults rows 38, 59, 60: writes, zeroes with and without unmapping, and trims, at any offset and length."""
    content = bytearray(disk.size)
    rng = random.Random(2)
    assert disk.read(0, disk.size) == content
    for number, (offset, length) in enumerate(_ranges(disk.size, 60)):
        what = rng.choice(["write", "write", "zero", "unmap", "trim"]) if number else "write"
        if what == "write":
            data = rng.randbytes(length)
            disk.write(memoryview(data) if number % 2 else data, offset)
            content[offset : offset + length] = data
        elif what == "trim":
            disk.trim(offset, length)
            after = disk.read(offset, length)
            assert all(b in (0, c) for b, c in zip(after, content[offset : offset + length], strict=True))
            content[offset : offset + length] = after
        else:
            disk.write_zeroes(offset, length, unmap=what == "unmap")
            content[offset : offset + length] = bytes(length)
        start, count = _ranges(disk.size, 4, seed=number)[0]
        assert disk.read(start, count) == content[start : start + count]
        _check_extents(disk, content, start, count)
    disk.flush()
    assert disk.read(0, disk.size) == content
    _check_extents(disk, content, 0, disk.size)


def test_it_is_cut_and_grows_with_zeroes(disk: Disk) -> None:
    """faults rows 35 and 36. A device has the size that it has, and says so before anything is changed; a file has
    whole sectors."""
    size = disk.size
    had = (lambda count: count) if isinstance(disk, MemoryDisk) else whole_sectors
    disk.write(b"x" * size, 0)
    if getattr(disk, "is_block", False):
        with pytest.raises(OSError, match=f"has {size} bytes"):
            disk.resize(size - 1)
        disk.resize(size)
        assert disk.size == size
        return
    before = disk.fingerprint()
    for new in (size - 1, size // 2 + 1, size + 5000):
        disk.check_resize(new)
        disk.resize(new)
        assert disk.fingerprint().size == disk.size == had(new)
    assert disk.fingerprint() != before
    kept = min(had(size // 2 + 1), had(size - 1))
    assert disk.read(0, disk.size) == b"x" * kept + bytes(disk.size - kept)
    with pytest.raises(OSError, match="ends at"):
        disk.read(disk.size - 1, 2)


def test_nothing_changes_its_size(disk: Disk) -> None:
    """faults row 38: a last partial block stays one."""
    size = disk.size
    disk.write(b"x", size - 1)
    disk.write_zeroes(size - 1, 1, unmap=True)
    disk.write_zeroes(0, size, unmap=False)
    disk.trim(0, size)
    assert disk.size == size
    if isinstance(disk, FileDisk):
        assert os.lseek(disk.fd, 0, os.SEEK_END) == size


def test_a_read_that_does_not_wait_is_right_or_refused(disk: Disk) -> None:
    data = random.Random(3).randbytes(disk.size)
    disk.write(data, 0)
    for offset, length in _ranges(disk.size, 20, seed=4):
        buf = memoryview(bytearray(length))
        if disk.read_nowait(buf, offset):
            assert buf == data[offset : offset + length]


def test_nothing_at_all(disk: Disk) -> None:
    """Requests of no bytes do nothing, anywhere."""
    before = disk.read(0, disk.size)
    for offset in (0, disk.size):
        disk.read_into(memoryview(bytearray()), offset)
        disk.write(b"", offset)
        disk.write_zeroes(offset, 0, unmap=True)
        disk.trim(offset, 0)
        assert list(disk.extents(offset, 0)) == []
    assert disk.read(0, disk.size) == before


def test_threads_write_side_by_side(disk: Disk) -> None:
    """Each thread its own stripes; none spoils another's."""
    threads, stripe = 4, 37
    count = min(disk.size // (threads * stripe), 200)
    parts = [bytes([65 + me]) * stripe for me in range(threads)]

    def work(me: int) -> None:
        for i in range(count):
            disk.write(parts[me], (i * threads + me) * stripe)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))
    whole = b"".join(parts) * count
    assert disk.read(0, len(whole)) == whole


def test_its_fingerprint_stays_and_changes_with_it(disk: Disk) -> None:
    """faults rows 8, 39: equal while nothing is written; a change of the first or the last bytes always shows."""
    disk.flush()
    first = disk.fingerprint()
    assert first.size == disk.size
    assert len(first.sample) == 16
    assert disk.fingerprint() == first
    seen = {first}
    for offset in (0, disk.size - 1):
        disk.write(b"x", offset)
        disk.flush()
        seen.add(disk.fingerprint())
    assert len(seen) == 3
    assert len({f.sample for f in seen}) == 3


# -- faults ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "act"),
    [
        ("read", lambda d: d.read(0, 1)),
        ("write", lambda d: d.write(b"x", 0)),
        ("zero", lambda d: d.write_zeroes(0, 1, unmap=True)),
        ("trim", lambda d: d.trim(0, 1)),
        ("flush", lambda d: d.flush()),
    ],
)
def test_a_faulty_disk_fails_when_told_to(kind: str, act: Callable[[Disk], object]) -> None:
    disk = FaultyDisk(MemoryDisk(512), Faults(fail={kind: (2, errno.ENOSPC)}))
    act(disk)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            act(disk)
        assert caught.value.errno == errno.ENOSPC
    disk.faults.once = True
    act(disk)
    assert disk.faults.seen[kind] == 4


def test_a_stalled_disk_waits_and_says_so_to_who_must_not_wait() -> None:
    go = threading.Event()
    disk = FaultyDisk(MemoryDisk(512), Faults(stall={"read": go}))
    assert not disk.read_nowait(memoryview(bytearray(1)), 0)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(disk.read, 0, 1)
        wait_until(lambda: disk.faults.seen.get("read"), "the read has begun")
        assert not read.done()
        go.set()
        assert read.result(10) == b"\0"


def test_when_it_was_written_is_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """fdatasync may leave that out; its failure is as final as any."""
    disk = open_disk(_file(tmp_path / "image", 4096))
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    assert disk.beat().durable_ns == (0, 0)
    disk.flush_times()
    assert synced == [disk.fd]
    durable = disk.beat().durable_ns
    assert durable == (os.fstat(disk.fd).st_mtime_ns, os.fstat(disk.fd).st_ctime_ns)
    disk.write(b"x", 0)
    assert disk.beat().durable_ns == durable

    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output"):
        disk.flush_times()
    with pytest.raises(OSError, match="an earlier flush"):
        disk.flush()
    disk.close()


def test_a_failed_flush_is_final(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 31: the kernel may have dropped the pages; that a later sync succeeds proves nothing."""
    disk = open_disk(_file(tmp_path / "image", 4096))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", lambda _fd: (_ for _ in ()).throw(OSError(errno.EIO, "lost")))
        with pytest.raises(OSError, match="lost"):
            disk.flush()
    for _ in range(2):
        with pytest.raises(OSError, match="an earlier flush") as caught:
            disk.flush()
        assert caught.value.errno == errno.EIO
    disk.close()


def test_a_failed_flush_fails_those_that_wait_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """faults row 31: the kernel tells one caller only; another one must not report the lost pages as durable."""
    disk = open_disk(_file(tmp_path / "image", 4096))
    entered, leave = threading.Event(), threading.Event()
    calls: list[int] = []

    def fail_the_first(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 1:
            entered.set()
            assert leave.wait(10)
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fdatasync", fail_the_first)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(disk.flush)
        assert entered.wait(10)
        second = pool.submit(disk.flush)
        assert not second.done()
        leave.set()
        for future in (first, second):
            assert isinstance(future.exception(10), OSError)
    disk.close()


def test_flushes_that_wait_share_one_sync_that_began_after_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults row 61: never the one that had begun before, which may have missed what they are to make durable."""
    disk = open_disk(_file(tmp_path / "image", 4096))
    entered, leave = threading.Event(), threading.Event()
    calls: list[int] = []

    def slow(fd: int) -> None:
        calls.append(fd)
        entered.set()
        assert leave.wait(10)

    monkeypatch.setattr(os, "fdatasync", slow)
    with ThreadPoolExecutor(5) as pool:
        first = pool.submit(disk.flush)
        assert entered.wait(10)
        others = [pool.submit(disk.flush) for _ in range(4)]
        wait_until(lambda: pool._work_queue.qsize() == 0, "all flushes have begun")
        threading.Event().wait(0.1)
        leave.set()
        for future in (first, *others):
            future.result(10)
    assert len(calls) == 2
    disk.close()


# -- files and devices -------------------------------------------------------------------------------------------------


def test_holes_are_found_and_data_between_them(tmp_path: Path) -> None:
    disk = open_disk(_file(tmp_path / "image", 1 << 20))
    disk.write(b"x" * 4096, 256 << 10)
    disk.write(b"x", (1 << 20) - 1)
    found = list(disk.extents(0, disk.size))
    assert [e.zero for e in found] == [True, False, True, False]
    assert all(e.zero == e.hole for e in found)
    assert found[1].offset == 256 << 10
    disk.write_zeroes(256 << 10, 4096, unmap=True)
    assert [e.zero for e in disk.extents(0, disk.size)] == [True, False]
    disk.close()


def test_zeroes_take_space_or_not_as_asked(tmp_path: Path) -> None:
    """Without ``unmap`` the range stays allocated, so that a later write does not meet a full file system."""
    path = _file(tmp_path / "image", 1 << 20)
    disk = open_disk(path)
    disk.write(b"x" * disk.size, 0)
    disk.flush()
    disk.write_zeroes(0, disk.size, unmap=False)
    disk.flush()
    assert path.stat().st_blocks * 512 >= disk.size
    disk.write_zeroes(0, 512 << 10, unmap=True)
    assert path.stat().st_blocks * 512 <= (512 << 10) + 65_536
    disk.trim(512 << 10, 512 << 10)
    assert path.stat().st_blocks * 512 <= 65_536
    disk.close()


def test_no_extent_is_empty_while_holes_are_punched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hole that appears between the search for data and the search for its end."""
    disk = open_disk(_file(tmp_path / "image", 1 << 20))
    disk.write(b"x" * (1 << 20), 0)
    seek = FileDisk._seek

    def racing(self: FileDisk, offset: int, whence: int) -> int | None:
        if whence == os.SEEK_HOLE and offset == 4096:
            self.trim(4096, 4096)
        return seek(self, offset, whence)

    monkeypatch.setattr(FileDisk, "_seek", racing)
    _check_extents(disk, bytes(1 << 20), 4096, 100_000)
    disk.close()


@pytest.mark.parametrize("unmap", [True, False])
def test_zeroes_where_the_storage_has_no_quick_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unmap: bool
) -> None:
    """faults row 59: written out; a trim does nothing there."""
    disk = open_disk(_file(tmp_path / "image", 3 << 20))
    disk.write(b"x" * disk.size, 0)
    monkeypatch.setattr(FileDisk, "_fallocate", lambda *_args: False)
    disk.write_zeroes(1, (2 << 20) + 5, unmap=unmap)
    disk.trim(0, 1)
    assert disk.read(0, disk.size) == b"x" + bytes((2 << 20) + 5) + b"x" * ((1 << 20) - 6)
    disk.close()


def test_an_image_that_is_cut_meanwhile_is_an_error_not_zeroes(tmp_path: Path) -> None:
    """faults rows 29, 37."""
    disk = open_disk(_file(tmp_path / "image", 8192))
    os.truncate(tmp_path / "image", 4096)
    assert disk.read(0, 4096) == bytes(4096)
    assert not disk.read_nowait(memoryview(bytearray(8192)), 0)
    with pytest.raises(OSError) as caught:
        disk.read(0, 8192)
    assert caught.value.errno == errno.EIO
    _check_extents(disk, bytes(8192), 0, 8192)
    disk.close()


@pytest.mark.parametrize("end", [1, 511, 65_536 + 3, (1 << 20) - 1])
def test_the_last_sector_of_a_file_is_whole(tmp_path: Path, end: int) -> None:
    """As in QEMU: what the file lacks of it reads as zeroes, can be written, and takes no space before that."""
    path, data = tmp_path / "image", random.Random(6).randbytes(end)
    path.write_bytes(data)
    size = whole_sectors(end)
    disk = open_disk(path)
    assert disk.size == size
    for at in (0, end - 1, end, size - 1, size):
        assert disk.read(at, size - at) == data[at:] + bytes(size - max(at, end))
    _check_extents(disk, data + bytes(size - end), 0, size)
    assert next(disk.extents(end, size - end)).zero
    before = disk.fingerprint()
    assert (before.size, before) == (size, take_path(path, raw=True))
    assert take_path(path, raw=False).size == path.stat().st_size == end
    disk.write_zeroes(end, size - end, unmap=True)
    disk.trim(end, size - end)
    assert path.stat().st_size == end
    with pytest.raises(OSError, match="ends at"):
        disk.read(end, size - end + 1)
    disk.write(b"x", size - 1)
    assert disk.read(0, size) == data + bytes(size - end - 1) + b"x"
    assert disk.fingerprint().sample != before.sample
    os.truncate(path, end - 1)
    with pytest.raises(OSError, match=f"ends at {end - 1}"):
        disk.read(0, size)
    disk.close()


def test_short_reads_and_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel may do less than asked, as at 2 GiB."""
    disk = open_disk(_file(tmp_path / "image", 10_000))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, memoryview(data)[:999], at))
    monkeypatch.setattr(os, "preadv", lambda fd, bufs, at, *flags: preadv(fd, [bufs[0][:999]], at, *flags))
    data = random.Random(5).randbytes(10_000)
    disk.write(data, 0)
    assert disk.read(0, 10_000) == data
    disk.close()


def test_read_only(tmp_path: Path) -> None:
    disk = open_disk(_file(tmp_path / "image", 512), read_only=True)
    assert disk.read_only
    for act in (lambda: disk.write(b"x", 0), lambda: disk.write_zeroes(0, 1, unmap=True), lambda: disk.trim(0, 1)):
        with pytest.raises(OSError):
            act()
    assert disk.read(0, 512) == bytes(512)
    disk.close()


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    """faults row 75: a FIFO does not hang it."""
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "missing", Path("/dev/null")):
        with pytest.raises(DiskError):
            open_disk(path)


@pytest.mark.parametrize(("name", "magic"), MAGICS.items())
def test_other_formats_are_told_from_raw(tmp_path: Path, name: str, magic: bytes) -> None:
    path = tmp_path / "image"
    path.write_bytes(magic + bytes(600))
    assert probe_format(path) == name
    path.write_bytes(bytes(600))
    assert probe_format(path) == "raw"
    with pytest.raises(DiskError, match="cannot read"):
        probe_format(tmp_path / "missing")


@pytest.mark.root
def test_a_block_device_has_no_time_and_no_inode(loop: Callable[[int], Path]) -> None:
    disk = open_disk(loop(1 << 20))
    assert (disk.is_block, disk.size) == (True, 1 << 20)
    found = disk.fingerprint()
    assert (found.inode, found.mtime_ns) == (0, 0)
    assert [e.zero for e in disk.extents(0, disk.size)] == [False]
    disk.close()


def test_sixteen_tebibytes(tmp_path: Path) -> None:
    """Offsets beyond 32 and 43 bits; time and memory do not grow with the size."""
    size = 16 << 40
    for directory in (tmp_path, Path("/dev/shm")):
        path = directory / f"incbak-huge-{os.getpid()}"
        try:
            _file(path, size)
            break
        except OSError:
            path.unlink(missing_ok=True)
    else:
        missing("huge files", "no file system here takes a file of 16 TiB")
    try:
        disk = open_disk(path)
        before = disk.fingerprint()
        disk.write(b"end", size - 3)
        assert disk.read(size - 4, 4) == b"\0end"
        found = list(disk.extents(0, size))
        assert [e.zero for e in found] == [True, False]
        assert found[1].offset + found[1].length == size
        assert disk.fingerprint().sample != before.sample
        disk.write_zeroes(size - 5, 5, unmap=True)
        assert disk.read(size - 5, 5) == bytes(5)
        disk.close()
    finally:
        path.unlink()

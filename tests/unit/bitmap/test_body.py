"""How stores reach the file, where the file system may refuse them: a full disk costs the bitmap, never the process."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest

from incbak.bitmap import body
from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.format import HEADER, REGION
from incbak.bitmap.store import BitmapStore
from incbak.errors import BitmapError
from incbak.reasons import Reason
from tests.kit.need import need, need_root
from tests.unit.bitmap.scene import CLUSTER, NAME, Scene, clusters, dirty

MiB = 1 << 20
DISK = 4 << 30
STEP = 5 * CLUSTER


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A list of the lowest offset at which ``pwrite`` finds no room any more; empty: there is room."""
    limit: list[int] = []
    pwrite = os.pwrite

    def refusing(fd: int, data: bytes, offset: int) -> int:
        if limit and offset >= limit[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", refusing)
    yield limit
    limit.clear()


@pytest.mark.parametrize("change", ["mark", "mark-range", "merge", "keep", "clear", "new-region"])
def test_a_store_that_fails_makes_the_bitmap_durably_invalid(scene: Scene, full_disk: list[int], change: str) -> None:
    """faults row 26: bits or coarse bytes that are not in the page cache must not be believed after a kill."""
    bitmap = scene.create()
    scene.write(bitmap, (0, 8))
    full_disk.append(HEADER)
    none = np.zeros_like(bitmap.snapshot())
    with pytest.raises(BitmapError):
        {
            "mark": lambda: bitmap.mark(9 * CLUSTER, 1),
            "mark-range": lambda: bitmap.mark(9 * CLUSTER, 20 * CLUSTER),
            "merge": lambda: bitmap.merge_bits(~none),
            "keep": lambda: bitmap.keep_bits(none),
            "clear": bitmap.clear,
            "new-region": lambda: bitmap.mark(2 * REGION, 1),
        }[change]()
    assert (bitmap.state, bitmap.reason) == (State.INVALID, Reason.TRACKING_FAILED)
    bitmap.close(scene.fingerprint())
    full_disk.clear()
    assert scene.open() in (Reason.TRACKING_FAILED, Reason.INVALIDATED)


def test_no_bit_is_seen_before_it_is_in_the_file(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A writer that sees its bit set skips the store: if the process dies then, the page cache must have the bit."""
    bitmap = scene.create()
    bitmap.touch(0, 1)
    seen: list[bool] = []
    pwrite = os.pwrite

    def look(fd: int, data: bytes, offset: int) -> int:
        seen.append(bitmap.is_dirty(3 * CLUSTER, 1) or bitmap.is_dirty(100 * CLUSTER, 1))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", look)
    bitmap.set_bits(3 * CLUSTER, 1)
    bitmap.set_bits(90 * CLUSTER, 20 * CLUSTER)
    assert seen == [False, True]  # the second look sees the first bit
    stored = np.frombuffer(scene.path.read_bytes()[HEADER:], dtype=np.uint8)[: len(bitmap.snapshot())]
    assert (stored == bitmap.snapshot()).all()
    bitmap.close(None)


def test_a_short_write_is_continued(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """pwrite(2) may take less than it was given, for example before a signal or at the last free block."""
    bitmap = scene.create()
    bitmap.touch(0, 1)
    pwrite = os.pwrite
    monkeypatch.setattr(
        os, "pwrite", lambda fd, data, at: pwrite(fd, bytes(data)[:3], at) if at >= HEADER else pwrite(fd, data, at)
    )
    bitmap.mark(0, 100 * CLUSTER)
    monkeypatch.undo()
    bitmap.close(scene.fingerprint())
    found = scene.opened()
    assert dirty(found) == clusters((0, 100 * CLUSTER))
    found.close(None)


@pytest.mark.parametrize("clean", [True, False])
def test_a_bitmap_that_cannot_be_read_is_not_believed(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, clean: bool
) -> None:
    """A bad sector below the bitmap is an error of ``pread``, with either body, and never a SIGBUS."""
    scene.clean((0, 8))
    if not clean:
        found = scene.opened()
        scene.write(found, (REGION, 8))
        found.close(None)
    pread = os.pread

    def bad_sector(fd: int, length: int, at: int) -> bytes:
        if at + length > HEADER and os.readlink(f"/proc/self/fd/{fd}") == str(scene.path):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return pread(fd, length, at)

    monkeypatch.setattr(os, "pread", bad_sector)
    assert scene.open() is Reason.HEADER
    scene.store.give_up(NAME, Reason.HEADER)
    monkeypatch.undo()
    assert scene.open() is Reason.TRACKING_FAILED


def test_where_a_full_disk_refuses_even_the_rename_the_file_is_removed(
    scene: Scene, full_disk: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """btrfs has a reserve for removals only; a bitmap that is not there is not believed either."""
    bitmap = scene.create()
    bitmap.mark(0, 8)

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    full_disk.append(0)
    monkeypatch.setattr(os, "rename", refuse)
    bitmap.invalidate(Reason.INVALIDATED)
    monkeypatch.undo()
    assert bitmap.state is State.INVALID
    assert not scene.path.exists()
    assert scene.open() is Reason.TRACKING_FAILED
    bitmap.close(None)


def test_what_cannot_be_locked_in_memory_is_not_mapped(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "shows_writes", lambda fd: True)
    monkeypatch.setattr(body._libc, "mlock", lambda *_: -1)
    bitmap = scene.create()
    assert bitmap._stored.kind == "written through"
    bitmap.mark(0, 1)
    bitmap.close(None)


def test_a_mapping_is_locked_in_memory_so_that_no_page_has_to_be_read_again(
    scene: Scene, request: pytest.FixtureRequest
) -> None:
    def locked() -> int:
        (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmLck:")]
        return int(line.split()[1]) << 10

    before = locked()
    bitmap = scene.create()
    mapped = "mapped" in request.node.name
    assert locked() - before == (-(-scene.path.stat().st_size // 4096) * 4096 if mapped else 0)
    bitmap.close(None)
    del bitmap
    assert locked() == before


def test_only_file_systems_that_show_what_is_written_are_mapped(tmp_path: Path) -> None:
    """Of others there is a copy in memory."""
    for directory, magic in (("/dev/shm", 0x01021994), ("/proc", 0x9FA0), ("/sys", 0x62656572)):
        fd = os.open(directory, os.O_RDONLY)
        try:
            assert body.filesystem_magic(fd) == magic
            assert body.shows_writes(fd) == (directory == "/dev/shm")
        finally:
            os.close(fd)


# -- a real ext4 ------------------------------------------------------------------------------------------------------

_OPEN = """
import sys
from pathlib import Path
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk
from incbak.reasons import Reason

state, image, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
disk = open_disk(image)
store = BitmapStore(state, "vm", "disk")
store.lock()
bitmap = store.open(name, disk.fingerprint())
"""

_MARK = f"""{_OPEN}
assert not isinstance(bitmap, Reason), bitmap
bitmap.mark(0, 1)
print(bitmap._stored.kind, flush=True)
sys.stdin.readline()
for at in (1 << 20, 3 << 30):
    try:
        bitmap.mark(at, 1)
        print("marked", flush=True)
    except Exception as e:
        print("refused" if bitmap.state != "invalid" else "invalid", flush=True)
"""


def _shut_down(directory: Path) -> None:
    """As after an error of the storage that the file system cannot live with."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))  # EXT4_IOC_SHUTDOWN, without its log
    finally:
        os.close(fd)


@pytest.mark.parametrize("how", ["is shut down", "copied with holes, and full"])
def test_marks_on_an_ext4_that_refuses_them_never_kill_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Each is refused, or the bitmap is given up: nothing is recorded that the file does not have."""
    need_root()
    need("mkfs.ext4")
    scene = Scene(tmp_path, monkeypatch)
    scene.store.unlock()
    os.truncate(scene.image, DISK)
    with _mounted(tmp_path, "mkfs.ext4", "-q", "-m", "0") as mounted:
        scene.state = mounted / "state"
        scene.store = BitmapStore(scene.state, "vm", "disk")
        scene.store.lock()
        scene.store.create(NAME, DISK, CLUSTER, scene.fingerprint()).close(scene.fingerprint())
        scene.store.unlock()
        state = scene.state
        if how != "is shut down":
            state = mounted / "copied"
            _run("cp", "-a", "--sparse=always", scene.state, state)
        command = [sys.executable, "-c", _MARK, str(state), str(scene.image), NAME]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, **pipes) as child:  # type: ignore[call-overload]
            assert child.stdout.readline() == "mapped\n"
            os.sync()  # what was written is clean, and the next store faults
            if how == "is shut down":
                _shut_down(mounted)
            else:
                _fill(mounted)
            out, _ = child.communicate("go\n", timeout=60)
        assert child.returncode == 0
        said = out.split()
        assert len(said) == 2
        assert how != "is shut down" or "marked" not in said


# -- a real btrfs, full ------------------------------------------------------------------------------------------------


@contextmanager
def _btrfs(directory: Path) -> Iterator[Path]:
    """A small btrfs on a loop device, mounted."""
    with _mounted(directory, "mkfs.btrfs", "-q", "-m", "single") as mounted:
        yield mounted


@contextmanager
def _mounted(directory: Path, *mkfs: str) -> Iterator[Path]:
    mounted = directory / "mounted"
    mounted.mkdir()
    with NamedTemporaryFile(dir="/dev/shm") as image:
        os.truncate(image.name, 120 * MiB)
        _run(*mkfs, image.name)
        _run("mount", "-o", "loop", image.name, mounted)
        try:
            yield mounted
        finally:
            _run("umount", "-l", mounted)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, timeout=60, stdout=subprocess.DEVNULL)


def _fill(directory: Path) -> None:
    """Until nothing fits any more, neither data nor metadata."""
    with pytest.raises(OSError), (directory / "fill").open("wb", buffering=0) as f:
        while True:
            f.write(bytes(MiB))
    with pytest.raises(OSError):
        for n in range(20_000):
            (directory / f"small-{n}").write_bytes(bytes(2000))


_MARK_ALL = f"""{_OPEN}
if isinstance(bitmap, Reason):
    print("invalid", bitmap)
    sys.exit()
try:
    for offset in range(0, disk.size, 5 << 16):
        bitmap.mark(offset, 1)
    print("marked")
except Exception as e:
    print("invalid", bitmap.state)
bitmap.close(None)
"""


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "in a snapshot"])
def test_marks_on_a_full_btrfs_never_kill_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """A snapshot makes even blocks without copy-on-write need new ones; then the bitmap is given up."""
    need_root()
    need("mkfs.btrfs", "btrfs")
    with _btrfs(tmp_path) as mounted:
        _run("btrfs", "-q", "subvolume", "create", mounted / "state")
        scene = Scene(tmp_path, monkeypatch)
        scene.store.unlock()
        scene.state, image = mounted / "state", scene.image
        os.truncate(image, DISK)
        scene.store = BitmapStore(scene.state, "vm", "disk")
        scene.store.lock()
        made = scene.store.create(NAME, DISK, CLUSTER, scene.fingerprint())
        for region in range(0, DISK, REGION):
            made.touch(region, 1)
        made.close(scene.fingerprint())
        scene.store.unlock()
        if shared:
            _run("btrfs", "-q", "subvolume", "snapshot", mounted / "state", mounted / "old")
        _fill(mounted)
        command = [sys.executable, "-c", _MARK_ALL, str(scene.state), str(image), NAME]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split()[0] == ("invalid" if shared else "marked"), done
        scene.store.lock()
        found = scene.store.open(NAME, scene.fingerprint())
        if isinstance(found, Bitmap):
            assert not shared
            assert dirty(found) == {c * 5 for c in range(-(-DISK // STEP))}
            found.close(None)
        scene.store.unlock()

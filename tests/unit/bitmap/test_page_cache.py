"""The page cache that a killed owner's marks are in is that of one mount of a file system, not of the whole boot."""

from __future__ import annotations

import fcntl
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import NamedTemporaryFile

import pytest

from incbak import host
from incbak.bitmap import format as fmt
from incbak.bitmap import page_cache
from incbak.bitmap.file import Found
from incbak.bitmap.format import Slot
from incbak.bitmap.page_cache import of_one_boot, page_cache_id
from incbak.bitmap.store import BitmapStore, view
from incbak.reasons import Reason
from tests.kit.devices import loop_device
from tests.kit.need import need, need_root
from tests.unit.bitmap.scene import NAME, Scene, clusters, dirty, regions

MiB = 1 << 20
WRITES = ((4096, 4096), (9 * MiB, 70_000))
SIZES = {"ext4": 64 * MiB, "xfs": 320 * MiB, "btrfs": 128 * MiB}


def id_of(path: Path) -> bytes:
    """The id of a file or directory, looked at anew."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return page_cache_id(fd)
    finally:
        os.close(fd)


def run(*command: str | Path) -> str:
    """What a command that must succeed says."""
    done = subprocess.run(command, check=True, timeout=60, stdout=subprocess.PIPE, text=True)
    return done.stdout


class Mount:
    """A file system of a loop device at ``at``."""

    def __init__(self, device: Path, at: Path) -> None:
        self.device, self.at = device, at

    def mount(self) -> None:
        """Mount it."""
        run("mount", self.device, self.at)

    def anew(self) -> None:
        """Unmount it and mount it again."""
        run("umount", self.at)
        self.mount()

    def shut_down(self) -> None:
        """Shut it down, as after an error of the storage, without its log; what was not synced is lost."""
        fd = os.open(self.at, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, 0x8004587D, struct.pack("I", 2))
        finally:
            os.close(fd)


@contextmanager
def mounted(at: Path, kind: str) -> Iterator[Mount]:
    """A new file system, mounted."""
    need_root()
    need(f"mkfs.{kind}")
    at.mkdir()
    with NamedTemporaryFile(dir="/dev/shm") as image:
        os.truncate(image.name, SIZES[kind])
        run(f"mkfs.{kind}", "-q", image.name)
        with loop_device(Path(image.name)) as device:
            made = Mount(device, at)
            made.mount()
            try:
                yield made
            finally:
                run("umount", "-l", at)  # a test that failed may have files open


def scene_on(directory: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    """A scene with its state directory elsewhere."""
    scene = Scene(directory, monkeypatch)
    scene.store.unlock()
    scene.state = state
    scene.store = BitmapStore(state, "vm", "disk")
    scene.store.lock()
    scene.store.note_image(scene.image)
    return scene


def killed(scene: Scene) -> None:
    """An owner that has marked and written, and is killed."""
    bitmap = scene.create()
    scene.write(bitmap, *WRITES)
    bitmap.close(None)


def seen(scene: Scene) -> Found | Reason | None:
    """What a look without the lock says that the next owner will find."""
    scene.store.unlock()
    found = view(scene.state, "vm", "disk", NAME)
    scene.store.lock()
    return found.reason or found.found


@pytest.mark.root
@pytest.mark.parametrize(
    ("kind", "lose"),
    [("ext4", True), ("ext4", False), ("xfs", True), ("btrfs", False)],
    ids=["ext4-shut-down", "ext4-unmounted", "xfs-shut-down", "btrfs-unmounted"],
)
def test_what_a_killed_owner_stored_before_the_file_system_was_mounted_anew_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, lose: bool
) -> None:
    """In the same boot. Without the mount its marks are believed; the reason is not that somebody wrote."""
    with mounted(tmp_path / "mounted", kind) as place:
        scene = scene_on(tmp_path, place.at / "state", monkeypatch)
        killed(scene)
        assert seen(scene) is Found.RECOVERED
        again = scene.opened()
        assert (again.found, dirty(again)) == (Found.RECOVERED, clusters(*WRITES))
        scene.write(again, (200 * MiB, 4096))
        again.close(None)
        scene.store.unlock()
        if lose:
            place.shut_down()
        place.anew()
        scene.store.lock()
        assert seen(scene) is Reason.UNPROVEN
        assert scene.open() is Reason.UNPROVEN
        scene.store.unlock()


@pytest.mark.root
def test_what_was_not_written_in_this_boot_is_coarse_after_a_mount(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the times show that nobody wrote since, whatever the page cache had; its next owner is one of this mount."""
    with mounted(tmp_path / "mounted", "ext4") as place:
        scene = scene_on(tmp_path, place.at / "state", monkeypatch)
        killed(scene)
        scene.store.unlock()
        later = time.time_ns() + 10**9
        os.utime(tmp_path / "boot-id", ns=(later, later))
        place.shut_down()
        place.anew()
        scene.store.lock()
        assert seen(scene) is Found.COARSE
        again = scene.opened()
        assert (again.found, dirty(again)) == (Found.COARSE, regions(0))
        again.close(None)
        assert seen(scene) is Found.RECOVERED
        scene.store.unlock()


@pytest.mark.root
@pytest.mark.parametrize("kind", SIZES)
def test_each_mount_of_a_file_system_has_an_id_of_its_own(tmp_path: Path, kind: str) -> None:
    """All files have the same, below a bind mount, in namespaces with a sysfs of their own, and after a remount."""
    with mounted(tmp_path / "mounted", kind) as place:
        found = []
        for _ in range(4):
            (place.at / "file").write_bytes(b"x")
            found.append(id_of(place.at / "file"))
            place.anew()
        assert len(set(found)) == 4
        assert all(of_one_boot(found[0], each) for each in found)
        mine = id_of(place.at)
        assert id_of(place.at / "file") == mine
        run("mount", "-o", "remount,ro", place.at)
        run("mount", "-o", "remount,rw", place.at)
        assert id_of(place.at) == mine
        (tmp_path / "bound").mkdir()
        run("mount", "--bind", place.at, tmp_path / "bound")
        try:
            assert id_of(tmp_path / "bound") == mine
        finally:
            run("umount", tmp_path / "bound")
        look = (
            "import os, sys; from incbak.bitmap.page_cache import page_cache_id as f; "
            "print(f(os.open(sys.argv[1], os.O_RDONLY)).hex())"
        )
        inside = 'mount -t sysfs sysfs /sys && exec "$@"'
        need("unshare")
        told = run("unshare", "--mount", "--net", "sh", "-c", inside, "sh", sys.executable, "-c", look, place.at)
        assert bytes.fromhex(told) == mine


@pytest.fixture
def sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``/sys`` in which the device of ``tmp_path`` is ``sdx1``; returns where its ext4 would be."""
    blocks = tmp_path / "sys/dev/block"
    blocks.mkdir(parents=True)
    (blocks / f"8:{os.minor(tmp_path.stat().st_dev)}").symlink_to("../../devices/virtual/sdx/sdx1")
    monkeypatch.setattr(page_cache, "_SYS", tmp_path / "sys")
    monkeypatch.setattr(os, "major", lambda _: 8)
    return tmp_path / "sys/fs/ext4/sdx1"


def test_a_directory_of_sysfs_that_was_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sysfs: Path) -> None:
    sysfs.mkdir(parents=True)
    before = id_of(tmp_path)
    assert id_of(tmp_path) == before
    sysfs.rename(tmp_path / "keeps its inode number")
    sysfs.mkdir()
    assert id_of(tmp_path) != before


@pytest.mark.parametrize("hide", [lambda sys: None, lambda sys: (sys / "dev").rename(sys / "gone")])
def test_what_is_not_told_is_of_the_boot_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sysfs: Path, hide: Callable[[Path], object]
) -> None:
    """As on NFS, FUSE, overlay and tmpfs, or without ``/sys``: a killed owner's marks are believed in the same boot."""
    hide(tmp_path / "sys")
    alone = id_of(tmp_path)
    monkeypatch.undo()
    assert id_of(Path("/proc")) == alone
    monkeypatch.setattr(host, "boot_id", lambda: bytes(16))
    assert not of_one_boot(id_of(Path("/proc")), alone)


@pytest.mark.root
def test_a_tmpfs_is_known_by_the_boot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need_root()
    (tmp_path / "memory").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=8m", "incbak-test", tmp_path / "memory")
    try:
        scene = scene_on(tmp_path, tmp_path / "memory/state", monkeypatch)
        killed(scene)
        assert id_of(scene.path) == id_of(Path("/proc"))
        assert scene.opened().found is Found.RECOVERED
        scene.store.unlock()
    finally:
        run("umount", "-l", tmp_path / "memory")


def test_a_file_of_an_early_version_is_of_another_boot(scene: Scene) -> None:
    """It has the id of the boot where the page cache is now."""
    killed(scene)
    slot, _both = fmt.newest(scene.path.read_bytes())
    assert isinstance(slot, Slot)
    scene.poke(0, fmt.encode(replace(slot, cache_id=host.boot_id())) * 2)
    later = time.time_ns() + 10**9
    os.utime(scene.state.parent / "boot-id", ns=(later, later))
    assert seen(scene) is Found.COARSE

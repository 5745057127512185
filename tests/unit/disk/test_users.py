"""Who else uses an image: real processes, devices and mounts, under other names and without locks."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incbak import mounts
from incbak.disk import users
from incbak.disk.users import Users, _kernel, find_users, key_of, refuse_users, refuse_writers
from incbak.doctor.places import filesystem
from incbak.errors import DiskError, ImageInUseError
from tests.kit.need import missing, need, need_root
from tests.kit.serve import wait_until
from tests.kit.sysfs import Sysfs

_HOLDER = """
import ctypes, mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR if "w" in sys.argv[2] else os.O_RDONLY)
if "m" in sys.argv[2]:  # not by the module, which keeps a descriptor of its own
    mode = mmap.PROT_READ | (mmap.PROT_WRITE if "w" in sys.argv[2] else 0)
    libc = ctypes.CDLL(None)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
    assert libc.mmap(None, 4096, mode, mmap.MAP_SHARED, fd, 0) != ctypes.c_void_p(-1).value
    os.close(fd)
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(path: Path, how: str) -> Iterator[int]:
    """Another process that has ``path`` open: ``r`` or ``w``, with ``m`` only mapped."""
    command = [sys.executable, "-c", _HOLDER, str(path), how]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        yield process.pid
        process.communicate(b"")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    need_root()
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def test_an_image_that_nobody_has_open(image: Path) -> None:
    with image.open("r+b"):  # we do, ourselves
        found = find_users(image)
    assert found == Users((), True)
    assert found.unwritable() == ""
    refuse_users(image)


@pytest.mark.parametrize("how", ["w", "wm", "r", "rm"])
def test_a_process_is_found_by_its_descriptors_and_mappings(image: Path, how: str) -> None:
    with holder(image, how) as pid:
        (user,) = find_users(image).found
        assert user.what.startswith(f"process {pid} (python")
        assert user.writes == ("w" in how)
        assert f"process {pid}" in find_users(image).unwritable()
        assert find_users(image, [pid]).found == ()
        with pytest.raises(ImageInUseError, match=f"process {pid}"):
            refuse_users(image)
        if "w" in how:
            with pytest.raises(ImageInUseError, match=f"disk.img is in use: process {pid} .python") as caught:
                refuse_writers(image)
            assert "qmp:PATH" in caught.value.hint
        else:
            assert refuse_writers(image).found == (user,)


@pytest.mark.parametrize("name", ["\r", "\f", "a\u2028b"])
def test_names_that_other_users_give(image: Path, tmp_path: Path, name: str) -> None:
    """The kernel's tables end a line with a newline only: a mapped file and a mount point of any name hide no user."""
    need("mkfs.ext4", "mount")
    need_root()
    mapped = tmp_path / f"x {image.stat().st_ino} {name}b"
    mapped.write_bytes(bytes(4096))
    subprocess.run(["mkfs.ext4", "-q", image], check=True, timeout=20)
    place = tmp_path / f"a{name}b"
    place.mkdir()
    with holder(mapped, "wm"), holder(image, "wm") as pid:
        assert [user.what.split(" (")[0] for user in find_users(image).found] == [f"process {pid}"]
    with loop(image) as device:
        subprocess.run(["mount", device, place], check=True, timeout=20)
        try:
            assert any("mounted" in user.what for user in find_users(device).writers)
            (place / "file").write_bytes(bytes(512))
            assert mounts.kind_of(place / "file") == filesystem(place / "none" / "yet") == "ext4"
            assert find_users(place / "file") == Users((), True)
        finally:
            subprocess.run(["umount", place], check=True, timeout=20)


def test_under_whatever_name(image: Path, tmp_path: Path) -> None:
    link, symlink = tmp_path / "hard", tmp_path / "soft"
    os.link(image, link)
    symlink.symlink_to(image)
    for name in (link, symlink):
        with holder(name, "w") as pid:
            assert f"process {pid}" in find_users(image).found[0].what
    with holder(image, "w") as pid:
        for name in (link, symlink):
            assert f"process {pid}" in find_users(name).found[0].what
        image.rename(tmp_path / "renamed")
        assert find_users(tmp_path / "renamed").writers


def test_the_children_of_ours_are_ours(image: Path) -> None:
    program = f"import subprocess, sys\nwith open({str(image)!r}, 'r+b') as f:\n"
    program += "  p = subprocess.Popen(['sleep', '60'], stdin=f)\nprint(p.pid, flush=True)\nsys.stdin.read()\np.kill()"
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout
        child = int(parent.stdout.readline())
        assert [u.what for u in find_users(image).found] == [f"process {child} (sleep)"]
        assert find_users(image, [parent.pid]).found == ()
        parent.communicate(b"")


def test_who_is_not_root_cannot_see_everything(image: Path) -> None:
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        os.setresuid(65534, 65534, 65534)
        os.write(writing, pickle.dumps(find_users(Path("/proc/self/exe")).complete))
        os._exit(0)
    os.waitpid(pid, 0)
    os.close(writing)
    with os.fdopen(reading, "rb") as f:
        assert pickle.load(f) is False
    assert "not all processes" in Users((), False).unwritable()


def test_a_process_namespace_of_our_own_does_not_show_everything(image: Path) -> None:
    need("unshare")
    program = f"from pathlib import Path; from incbak.disk.users import *; print(find_users(Path({str(image)!r})))"
    command = ["unshare", "-pf", "--mount-proc", sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with holder(image, "w"):
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, env=environment)
    assert "complete=False" in ran.stdout
    assert "cannot be seen has it open for writing" in ran.stdout


@contextmanager
def loop(image: Path, *options: str) -> Iterator[Path]:
    need("losetup")
    command = ["losetup", "--find", "--show", *options, str(image)]
    device = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "-d", device], check=True, timeout=20)


def test_a_loop_device_is_a_user_of_its_file(image: Path, tmp_path: Path) -> None:
    with loop(image) as device:
        (user,) = find_users(image).found
        assert (user.what, user.writes) == (f"loop device {device}", True)
        with holder(device, "w") as pid:
            assert any(f"process {pid}" in u.what for u in find_users(image).found)
            assert f"process {pid}" in find_users(device).writers[0].what
        other = tmp_path / "node"
        os.mknod(other, 0o600 | 0o060000, device.stat().st_rdev)
        with holder(other, "w") as pid:
            assert f"process {pid}" in find_users(device).writers[0].what
    with loop(image, "--read-only"):
        assert not find_users(image).writers
        assert find_users(image).found


@pytest.mark.parametrize("options", [(), ("-o", "ro")])
def test_what_is_mounted(image: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    need("mkfs.ext4", "mount")
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=20)
    (place := tmp_path / "a place").mkdir()
    with loop(image) as device:
        subprocess.run(["mount", *options, str(device), str(place)], check=True, timeout=20)
        try:
            found = [u for u in find_users(device).found if "mounted" in u.what]
            assert found
            assert all(u.writes == (not options) for u in found)
            assert any("mounted" in u.what for u in find_users(image).found)
            assert (_kernel(device, key_of(device)) is not None) == (not options) or options
        finally:
            subprocess.run(["umount", str(place)], check=True, timeout=20)
    assert find_users(image).found == ()


def test_the_kernel_tells_of_a_writer_that_no_table_shows(image: Path) -> None:
    assert _kernel(image, key_of(image)) is None
    with holder(image, "w"):
        hidden = _kernel(image, key_of(image))
        assert hidden
        assert hidden.writes


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DiskError, match="cannot look at image"):
        find_users(tmp_path / "missing")


def test_a_writer_of_the_file_behind_a_loop_device(image: Path) -> None:
    """One that only reads it is no matter: nothing that it keeps in memory is written back."""
    with loop(image) as device:
        assert find_users(device) == Users((), True)
        with holder(image, "w") as pid:
            assert f"process {pid}" in find_users(device).writers[0].what
            with pytest.raises(ImageInUseError, match=f"process {pid}"):
                refuse_writers(device)
        with holder(image, "wm") as pid:
            assert f"process {pid}" in find_users(device).writers[0].what
        with holder(image, "r"), holder(image, "rm"):
            assert find_users(device).found == ()


def test_two_loop_devices_of_one_file_where_they_overlap(image: Path) -> None:
    """A VM on one device, a backup of the other."""
    with loop(image, "--sizelimit", "524288") as device, loop(image) as whole:
        assert [user.what for user in find_users(device).writers] == [f"loop device {whole}"]
        assert [user.what for user in find_users(whole).writers] == [f"loop device {device}"]
    with loop(image, "--sizelimit", "524288") as device, loop(image, "--offset", "524288"):
        assert find_users(device) == Users((), True)
    with loop(image) as device, loop(image, "--read-only"):
        assert find_users(device) == Users((), True)


@contextmanager
def partitions(device: Path, *extents: tuple[int, int]) -> Iterator[list[Path]]:
    """Partitions of a device at (first sector, sectors), as the kernel knows them; no table is written."""
    need("addpart", "delpart")
    made = []
    try:
        for number, (start, length) in enumerate(extents, 1):
            command = ["addpart", str(device), str(number), str(start), str(length)]
            subprocess.run(command, check=True, timeout=20)
            made.append(Path(f"{device}p{number}"))
            wait_until(made[-1].exists, "the node of the partition")
        yield made
    finally:
        for number in range(len(made), 0, -1):
            subprocess.run(["delpart", str(device), str(number)], check=True, timeout=20)


def test_a_partition_and_its_disk_and_not_its_neighbour(image: Path) -> None:
    with loop(image) as device, partitions(device, (0, 512), (1024, 512)) as (first, second):
        assert find_users(first) == find_users(device) == Users((), True)
        with holder(device, "w") as pid:
            assert f"process {pid}" in find_users(first).writers[0].what
        with holder(first, "w") as pid:
            assert f"process {pid}" in find_users(device).writers[0].what
            assert find_users(second).found == ()
        with holder(device, "r"):
            assert find_users(first).found == ()
        with holder(image, "w") as pid:
            assert f"process {pid}" in find_users(second).writers[0].what
        with loop(first) as inner:
            assert f"loop device {inner}" in [user.what for user in find_users(device).writers]
            assert find_users(second).found == ()


@pytest.mark.parametrize("options", [(), ("-o", "ro")])
def test_a_disk_whose_partition_is_mounted(image: Path, tmp_path: Path, options: tuple[str, ...]) -> None:
    """The disk is in use; its other partition is not."""
    need("mkfs.ext4", "mount")
    (place := tmp_path / "place").mkdir()
    with loop(image) as device, partitions(device, (0, 1024), (1024, 1024)) as (first, second):
        subprocess.run(["mkfs.ext4", "-q", "-F", str(first)], check=True, timeout=20)
        subprocess.run(["mount", *options, str(first), str(place)], check=True, timeout=20)
        try:
            assert any("mounted" in user.what for user in find_users(device).found)
            assert bool(find_users(device).writers) == (not options)
            assert find_users(second) == Users((), True)
        finally:
            subprocess.run(["umount", str(place)], check=True, timeout=20)


def test_what_writes_below_a_device_mapper_device(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real devices, of which sysfs says that one is built on the other; a daemon of md is let be."""
    (other := tmp_path / "other").write_bytes(bytes(1 << 20))
    with loop(image) as upper, loop(other) as lower:
        system = Sysfs(tmp_path / "sys", monkeypatch)
        numbers = [os.stat(each).st_rdev for each in (upper, lower)]
        system.device("dm-0", numbers[0])
        system.device("sdx", numbers[1])
        system.built("dm-0", on="sdx")
        assert find_users(upper).found == ()
        with holder(lower, "r"):
            assert find_users(upper).found == ()
        with holder(lower, "w") as pid:
            assert f"process {pid}" in find_users(upper).writers[0].what
            monkeypatch.setattr(users, "_MANAGERS", {(Path("/proc") / str(pid) / "comm").read_text().strip()})
            assert find_users(upper).found == ()
            assert f"process {pid}" in find_users(lower).writers[0].what


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A merged directory whose upper one is ``upper`` beside it."""
    need_root()
    need("mount")
    below, *others = (tmp_path / name for name in ("below", "upper", "work", "merged"))
    for each in (below, *others):
        each.mkdir()
    options = "lowerdir={},upperdir={},workdir={}".format(below, *others[:2])
    command = ["mount", "-t", "overlay", "overlay", "-o", options, str(others[2])]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    if ran.returncode:
        missing("root", f"no overlay can be mounted: {ran.stderr.strip()}")
    yield others[2]
    subprocess.run(["umount", str(others[2])], check=True, timeout=20)


def test_a_file_that_is_shown_by_another_file_system(overlay: Path) -> None:
    """By its other name it is another file; what cannot be seen is not taken for unused."""
    image, upper = overlay / "disk.img", overlay.parent / "upper" / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with holder(upper, "w"):
        users_ = refuse_writers(image)
    assert not users_.complete
    assert "overlay" in users_.unwritable()
    assert "not noticed" in users_.doubt(image)
    assert find_users(upper) == Users((), True)
    with holder(image, "w"):
        assert "cannot be seen has it open for writing" in find_users(upper).writers[0].what


@pytest.mark.parametrize("kind", ["overlay", "ecryptfs", "fuse.mergerfs", "fuse.unionfs-fuse"])
def test_file_systems_that_show_others(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Those that no kernel or package of the tests has, by the table of mounts."""
    assert users._shown_by(image) == ""
    table = tmp_path / "mounts"
    table.write_text(re.sub(r" - \S+ ", f" - {kind} ", Path("/proc/self/mountinfo").read_text()))
    monkeypatch.setattr(mounts, "_MOUNTS", table)
    assert kind in find_users(image).unwritable()


def test_it_is_quick(image: Path) -> None:
    begun = time.process_time()
    find_users(image)
    assert time.process_time() - begun < 1

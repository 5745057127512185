"""Who else uses an image: real processes, devices and mounts, under other names and without locks."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incbak.disk.users import Users, _above, _kernel, find_users, key_of, refuse_users, refuse_writers
from incbak.errors import DiskError, ImageInUseError
from tests.kit.need import need, need_root

_HOLDER = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR if "w" in sys.argv[2] else os.O_RDONLY)
if "m" in sys.argv[2]:
    kept = mmap.mmap(fd, 0, mmap.MAP_SHARED, mmap.PROT_READ | (mmap.PROT_WRITE if "w" in sys.argv[2] else 0))
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


def test_devices_on_devices_and_what_is_not_there(tmp_path: Path, image: Path) -> None:
    with loop(image) as device:
        assert list(_above(key_of(device))) == []
    with pytest.raises(DiskError, match="cannot look at image"):
        find_users(tmp_path / "missing")


def test_it_is_quick(image: Path) -> None:
    begun = time.process_time()
    find_users(image)
    assert time.process_time() - begun < 1

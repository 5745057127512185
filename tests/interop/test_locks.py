"""Image locks are QEMU's: QEMU and incbak refuse to open one image for writing twice, and readers share it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incbak.disk.file import FileDisk, open_disk
from incbak.errors import ImageInUseError
from tests.kit.need import need
from tests.kit.serve import Qmp, listens, wait_until

pytestmark = pytest.mark.qemu


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as f:
        f.truncate(1 << 20)
    return path


@contextmanager
def _opened(image: Path, *, read_only: bool = False) -> Iterator[FileDisk]:
    disk = open_disk(image, read_only=read_only)
    try:
        yield disk
    finally:
        disk.close()


def _qemu_io(image: Path, *options: str, command: str = "read 0 512") -> subprocess.CompletedProcess[str]:
    need("qemu-io")
    whole = ["qemu-io", *options, "-f", "raw", "-c", command, str(image)]
    return subprocess.run(whole, capture_output=True, text=True, timeout=30, check=False)


@contextmanager
def _held_by_qemu_io(image: Path, *options: str) -> Iterator[None]:
    """qemu-io keeps the image open; it has it when it has answered."""
    need("qemu-io")
    process = subprocess.Popen(
        ["qemu-io", *options, "-f", "raw", str(image)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    try:
        process.stdin.write(b"length\n")
        process.stdin.flush()
        assert b"1 MiB" in process.stdout.readline()
        yield
    finally:
        process.communicate(b"quit\n", timeout=30)


@contextmanager
def _held_by_a_vm(image: Path, directory: Path, *, read_only: bool = False) -> Iterator[Qmp]:
    """A VM that was not started: its disk is open all the same."""
    need("qemu-system-x86_64")
    monitor = directory / "qmp"
    command = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"]
    command += ["-qmp", f"unix:{monitor},server=on,wait=off"]
    command += ["-drive", f"if=none,id=d,format=raw,file={image},read-only={'on' if read_only else 'off'}"]
    command += ["-device", "virtio-blk-pci,drive=d"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        wait_until(lambda: listens(monitor) or process.poll() is not None, "QEMU's monitor")
        qmp = Qmp(monitor)
        yield qmp
        qmp.close()
    finally:
        process.kill()
        process.communicate(timeout=30)


def _vm_fails(image: Path) -> str:
    need("qemu-system-x86_64")
    command = ["qemu-system-x86_64", "-machine", "q35,accel=tcg", "-nodefaults", "-display", "none", "-S"]
    command += ["-drive", f"if=none,id=d,format=raw,file={image}", "-device", "virtio-blk-pci,drive=d"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode
    return done.stderr


def test_qemu_io_is_refused_while_we_write(image: Path) -> None:
    with _opened(image):
        done = _qemu_io(image)
        assert done.returncode
        assert 'Failed to get "write" lock' in done.stderr
    assert _qemu_io(image).returncode == 0


def test_qemu_img_is_refused_while_we_write(image: Path) -> None:
    """As beside a running VM: it changes nothing, while looking at a raw image is always allowed to it."""
    need("qemu-img")
    resize = ["qemu-img", "resize", "-f", "raw", str(image), "2M"]
    with _opened(image):
        done = subprocess.run(resize, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode
        assert 'Failed to get "write" lock' in done.stderr
        subprocess.run(["qemu-img", "info", "-f", "raw", str(image)], stdout=subprocess.DEVNULL, check=True)
    with _opened(image, read_only=True):
        assert subprocess.run(resize, capture_output=True, timeout=30, check=False).returncode
    assert image.stat().st_size == 1 << 20


def test_a_vm_is_refused_while_we_write(image: Path) -> None:
    with _opened(image):
        assert "lock" in _vm_fails(image)


def test_a_vm_is_refused_while_we_read(image: Path) -> None:
    """An offline backup: the guest must not be started under it."""
    with _opened(image, read_only=True):
        assert "lock" in _vm_fails(image)
        assert _qemu_io(image, command="write 0 512").returncode


@pytest.mark.parametrize("read_only", [False, True])
def test_we_are_refused_while_qemu_io_writes(image: Path, read_only: bool) -> None:
    with _held_by_qemu_io(image):
        with pytest.raises(ImageInUseError, match="in use by another process") as caught:
            open_disk(image, read_only=read_only)
        assert caught.value.retry
        assert "monitor" in caught.value.hint
    with _opened(image, read_only=read_only):
        pass


@pytest.mark.parametrize("read_only", [False, True])
def test_we_are_refused_while_a_vm_runs(image: Path, tmp_path: Path, read_only: bool) -> None:
    """faults row 82: a stopped VM has its disk open as well."""
    with _held_by_a_vm(image, tmp_path):
        with pytest.raises(ImageInUseError):
            open_disk(image, read_only=read_only)
    with _opened(image, read_only=read_only):
        pass


def test_readers_share(image: Path, tmp_path: Path) -> None:
    """Ours, qemu-io's, and a VM with a read-only disk, in any order; a writer of ours is refused by them all."""
    with _opened(image, read_only=True), _opened(image, read_only=True):
        assert _qemu_io(image, "-r").returncode == 0
    with _held_by_qemu_io(image, "-r"):
        with _opened(image, read_only=True), pytest.raises(ImageInUseError):
            open_disk(image)
    with _held_by_a_vm(image, tmp_path, read_only=True):
        with _opened(image, read_only=True), pytest.raises(ImageInUseError):
            open_disk(image)


def test_we_refuse_ourselves(image: Path) -> None:
    """faults row 47: two writers, a writer and a reader, and a reader and a writer; who was refused holds nothing."""
    with _opened(image):
        for read_only in (False, True, False):
            with pytest.raises(ImageInUseError):
                open_disk(image, read_only=read_only)
    with _opened(image, read_only=True):
        with pytest.raises(ImageInUseError):
            open_disk(image)
        with _opened(image, read_only=True):
            pass
    with _opened(image):
        pass


def test_the_lock_goes_with_the_process(image: Path, tmp_path: Path) -> None:
    """faults row 50: nothing is left to be judged stale."""
    with _held_by_a_vm(image, tmp_path) as qmp:
        assert qmp("query-status")["status"] == "prelaunch"
    with _opened(image):
        pass


def test_without_a_lock_an_image_in_use_can_be_looked_at(image: Path) -> None:
    with _held_by_qemu_io(image):
        disk = open_disk(image, read_only=True, lock=False)
        assert disk.read(0, 4) == bytes(4)
        disk.close()

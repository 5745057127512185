"""A block device has no time of change; what the kernel has counted of its writes tells, as long as it counts."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak import host
from incbak.bitmap.file import Bitmap
from incbak.bitmap.identity import written_since
from incbak.reasons import Reason
from tests.kit.need import missing, need, need_root
from tests.unit.bitmap.scene import Scene


class Kernel:
    """What it says of the device."""

    says = "boot:7:80:0"


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    monkeypatch.setattr(host, "device_writes", lambda _: made.says)
    return made


def closed(scene: Scene) -> None:
    """A clean end."""
    scene.store.note_image(scene.image)
    bitmap = scene.create()
    scene.store.note_writes(scene.image)
    bitmap.close(scene.fingerprint())


@pytest.mark.parametrize(
    ("says", "valid"),
    [
        ("boot:7:80:0", True),
        ("boot:7:88:0", False),
        ("boot:7:80:8", False),
        ("boot:8:0:0", True),
        ("other:7:0:0", True),
        ("", True),
    ],
)
def test_writes_since_the_clean_end(scene: Scene, kernel: Kernel, says: str, valid: bool) -> None:
    """A device that was set up anew, or another boot, tells nothing: there the sample must do, as before."""
    closed(scene)
    kernel.says = says
    scene.store.note_image(scene.image)
    found = scene.open()
    assert isinstance(found, Bitmap) if valid else found is Reason.DISK_CHANGED
    if isinstance(found, Bitmap):
        found.close(None)


def test_it_is_durably_so(scene: Scene, kernel: Kernel) -> None:
    closed(scene)
    kernel.says = "boot:7:99:0"
    scene.store.note_image(scene.image)
    kernel.says = "boot:7:80:0"
    scene.store.note_image(scene.image)
    assert scene.open() is Reason.DISK_CHANGED


def test_a_bitmap_whose_owner_was_killed_is_not_judged_by_it(scene: Scene, kernel: Kernel) -> None:
    """It has recorded what the count tells of."""
    closed(scene)
    bitmap = scene.opened()
    bitmap.mark(0, 1)
    bitmap.close(None)
    kernel.says = "boot:7:96:0"
    scene.store.note_image(scene.image)
    scene.opened().close(None)


def test_of_a_file_nothing_is_noted(scene: Scene) -> None:
    closed(scene)
    assert b'"writes":""' in (scene.store.directory / "disk.json").read_bytes()
    assert not written_since("", "")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Path]:
    need_root()
    need("losetup")
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(1 << 20))
    ran = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False)
    if ran.returncode:
        missing("losetup", "no loop device can be had here")
    yield Path(ran.stdout.strip())
    subprocess.run(["losetup", "--detach", ran.stdout.strip()], check=True)


def test_the_kernel_counts(device: Path) -> None:
    """A write shows when it is on the device; a read and an empty flush do not."""
    before = host.device_writes(device)
    with device.open("r+b", buffering=0) as f:
        f.read(4096)
        os.fsync(f)
        assert host.device_writes(device) == before
        f.seek(8192)
        f.write(b"x" * 512)
        os.fsync(f)
    assert written_since(before, host.device_writes(device))


def test_what_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert [host.device_writes(p) for p in (tmp_path / "file", tmp_path / "none", Path("/dev/null"))] == [""] * 3

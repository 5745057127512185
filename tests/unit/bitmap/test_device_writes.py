"""A block device has no time of change; what the kernel has counted of its writes tells, as long as it counts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from incbak import device
from incbak.bitmap.continuity import changed
from incbak.bitmap.file import Bitmap
from incbak.disk.file import open_disk
from incbak.fingerprint import NO_WRITES, Beat, Fingerprint
from incbak.reasons import Reason
from tests.kit.devices import loop_device
from tests.unit.bitmap.scene import CLUSTER, NAME, Scene

SETUP, OTHER = b"s" * 16, b"o" * 16
FEW, MORE = b"f" * 16, b"m" * 16


def device_of(scene: Scene, writes: bytes) -> Fingerprint:
    """A block device with the content of the image."""
    found = scene.fingerprint()
    return Fingerprint(found.size, 0, 0, found.sample, writes=writes)


@pytest.mark.parametrize(
    ("writes", "reason"),
    [
        (SETUP + FEW, None),
        (SETUP + MORE, Reason.DISK_CHANGED),
        (OTHER + FEW, Reason.UNPROVEN),
        (NO_WRITES, Reason.UNPROVEN),
    ],
)
def test_writes_since_the_clean_end(scene: Scene, writes: bytes, reason: Reason | None) -> None:
    """Another boot, another set-up, and a kernel that does not count show nothing: that is not "unchanged"."""
    before = device_of(scene, SETUP + FEW)
    scene.store.create(NAME, before.size, CLUSTER, before).close(before)
    found = scene.store.open(NAME, device_of(scene, writes))
    assert (found if isinstance(found, Reason) else None) is reason
    if isinstance(found, Bitmap):
        found.close(None)


@pytest.mark.parametrize(
    ("writes", "boot", "reason"),
    [
        (SETUP + FEW, "same", None),
        (SETUP + MORE, "same", Reason.UNPROVEN),
        (SETUP + FEW, "other", None),
        (OTHER + FEW, "other", Reason.UNCLEAN_SHUTDOWN),
    ],
)
def test_writes_since_the_owner_was_killed(scene: Scene, writes: bytes, boot: str, reason: Reason | None) -> None:
    """The count cannot tell the owner's last writes from those of others: it has to be what the owner saw."""
    disk = device_of(scene, SETUP + FEW)
    bitmap = scene.store.create(NAME, disk.size, CLUSTER, disk)
    bitmap.mark(0, 1)
    bitmap.heartbeat(Beat(time.time_ns(), writes=SETUP + FEW))
    bitmap.close(None)
    if boot == "other":
        scene.reboot()
    found = scene.store.open(NAME, device_of(scene, writes))
    assert (found if isinstance(found, Reason) else None) is reason
    if isinstance(found, Bitmap):
        found.close(None)


def test_a_device_that_grew_after_a_kill(scene: Scene) -> None:
    """Nothing was written, and yet the bitmap is one of another size."""
    disk = device_of(scene, SETUP + FEW)
    bitmap = scene.store.create(NAME, disk.size, CLUSTER, disk)
    bitmap.heartbeat(Beat(time.time_ns(), writes=SETUP + FEW))
    bitmap.close(None)
    assert scene.store.open(NAME, disk._replace(size=disk.size + CLUSTER)) is Reason.RESIZED


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "backing").write_bytes(bytes(1 << 20))
    with loop_device(tmp_path / "backing") as path:
        yield path


def test_the_kernel_counts(loop: Path) -> None:
    """A write shows when it is on the device; a read and an empty flush do not."""
    before = device.writes(loop)
    with loop.open("r+b", buffering=0) as f:
        f.read(4096)
        os.fsync(f)
        assert device.writes(loop) == before
        f.seek(8192)
        f.write(b"x" * 512)
        os.fsync(f)
    assert device.writes(loop).partition(";")[0] == before.partition(";")[0]
    assert device.writes(loop) != before


def seen(loop: Path) -> Fingerprint:
    """By who opens it now."""
    with closing(open_disk(loop, read_only=True, lock=False)) as disk:
        return disk.fingerprint()


def test_a_write_that_is_only_in_the_page_cache_shows(loop: Path) -> None:
    """It is not counted before it is on the device, so who has it open brings it there first."""
    with closing(open_disk(loop, read_only=True, lock=False)) as disk:
        before = disk.fingerprint()
        with loop.open("r+b", buffering=0) as f:
            f.seek(8192)
            f.write(b"x" * 512)
            assert changed(before, disk.fingerprint()) is Reason.DISK_CHANGED


def test_a_device_that_is_not_counted_equals_nothing(loop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "writes", lambda _: "")
    assert changed(seen(loop), seen(loop)) is Reason.UNPROVEN


def test_what_is_no_device(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    assert [device.writes(p) for p in (tmp_path / "file", tmp_path / "none", Path("/dev/null"))] == [""] * 3

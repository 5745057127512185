"""What a disk's bitmaps are worth once it has been served without one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incbak.bitmap import judge, settle
from incbak.bitmap import store as module
from incbak.bitmap.disown import disown
from incbak.bitmap.file import Bitmap, Found
from incbak.bitmap.remembered import remember_format
from incbak.disk import file
from incbak.disk.file import open_disk
from incbak.errors import BitmapError, FormatError, ImageInUseError, UsageError
from incbak.fingerprint import Fingerprint, take
from incbak.reasons import Reason
from incbak.serve.opening import close_tracked, open_tracked
from incbak.serve.vm import Vm
from tests.kit.devices import loop_device
from tests.kit.need import need_root
from tests.kit.serve import holding, raw_image

GRAIN = 65536
SIZE = 64 * GRAIN
WHERE = 3 * GRAIN + 512
"""No block of the fingerprint's sample is there."""


@pytest.fixture(autouse=True)
def _no_ctime(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `_session` puts back would show in it."""
    monkeypatch.setattr(file, "take", lambda *args: take(*args)._replace(ctime_ns=0))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """An image with a clean, empty bitmap ``b``."""
    made = raw_image(tmp_path / "vda.raw", SIZE)
    with _session(made) as vm:
        tracked = vm.disks["vda"]
        assert tracked.store
        tracked.bitmaps["b"] = tracked.store.create("b", SIZE, GRAIN, tracked.disk.fingerprint())
    return made


def test_a_device_is_read_from_its_storage_and_not_from_an_outdated_cache(image: Path) -> None:
    """Another program that only reads the device keeps the cache, and what was written below shows there never."""
    with loop_device(image) as device, device.open("rb") as reader:
        assert reader.read(1 << 20) == image.read_bytes()[: 1 << 20]
        with image.open("r+b") as below:
            below.write(b"new" * 1000)
            os.fsync(below.fileno())
        for again in range(2):
            disk = open_disk(device, read_only=not again)
            assert disk.read(0, 3000) == b"new" * 1000
            disk.close()


def test_two_disks_that_have_bytes_in_common_are_refused(image: Path) -> None:
    """What a guest writes to one of them is recorded for that one only."""
    need_root()
    with _session(image) as vm, loop_device(image) as device:
        with pytest.raises(UsageError, match="vda and vdb have bytes in common"):
            open_tracked(vm, "vdb", device, image.parent / "state")
        assert list(vm.disks) == ["vda"]


@contextmanager
def _session(image: Path) -> Iterator[Vm]:
    """Serve ``image``; at the end it looks as before to whom does not read it, as a block device always does."""
    before = os.stat(image).st_mtime_ns
    vm = Vm("web1", image.parent)
    tracked = open_tracked(vm, "vda", image, image.parent / "state")
    try:
        yield vm
    finally:
        assert close_tracked(tracked, 5)
        os.utime(image, ns=(before, before))


def _found(image: Path) -> Found | Reason:
    with _session(image) as vm:
        bitmaps = vm.disks["vda"].bitmaps
        return bitmaps["b"].found if "b" in bitmaps else vm.lost["vda"]["b"]


def test_a_bitmap_that_was_not_believed_once_never_is_again(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look at it fails once, the guest writes with nobody recording, and the next look is fine."""
    with monkeypatch.context() as patch:
        patch.setattr(judge, "digest_of", lambda body: bytes(32))
        with _session(image) as vm:
            assert vm.lost["vda"] == {"b": Reason.DIGEST}
            vm.disks["vda"].disk.write(memoryview(b"unrecorded"), WHERE)
    assert _found(image) is Reason.DIGEST


def test_nor_is_one_whose_header_could_not_be_read(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no slot to say it in, so the file gets another name."""
    with monkeypatch.context() as patch:
        patch.setattr(module, "read_header", lambda path: Reason.HEADER)
        with _session(image) as vm:
            assert vm.lost["vda"] == {"b": Reason.HEADER}
            vm.disks["vda"].disk.write(memoryview(b"unrecorded"), WHERE)
    assert _found(image) is Reason.TRACKING_FAILED


def test_an_image_that_was_served_is_known_by_its_path(image: Path) -> None:
    """I5: who overwrites it finds its bitmaps, though it be a block device that nothing else tells."""
    assert disown(image.parent / "state", image) == ["b"]
    assert _found(image) is Reason.DISK_CHANGED


def test_without_that_the_disk_is_not_served(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be written that a bitmap could later deny."""

    def fail(*_: object) -> None:
        raise BitmapError("no")

    with monkeypatch.context() as patch:
        patch.setattr(judge, "digest_of", lambda body: bytes(32))
        patch.setattr(module.BitmapStore, "give_up", fail)
        with pytest.raises(BitmapError, match="no"):
            open_tracked(Vm("web1", image.parent), "vda", image, image.parent / "state")
    assert _found(image) is Found.CLEAN


@pytest.mark.root
def test_an_image_that_another_process_writes_is_not_served(image: Path) -> None:
    """Without locks: what it writes would be in no bitmap. Nothing is taken: it can be served afterwards."""
    need_root()
    with holding(image, "r+b") as pid:
        with pytest.raises(ImageInUseError, match=f"process {pid} ") as caught:
            open_tracked(Vm("web1", image.parent), "vda", image, image.parent / "state")
        assert "Stop, unmount or detach" in caught.value.hint
    with holding(image, "rb"), _session(image) as vm:
        assert vm.disks["vda"].bitmaps


@pytest.mark.parametrize("magic", [b"LUKS\xba\xbe", b"QFI\xfb\0\0\0\3", b"conectix"])
def test_what_a_guest_has_written_to_its_raw_disk_is_its_own_business(tmp_path: Path, magic: bytes) -> None:
    made = raw_image(tmp_path / "vda.img", SIZE, magic)
    with _session(made) as vm:
        assert vm.disks["vda"].disk.size == SIZE


def test_an_image_of_another_format_is_not_served(tmp_path: Path) -> None:
    made = raw_image(tmp_path / "vda.img", SIZE, b"QFI\xfb\0\0\0\3")
    remember_format(tmp_path / "state", "web1", "vda", made, "qcow2")
    with pytest.raises(FormatError, match=r"vda\.img was a qcow2 image in .*, and only raw ones are served"):
        open_tracked(Vm("web1", tmp_path), "vda", made, tmp_path / "state")
    named = raw_image(tmp_path / "vdb.qcow2", SIZE, b"QFI\xfb\0\0\0\3")
    with pytest.raises(FormatError, match=r"vdb\.qcow2 is a qcow2 image"):
        open_tracked(Vm("web1", tmp_path), "vdb", named, tmp_path / "state")


def test_a_write_in_the_same_tick_as_the_clean_end_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint is taken when the clock has gone past the image's times: here a file system of whole seconds."""
    image = raw_image(tmp_path / "vda.raw", SIZE)
    coarse = lambda *args: _in_seconds(take(*args))  # noqa: E731
    monkeypatch.setattr(file, "take", coarse)
    tracked = open_tracked(Vm("web1", tmp_path), "vda", image, tmp_path / "state")
    assert tracked.store
    tracked.bitmaps["b"] = tracked.store.create("b", SIZE, GRAIN, tracked.disk.fingerprint())
    os.utime(image)
    assert close_tracked(tracked, 5)
    os.utime(image)  # what a write does
    tracked = open_tracked(Vm("web1", tmp_path), "vda", image, tmp_path / "state")
    assert "b" not in tracked.bitmaps
    close_tracked(tracked, 5)


def _in_seconds(found: Fingerprint) -> Fingerprint:
    second = 10**9
    return found._replace(mtime_ns=found.mtime_ns // second * second, ctime_ns=found.ctime_ns // second * second)


def test_an_image_that_is_written_all_the_time_is_not_closed_cleanly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = raw_image(tmp_path / "vda.raw", SIZE)
    tracked = open_tracked(Vm("web1", tmp_path), "vda", image, tmp_path / "state")
    assert tracked.store
    tracked.bitmaps["b"] = tracked.store.create("b", SIZE, GRAIN, tracked.disk.fingerprint())
    monkeypatch.setattr(settle, "may_repeat", lambda *_: True)
    monkeypatch.setattr(settle, "SETTLE_SECONDS", 0.01)
    assert not close_tracked(tracked, 5)
    tracked = open_tracked(Vm("web1", tmp_path), "vda", image, tmp_path / "state")
    assert isinstance(bitmap := tracked.bitmaps["b"], Bitmap)
    assert bitmap.found is Found.RECOVERED
    close_tracked(tracked, 5)

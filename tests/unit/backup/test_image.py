"""The engine of an image that is off."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from incbak import device
from incbak.bitmap.look import views_in
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import FileDisk, open_disk
from incbak.engine.base import DiskPlan
from incbak.engine.image import ImageEngine
from incbak.errors import ImageChangedError
from incbak.reasons import Reason
from tests.kit.devices import loop_device
from tests.kit.serve import raw_image

SIZE = 5 * 65536


class _Target:
    """Takes everything; ``steps`` has what came, flushes of the image too."""

    def __init__(self, steps: list[str]) -> None:
        self.size, self.steps = SIZE, steps

    def write(self, offset: int, view: memoryview, *, owned: bool = False) -> None:
        self.steps.append("write")

    def write_zeroes(self, offset: int, length: int) -> None:
        self.steps.append("zeroes")

    def flush(self) -> None:
        self.steps.append("target flushed")


@pytest.mark.parametrize("works", [True, False])
def test_the_image_is_on_its_disk_before_the_copy_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, works: bool
) -> None:
    """A VM that was killed leaves writes in the page cache: a power cut would undo what the backup has."""
    steps: list[str] = []

    def flush(_disk: FileDisk) -> None:
        steps.append("image flushed")
        if not works:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(FileDisk, "flush", flush)
    engine = ImageEngine(raw_image(tmp_path / "disk.raw", SIZE, b"x"), tmp_path / "state", "vm", None)

    async def run() -> str | None:
        (disk,) = (await engine.describe()).disks
        plan = DiskPlan(disk, "incbak-00000000-11111111", 65536)
        result = await engine.run([plan], {disk.name: _Target(steps)}, lambda *_: None)  # type: ignore[dict-item]
        await engine.close()
        return result.disks[disk.name].error

    error = asyncio.run(run())
    assert steps[-1] == "image flushed"
    assert "write" in steps
    assert (error is None) is works


async def _copied(image: Path, state: Path, *, ignore_ctime: bool = False) -> ImageEngine:
    """An engine whose copy has ended."""
    engine = ImageEngine(image, state, "vm", None, ignore_ctime=ignore_ctime)
    (disk,) = (await engine.describe()).disks
    plan = DiskPlan(disk, "incbak-00000000-11111111", 65536)
    await engine.run([plan], {disk.name: _Target([])}, lambda *_: None)  # type: ignore[dict-item]
    return engine


def _write(image: Path) -> None:
    before = image.stat()
    with image.open("r+b") as f:
        f.seek(70_000)
        f.write(b"another program")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def _write_and_mode(image: Path) -> None:
    _write(image)
    image.chmod(0o640)


def _replace(image: Path) -> None:
    image.with_name("copy").write_bytes(image.read_bytes())
    image.with_name("copy").rename(image)


@pytest.mark.parametrize("how", [_write, _write_and_mode, _replace, None])
def test_another_program_writes_while_the_image_is_read(tmp_path: Path, how: Callable[[Path], None] | None) -> None:
    """One that takes no locks, and dates it back or renames another file to it: the run fails before its commit."""
    image = raw_image(tmp_path / "disk.raw", SIZE, b"x")

    async def run() -> None:
        engine = await _copied(image, tmp_path / "state")
        try:
            if how:
                how(image)
            await engine.confirm()
        finally:
            await engine.close()

    if how:
        with pytest.raises(ImageChangedError, match=r"another program .* while it was read"):
            asyncio.run(run())
    else:
        asyncio.run(run())


def test_what_was_written_meanwhile_is_not_taken_for_seen(tmp_path: Path) -> None:
    """Also between the last look and the close: the bitmap is closed as of the state that was read."""
    image = raw_image(tmp_path / "disk.raw", SIZE, b"x")

    async def run() -> None:
        engine = await _copied(image, tmp_path / "state")
        await engine.confirm()
        _write(image)
        await engine.close()

    asyncio.run(run())
    disk, store = open_disk(image), BitmapStore(tmp_path / "state", "vm", "disk0")
    store.lock()
    assert store.open("incbak-00000000-11111111", disk.fingerprint()) is Reason.DISK_CHANGED
    store.unlock()
    disk.close()


@pytest.mark.parametrize("ignored", [True, False])
def test_a_mode_that_was_changed_since(tmp_path: Path, ignored: bool) -> None:
    """It moves the ctime, as a write that was dated back does; the owner may say that nothing else does."""
    image = raw_image(tmp_path / "disk.raw", SIZE, b"x")

    async def run() -> None:
        engine = await _copied(image, tmp_path / "state", ignore_ctime=ignored)
        await engine.confirm()
        await engine.close()

    asyncio.run(run())
    image.chmod(0o640)
    (found,) = views_in(tmp_path / "state" / "vm" / "disk0")
    assert found.reason is (None if ignored else Reason.UNPROVEN)


def test_a_device_that_tells_nothing_is_backed_up_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not known whether it was written meanwhile: that is not "written"; nor is it "unchanged" the next time."""
    image = raw_image(tmp_path / "disk.raw", SIZE, b"x")
    with loop_device(image) as loop:
        monkeypatch.setattr(device, "writes", lambda _: "")

        async def run() -> Reason | None:
            engine = await _copied(loop, tmp_path / "state")
            await engine.confirm()
            await engine.close()
            engine = ImageEngine(loop, tmp_path / "state", "vm", "disk0")
            (disk,) = (await engine.describe()).disks
            await engine.close()
            return disk.bitmaps[0].reason

        assert asyncio.run(run()) is Reason.UNPROVEN

"""The engine of an image that is off."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import pytest

from incbak.disk.file import FileDisk
from incbak.engine.base import DiskPlan
from incbak.engine.image import ImageEngine
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

"""Looking at a bitmap and opening it are one judgement; looking changes nothing."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import Callable

import numpy as np
import pytest
from click.testing import CliRunner

from incbak.bitmap import body
from incbak.bitmap import format as fmt
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import REGION
from incbak.bitmap.identity import read_identity
from incbak.bitmap.store import get_dirty_blocks, invalidate, view
from incbak.cli.main import cli
from incbak.engine.base import EngineDisk
from incbak.engine.image import ImageEngine
from incbak.errors import BitmapError
from incbak.fingerprint import Beat, of_content, take_path
from incbak.reasons import Reason
from tests.unit.bitmap.scene import CLUSTER, NAME, SIZE, Scene, clusters

S = 10**9


def _clean(scene: Scene) -> None:
    scene.clean((5000, 10), (REGION + 5000, 10))


def _killed(scene: Scene) -> None:
    bitmap = scene.create()
    scene.write(bitmap, (5000, 12), (REGION + 5000, 12))
    bitmap.close(None)


def _power_cut(scene: Scene) -> None:
    _killed(scene)
    scene.reboot()


def _changed(scene: Scene) -> None:
    _clean(scene)
    os.utime(scene.image, ns=(1, 1))


def _put_back(scene: Scene) -> None:
    _killed(scene)
    bitmap = Bitmap(scene.path, _slot(scene), Found.RECOVERED, State.DIRTY)
    bitmap.heartbeat(Beat(time.time_ns() - 5 * S))
    bitmap.close(None)
    os.utime(scene.image, ns=(1, 1))


def _slot(scene: Scene) -> fmt.Slot:
    slot, _both = fmt.newest(scene.path.read_bytes())
    assert isinstance(slot, fmt.Slot)
    return slot


def _rotten(scene: Scene) -> None:
    _clean(scene)
    scene.poke(fmt.HEADER, b"\x40")


def _torn(scene: Scene) -> None:
    _clean(scene)
    scene.poke(100, b"\xff\0\xff")


def _replaced(scene: Scene) -> None:
    _clean(scene)
    other = scene.image.with_name("other")
    with other.open("wb") as f:
        f.truncate(SIZE)
    other.rename(scene.image)


def _bad_map(scene: Scene) -> None:
    _killed(scene)
    scene.poke(fmt.layout(_slot(scene))[1], b"\0")


def _invalidated(scene: Scene) -> None:
    _clean(scene)
    scene.store.unlock()
    invalidate(scene.state, "vm", "disk", NAME)
    scene.store.lock()


WAYS = [
    (_clean, Found.CLEAN),
    (_killed, Found.RECOVERED),
    (_power_cut, Found.COARSE),
    (_changed, Reason.DISK_CHANGED),
    (_put_back, Reason.DISK_CHANGED),
    (_rotten, Reason.DIGEST),
    (_torn, Reason.HEADER),
    (_replaced, Reason.DISK_CHANGED),
    (_bad_map, Reason.COARSE_MAP),
    (_invalidated, Reason.INVALIDATED),
]


@pytest.mark.parametrize(("way", "expected"), WAYS)
def test_the_look_is_what_the_next_owner_finds(
    scene: Scene, way: Callable[[Scene], None], expected: Found | Reason
) -> None:
    """Verdict and extents; the file and its neighbours are as before."""
    way(scene)
    scene.store.unlock()
    before = {p: p.read_bytes() for p in scene.store.directory.iterdir()}
    seen = view(scene.state, "vm", "disk", NAME)
    extents = seen.extents() if seen.reason is None else None
    if seen.slot and extents is not None:
        marked = ~seen.clean_mask()(0, seen.slot.clusters)
        assert set(np.flatnonzero(marked).tolist()) == clusters(*extents)
    assert {p: p.read_bytes() for p in scene.store.directory.iterdir()} == before
    assert (seen.reason or seen.found) is expected
    scene.store.lock()
    opened = scene.open()
    if isinstance(opened, Bitmap):
        assert (opened.found, opened.extents()) == (expected, extents)
        opened.close(None)
    else:
        assert opened is expected


@pytest.mark.parametrize(("way", "expected"), [w for w in WAYS if isinstance(w[1], Reason)])
def test_there_are_no_extents_of_what_is_not_believed(
    scene: Scene, way: Callable[[Scene], None], expected: Reason
) -> None:
    """``getDirtyBlocks`` raises with the reason, and the command fails."""
    way(scene)
    scene.store.unlock()
    with pytest.raises(BitmapError) as raised:
        get_dirty_blocks(scene.state, "vm", "disk", NAME)
    assert raised.value.reason is expected
    ran = CliRunner().invoke(cli, ["--state-dir", str(scene.state), "bitmap", "dirty", "vm"])
    assert ran.exit_code == 1
    scene.store.lock()


def test_a_sector_that_cannot_be_read_is_an_error(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not a signal, also when it fails later than the look."""
    _clean(scene)
    scene.store.unlock()
    seen = view(scene.state, "vm", "disk", NAME)
    clean = seen.clean_mask()
    assert not clean(5000 // CLUSTER, 1)[0]

    def failing(fd: int, length: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(body.os, "pread", failing)
    for read in (seen.extents, seen.clean_mask(), clean):
        with pytest.raises(BitmapError, match="cannot be read: Input/output error"):
            read(*(() if read == seen.extents else (0, 1)))  # type: ignore[operator]
    scene.store.lock()


def test_an_image_that_is_not_there_shows_nothing(scene: Scene) -> None:
    """Nor one that is not known."""
    _clean(scene)
    scene.store.unlock()
    scene.image.rename(scene.image.with_name("elsewhere"))
    assert view(scene.state, "vm", "disk", NAME).reason is Reason.UNPROVEN
    scene.store.lock()


@pytest.mark.parametrize(("way", "expected"), WAYS)
def test_an_engine_that_looks_changes_nothing(
    scene: Scene, way: Callable[[Scene], None], expected: Found | Reason
) -> None:
    """``status`` beside another owner, or before the next one: that must find what it would have found."""
    way(scene)
    scene.store.unlock()
    before = {p: p.read_bytes() for p in scene.store.directory.iterdir()}

    async def look() -> EngineDisk:
        engine = ImageEngine(scene.image, scene.state, "vm", "disk", look=True)
        try:
            return (await engine.describe()).disks[0]
        finally:
            await engine.close()

    (bitmap,) = asyncio.run(look()).bitmaps
    assert {p: p.read_bytes() for p in scene.store.directory.iterdir()} == before
    if isinstance(expected, Reason):
        assert bitmap.trouble(CLUSTER) is expected
    else:
        assert (bitmap.trouble(CLUSTER), bitmap.found) == (None, expected.value)
        assert bitmap.count >= 2 * CLUSTER
    scene.store.lock()


def test_the_format_of_a_disk_stays_when_its_image_moves(scene: Scene) -> None:
    scene.store.note_image(scene.image, "qcow2")
    scene.store.note_image(scene.image.with_name("moved.img"))
    about = read_identity(scene.store.directory / "disk.json")
    assert about
    assert (about.image, about.format) == (str(scene.image.with_name("moved.img")), "qcow2")


@pytest.mark.parametrize(("form", "reason"), [("vmdk", None), ("", Reason.RESIZED)])
def test_of_an_image_of_another_format_the_disks_own_size_counts(
    scene: Scene, form: str, reason: Reason | None
) -> None:
    """As `watch` leaves it: the size is the disk's, and not that of the file."""
    with scene.image.open("ab") as f:
        f.write(b"x" * 512)
    found = of_content(take_path(scene.image, raw=False), SIZE)
    scene.store.create(NAME, SIZE, CLUSTER, found).close(found)
    scene.store.note_image(scene.image, form)
    scene.store.unlock()
    assert view(scene.state, "vm", "disk", NAME).reason is reason

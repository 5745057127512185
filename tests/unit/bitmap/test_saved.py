"""A file for a bitmap that QEMU has kept: there at once and whole, or as it was before."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from incbak import durable
from incbak.bitmap import bits as kernels
from incbak.bitmap.file import Bitmap, Found
from incbak.bitmap.format import REGION
from incbak.bitmap.saved import write_clean
from incbak.errors import IncbakError
from incbak.reasons import Reason
from tests.unit.bitmap.scene import CLUSTER, NAME, SIZE, Scene, clusters, dirty, regions

POINTS = ("saved.filled", "bitmap.close-bits", "bitmap.close-first-slot", "bitmap.close-second-slot", "saved.closed")
NAMED = ("durable.named:2", "durable.dir-synced:2", "saved.named")
WRITES = [(0, 1), (3 * REGION - CLUSTER, 2 * CLUSTER), (SIZE - 1, 1)]
_SAVE = """
import sys
from pathlib import Path
import numpy as np
from incbak.bitmap.saved import write_clean
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk

store = BitmapStore(Path(sys.argv[1]), "vm", "disk")
store.lock()
disk = open_disk(Path(sys.argv[2]), read_only=True)
bits = np.frombuffer(bytes.fromhex(sys.argv[5]), np.uint8)
write_clean(store, sys.argv[3], int(sys.argv[4]), bits, disk.fingerprint())
"""


def bits_of(*ranges: tuple[int, int]) -> kernels.Bits:
    """A bitmap in which these bytes are dirty."""
    bits = np.zeros(kernels.bytes_for(-(-SIZE // CLUSTER)), dtype=np.uint8)
    for offset, length in ranges:
        kernels.set_range(bits, offset // CLUSTER, (offset + length - 1) // CLUSTER)
    return bits


def save(scene: Scene, *ranges: tuple[int, int]) -> None:
    write_clean(scene.store, NAME, CLUSTER, bits_of(*ranges), scene.fingerprint())


def test_what_was_saved_is_found(scene: Scene) -> None:
    save(scene, *WRITES)
    bitmap = scene.opened()
    assert (bitmap.found, bitmap.enabled, dirty(bitmap)) == (Found.CLEAN, True, clusters(*WRITES))
    bitmap.close(None)
    assert [p.name for p in scene.store.directory.iterdir() if p.name.endswith(".tmp")] == []


def test_an_empty_one_is_one(scene: Scene) -> None:
    save(scene)
    assert dirty(scene.opened()) == set()


def test_after_a_power_cut_all_touched_regions_are_dirty(scene: Scene) -> None:
    """The coarse map is filled as well: the next owner may lose its host before it has marked anything."""
    save(scene, (0, 1), (2 * REGION - 1, 2))
    bitmap = scene.opened()
    bitmap.mark(REGION * 4, 1)
    bitmap.close(None)
    scene.reboot()
    assert dirty(scene.opened()) >= regions(0, 1, 2)


def test_the_image_must_be_the_one_that_was_saved(scene: Scene) -> None:
    save(scene, *WRITES)
    with scene.image.open("r+b") as f:
        f.seek(CLUSTER)
        f.write(b"x")
    assert scene.open() is Reason.DISK_CHANGED


def run(scene: Scene, point: str) -> None:
    """Save in a process that is killed at ``point``."""
    command = [
        sys.executable,
        "-c",
        _SAVE,
        scene.state,
        scene.image,
        NAME,
        str(CLUSTER),
        bits_of(*WRITES).tobytes().hex(),
    ]
    scene.store.unlock()
    child = subprocess.run(command, env={**os.environ, "INCBAK_CRASH_AT": point}, timeout=60, check=False)
    assert child.returncode == -signal.SIGKILL
    scene.store.lock()


@pytest.mark.parametrize("point", [*POINTS, *NAMED])
def test_killed_anywhere_the_old_file_or_the_new_is_there(scene: Scene, point: str) -> None:
    """The old one is invalid, as watch has made it before the guest ran."""
    scene.clean((CLUSTER, 1))
    scene.store.give_up(NAME, Reason.UNSAVED)
    run(scene, point)
    found = scene.open()
    if point in NAMED:
        assert isinstance(found, Bitmap)
        assert dirty(found) == clusters(*WRITES)
    else:
        assert found is Reason.UNSAVED
    assert [p.name for p in scene.store.directory.iterdir() if p.name.endswith(".tmp")] == []


@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_there_is_no_file_or_the_new(scene: Scene, point: str) -> None:
    run(scene, point)
    assert not scene.path.exists()


def test_it_has_its_name_when_it_is_durable(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits, then the flag, then the name, each synced before the next."""
    seen: list[str] = []
    monkeypatch.setattr(durable, "crash_point", seen.append)
    save(scene, *WRITES)
    steps = [p for p in seen if p in {*POINTS, "durable.sync", "durable.synced", "durable.named", "durable.dir-synced"}]
    created, rest = steps[: steps.index("saved.filled")], steps[steps.index("saved.filled") :]
    assert created == ["durable.synced", "durable.named", "durable.dir-synced"]
    assert rest == [
        "saved.filled", "durable.sync", "bitmap.close-bits", "durable.sync", "bitmap.close-first-slot",
        "durable.sync", "bitmap.close-second-slot", "saved.closed",
        "durable.synced", "durable.named", "durable.dir-synced",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["durable.sync:1:EIO", "durable.sync:3:EIO", "durable.written:2:ENOSPC"])
def test_what_cannot_be_saved_changes_nothing(scene: Scene, fault: str) -> None:
    scene.clean((CLUSTER, 1))
    scene.store.give_up(NAME, Reason.UNSAVED)
    before = scene.path.read_bytes()
    durable.arm(fault_at=fault)
    with pytest.raises(IncbakError):
        save(scene, *WRITES)
    durable.arm()
    assert scene.path.read_bytes() == before
    assert [p.name for p in scene.store.directory.iterdir() if p.name.endswith(".tmp")] == []


def test_names_are_never_paths(scene: Scene) -> None:
    with pytest.raises(IncbakError):
        write_clean(scene.store, "", CLUSTER, bits_of(), scene.fingerprint())
    write_clean(scene.store, "../x", CLUSTER, bits_of(), scene.fingerprint())
    assert not Path(scene.store.directory.parent, "x.bitmap").exists()
    assert scene.store.names() == ["../x"]

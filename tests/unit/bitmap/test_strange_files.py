"""What can lie in a state directory and is not ours, or not as we left it: harmless to what lies beside it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from incbak.bitmap import format as fmt
from incbak.bitmap.disown import disown
from incbak.bitmap.store import BitmapStore, component, views
from incbak.errors import UsageError
from incbak.reasons import Reason
from tests.unit.bitmap.scene import NAME, Scene


def test_a_sequence_at_the_end_of_its_range_is_not_believed(scene: Scene) -> None:
    """Else it could not be counted up, and the bitmap not be invalidated."""
    scene.clean((0, 4096))
    with scene.path.open("r+b") as f:
        slot = fmt.decode(f.read(fmt.SECTOR))
        assert isinstance(slot, fmt.Slot)
        sector = fmt.encode(replace(slot, sequence=(1 << 64) - 1))
        f.seek(0)
        f.write(sector + sector)
    assert scene.open() is Reason.HEADER
    scene.store.give_up(NAME, Reason.INVALIDATED)
    assert scene.open() is Reason.HEADER


@pytest.mark.parametrize("identity", [b'{"uuid":"x","more":' + b"[" * 100_000, b"[" * 100_000, b"", b"\xff{}"])
def test_an_identity_that_cannot_be_read_is_made_anew(scene: Scene, identity: bytes) -> None:
    """Then the disk is another one, and the bitmap not of it."""
    scene.clean((0, 4096))
    scene.store.unlock()
    (scene.store.directory / "disk.json").write_bytes(identity)
    assert disown(scene.state, scene.image) == []
    scene.store.lock()
    assert scene.open() is Reason.WRONG_DISK


def test_an_image_path_that_can_be_none(scene: Scene) -> None:
    scene.clean((0, 4096))
    scene.store.unlock()
    identity = b'{"uuid":"6f1e8d3a-5b0c-4f6e-9a4d-2c7b1e0f9a55","image":"/a\\u0000b"}'
    (scene.store.directory / "disk.json").write_bytes(identity)
    assert disown(scene.state, scene.image) == []
    scene.store.lock()
    assert scene.open() is Reason.WRONG_DISK


@pytest.mark.parametrize(
    "name", [b"\xff.bitmap", b"%2f..bitmap", b"%zz%.bitmap", b"x" * 200 + b".bitmap", b"a b.bitmap"]
)
def test_files_with_names_that_we_do_not_give_are_passed_over(scene: Scene, name: bytes) -> None:
    scene.clean((0, 4096))
    Path(os.fsdecode(bytes(scene.store.directory) + b"/" + name)).write_bytes(b"")
    for folder in (b"\xff", b"a b"):
        strange = Path(os.fsdecode(bytes(scene.state) + b"/" + folder)) / "disk"
        strange.mkdir(parents=True)
        (strange / "b.bitmap").write_bytes(b"")
    assert scene.store.names() == [NAME]
    assert [v.name for v in views(scene.state)] == [NAME]
    good, bad = scene.store.open_all(scene.fingerprint())
    assert ([b.name for b in good], bad) == ([NAME], {})
    good[0].close(None)


@pytest.mark.parametrize("name", ["", "x" * 129, "\udcff"])
def test_what_is_no_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="not a name"):
        component(name)
    with pytest.raises(UsageError, match="not a name"):
        BitmapStore(tmp_path, name, "disk")

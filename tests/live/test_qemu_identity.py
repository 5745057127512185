"""Disks of a running QEMU whose images are exchanged or resized between two backups. No guest is booted."""

from __future__ import annotations

import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kit.cli import Incbak, differing
from tests.kit.guest import Guest, GuestDisk
from tests.kit.live import content_of, ours_in, qcow2_image
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SIZE = 4 << 20


def _filled(path: Path, byte: int) -> Path:
    qcow2_image(path, SIZE)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", f"write -P {byte} 0 {SIZE}", path], check=True, capture_output=True)
    return path


def _reasons(incbak: Incbak) -> list[str | None]:
    return [disk["reason"] for disk in incbak.list()[-1]["disks"]]


def _start(stack: ExitStack, root: Path, *images: Path) -> Guest:
    """A VM whose disks are called vda, vdb, ... in the order of ``images``."""
    disks = [GuestDisk(f"vd{letter}", image, format="qcow2") for letter, image in zip("abc", images, strict=False)]
    guest = Guest(root / f"guest-{images[0].stem}", disks, arguments=["-S"])
    stack.callback(guest.kill)
    return guest


@pytest.mark.parametrize("off", [False, True])
def test_images_that_are_exchanged(stack: ExitStack, tmp_path: Path, off: bool) -> None:
    """The bitmaps in both images are of the newest backup, but each of the other disk."""
    a, b = _filled(tmp_path / "a.qcow2", 1), _filled(tmp_path / "b.qcow2", 2)
    incbak = Incbak(tmp_path)
    incbak("init")
    guest = _start(stack, tmp_path, a, b)
    incbak("full", f"qmp:{guest.monitor}", "--name", "vm")
    guest.quit()
    if off:
        incbak("incremental", b, "--name", "vm", "--disk", "vda-dev")
        assert _reasons(incbak) == ["wrong-disk"]
    else:
        incbak("incremental", f"qmp:{_start(stack, tmp_path, b, a).monitor}", "--name", "vm")
        assert _reasons(incbak) == ["disk-changed", "disk-changed"]
    assert differing(incbak.restored(disk="vda-dev"), content_of(b)) == []


def _reopen(guest: Guest, image: Path) -> None:
    """Give the node of vda another file; it keeps its bitmaps."""
    guest.qmp("blockdev-add", **{"driver": "file", "node-name": "other", "filename": str(image)})
    options = {"driver": "raw", "node-name": "vda", "file": "other", "discard": "unmap"}
    guest.qmp("blockdev-reopen", options=[options])


@pytest.mark.parametrize("same_name", [False, True])
def test_a_node_that_got_another_file(stack: ExitStack, tmp_path: Path, same_name: bool) -> None:
    """``blockdev-reopen``: whatever the file is called."""
    a, b = (raw_image(tmp_path / f"{name}.raw", SIZE, name.encode() * SIZE) for name in "ab")
    incbak = Incbak(tmp_path)
    incbak("init")
    guest = Guest(tmp_path / "guest", [GuestDisk("vda", a)], arguments=["-S"])
    stack.callback(guest.kill)
    incbak("full", f"qmp:{guest.monitor}", "--name", "vm")
    if same_name:
        b = b.rename(a)
    _reopen(guest, b)
    incbak("incremental", f"qmp:{guest.monitor}", "--name", "vm")
    assert _reasons(incbak) == ["disk-changed"]
    assert differing(incbak.restored(), content_of(b)) == []


def test_an_image_that_is_renamed_while_it_is_open(stack: ExitStack, tmp_path: Path) -> None:
    """It is still that image, and nothing is read again; under its old name there may be another one."""
    a, b = (raw_image(tmp_path / f"{name}.raw", SIZE, name.encode() * SIZE) for name in "ab")
    second = raw_image(tmp_path / "vdb.raw", SIZE)
    incbak = Incbak(tmp_path)
    incbak("init")
    guest = Guest(tmp_path / "guest", [GuestDisk("vda", a), GuestDisk("vdb", second)], arguments=["-S"])
    stack.callback(guest.kill)
    incbak("full", f"qmp:{guest.monitor}", "--name", "vm")
    moved = a.rename(tmp_path / "moved.raw")
    for _ in range(2):
        incbak("incremental", f"qmp:{guest.monitor}", "--name", "vm")
        assert _reasons(incbak) == [None, None]
        if not a.exists():
            b.rename(a)
    assert differing(incbak.restored(disk="vda-dev"), content_of(moved)) == []


def test_two_disks_of_one_file(stack: ExitStack, tmp_path: Path) -> None:
    """Without locks QEMU lets them; what is written to one of them is in no bitmap of the other."""
    image = raw_image(tmp_path / "a.raw", SIZE, b"a" * SIZE)
    incbak = Incbak(tmp_path)
    incbak("init")
    disks = [GuestDisk(name, image, node_options={"file": _without_locks(image)}) for name in ("vda", "vdb")]
    guest = Guest(tmp_path / "guest", disks, arguments=["-S"])
    stack.callback(guest.kill)
    ran = incbak.run("full", f"qmp:{guest.monitor}", "--name", "vm")
    assert ran.code == 2
    assert "disks vda-dev and vdb-dev have bytes in common" in ran.err
    assert ours_in(guest) == []


def _without_locks(image: Path) -> dict[str, str]:
    return {"driver": "file", "filename": str(image), "locking": "off"}


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_disk_that_was_shrunk_and_has_its_size_again(stack: ExitStack, tmp_path: Path, form: str) -> None:
    """What it has got back is zero now, and QEMU has not marked it. After that run, and one more, all is well again."""
    image = tmp_path / f"vda.{form}"
    _filled(image, 1) if form == "qcow2" else raw_image(image, SIZE, b"a" * SIZE)
    incbak = Incbak(tmp_path)
    incbak("init")
    guest = Guest(tmp_path / "guest", [GuestDisk("vda", image, format=form)], arguments=["-S"])
    stack.callback(guest.kill)
    incbak("full", f"qmp:{guest.monitor}", "--name", "vm")
    for size in (SIZE // 2, SIZE):
        guest.qmp("block_resize", **{"node-name": "vda", "size": size})
    for reasons in (["resized"], [None]):
        incbak("incremental", f"qmp:{guest.monitor}", "--name", "vm")
        assert _reasons(incbak) == reasons
        assert differing(incbak.restored(), content_of(image)) == []
    assert ours_in(guest) == []

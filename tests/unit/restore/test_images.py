"""Restore to a new qcow2 image, and onto an image that is there, where only what differs is written."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest

from incbak.disk.file import FileDisk, open_disk
from incbak.errors import DamagedError, DurabilityError, ImageInUseError, IncbakError, NbdError, RestoreError
from incbak.extents import whole_sectors
from incbak.restore import images
from incbak.restore.images import InPlaceTarget, Qcow2Target
from incbak.restore.restore import Restored, restore_disk
from incbak.restore.targets import NbdTarget, Target
from tests.kit.cli import Content, Incbak, content, differing
from tests.kit.need import need, need_root
from tests.kit.serve import raw_image, serving
from tests.unit.restore.conftest import CLUSTER, DATA, SIZE, Made


def _restore(made: Made, target: Target) -> Restored:
    return restore_disk(made.repo, made.record, made.disk, target)


def _plain(image: Path) -> Content:
    """What is in a qcow2 image, cut to the disk's size: QEMU counts in sectors."""
    raw = image.with_suffix(".plain")
    subprocess.run(["qemu-img", "check", "-q", image], check=True, timeout=60)
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw], check=True, timeout=60)
    os.truncate(raw, SIZE)
    return content(raw, CLUSTER)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Where a qcow2 image is to be, in a directory with nothing else."""
    need("qemu-img", "qemu-nbd")
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "disk.qcow2"


@pytest.mark.qemu
def test_a_qcow2_image_is_what_the_disk_was_and_small(made: Made, image: Path) -> None:
    _restore(made, Qcow2Target(image, SIZE, force=False))
    assert list(image.parent.iterdir()) == [image]
    assert image.stat().st_size < 2 * len(DATA) * CLUSTER + (1 << 20)
    assert differing(_plain(image), made.held) == []


@pytest.mark.qemu
def test_a_qcow2_image_that_is_there_is_replaced_only_by_force(made: Made, image: Path) -> None:
    image.write_bytes(b"mine")
    with pytest.raises(RestoreError, match="exists"):
        Qcow2Target(image, SIZE, force=False)
    assert image.read_bytes() == b"mine"
    _restore(made, Qcow2Target(image, SIZE, force=True))
    assert differing(_plain(image), made.held) == []


@pytest.mark.qemu
def test_nothing_stays_of_a_qcow2_image_that_cannot_be_made_whole(made: Made, image: Path) -> None:
    made.spoil(made.cluster(DATA[3]))
    with pytest.raises(DamagedError):
        _restore(made, Qcow2Target(image, SIZE, force=False))
    assert list(image.parent.iterdir()) == []


@pytest.mark.qemu
def test_a_qcow2_image_has_no_name_when_its_server_dies(made: Made, image: Path) -> None:
    target = Qcow2Target(image, SIZE, force=False)
    assert target._server
    target._server.kill()
    target._server.wait()
    with pytest.raises(IncbakError):
        _restore(made, target)
    assert list(image.parent.iterdir()) == []


@pytest.mark.qemu
def test_a_qcow2_image_is_made_through_the_open_file(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither of QEMU's tools is told the name, which may be another file's when they look."""
    told: list[str] = []
    start = subprocess.Popen.__init__

    def noted(self: object, argv: list[str], **more: object) -> None:
        told.extend(argv)
        start(self, argv, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(subprocess.Popen, "__init__", noted)
    Qcow2Target(image, SIZE, force=False).abandon()
    assert {"qemu-img", "qemu-nbd"} <= set(told)
    assert not [word for word in told if image.name in word]


@pytest.mark.qemu
def test_a_planted_image_gets_nothing_of_the_disk(made: Made, image: Path) -> None:
    """QEMU's tools write to the file that was created, whatever has its name by then."""
    (image.parent / "theirs").write_bytes(b"")
    target = Qcow2Target(image, SIZE, force=False)
    os.replace(image.parent / "theirs", image.with_name("disk.qcow2.incomplete"))
    with pytest.raises(DurabilityError, match="replaced by another process"):
        _restore(made, target)
    assert [(p.name, p.stat().st_size) for p in image.parent.iterdir()] == [("disk.qcow2.incomplete", 0)]


def test_in_place_only_what_differs_is_written(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = tmp_path / "there.raw"
    first = InPlaceTarget(raw_image(image, SIZE), SIZE)
    _restore(made, first)
    assert differing(content(image, CLUSTER), made.held) == []
    with image.open("r+b") as f:
        for offset in (DATA[1] * CLUSTER + 7, 10 * CLUSTER, SIZE - 1):  # other content, not zero, the odd tail
            os.pwrite(f.fileno(), b"!", offset)
    wrote: list[int] = []
    write = FileDisk.write
    monkeypatch.setattr(FileDisk, "write", lambda self, buf, at: (wrote.append(at), write(self, buf, at))[1])
    again = InPlaceTarget(image, SIZE)
    _restore(made, again)
    assert differing(content(image, CLUSTER), made.held) == []
    assert sorted(wrote) == [DATA[1] * CLUSTER, DATA[-1] * CLUSTER]
    assert again.changed == CLUSTER + SIZE % CLUSTER + min(CLUSTER, 65536)


def test_a_restore_in_place_that_fails_says_what_the_target_is_now(made: Made, tmp_path: Path) -> None:
    image = tmp_path / "vda.raw"
    made.spoil(made.cluster(5))
    with pytest.raises(DamagedError) as raised:
        _restore(made, InPlaceTarget(raw_image(image, SIZE), SIZE))
    assert "partly overwritten" in raised.value.hint
    with pytest.raises(DamagedError) as raised:
        _restore(made, Qcow2Target(tmp_path / "new.qcow2", SIZE, force=False))
    assert "Nothing was restored" in raised.value.hint


@pytest.mark.root
def test_a_qcow2_image_on_a_full_disk_is_named(made: Made, tmp_path: Path) -> None:
    """And not the server that writes it; nothing of it is left."""
    need_root()
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "incbak-test", where], check=True)
    try:
        (where / "fill").write_bytes(bytes(200 << 10))
        with pytest.raises(RestoreError, match=r"cannot write .*/x\.qcow2: .*No space left") as full:
            _restore(made, Qcow2Target(where / "x.qcow2", SIZE, force=False))
        assert full.value.hint.startswith("Free space")
        assert [p.name for p in where.iterdir()] == ["fill"]
    finally:
        subprocess.run(["umount", where], check=True)


def test_in_place_refuses_what_it_cannot_do_and_changes_nothing(tmp_path: Path) -> None:
    other = raw_image(tmp_path / "small.raw", SIZE - 512, b"mine")
    with pytest.raises(RestoreError, match=f"has {whole_sectors(SIZE) - 512} bytes"):
        InPlaceTarget(other, SIZE)
    qcow2 = raw_image(tmp_path / "disk.qcow2", SIZE, b"QFI\xfb")
    with pytest.raises(RestoreError, match="qcow2"):
        InPlaceTarget(qcow2, SIZE)
    InPlaceTarget(raw_image(tmp_path / "inner.img", SIZE, b"QFI\xfb"), SIZE).abandon()  # the guest's own
    with pytest.raises(RestoreError, match="not there"):
        InPlaceTarget(tmp_path / "missing.raw", SIZE)
    held = raw_image(tmp_path / "held.raw", SIZE)
    lock = open_disk(held)
    with pytest.raises(ImageInUseError):
        InPlaceTarget(held, SIZE)
    lock.close()


def test_in_place_refuses_an_image_that_is_open_without_locks(tmp_path: Path) -> None:
    image = raw_image(tmp_path / "there.raw", SIZE)
    with image.open("rb") as f, subprocess.Popen(["sleep", "60"], stdin=f) as other:
        with pytest.raises(ImageInUseError, match=f"process {other.pid} "):
            InPlaceTarget(image, SIZE)
        other.kill()
    InPlaceTarget(image, SIZE).abandon()


def test_in_place_is_synced_before_it_is_said_to_be_done(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: FileDisk) -> None:
        raise OSError(errno.EIO, "gone")

    monkeypatch.setattr(FileDisk, "flush", failing)
    with pytest.raises(DurabilityError):
        _restore(made, InPlaceTarget(raw_image(tmp_path / "there.raw", SIZE), SIZE))


def test_an_image_restored_in_place_loses_its_bitmaps(tmp_path: Path) -> None:
    incbak = Incbak(tmp_path)
    incbak("init")
    image = raw_image(tmp_path / "web1.raw", 1 << 20, b"one" * 40000)
    incbak("full", image)
    with image.open("r+b") as f:
        f.write(b"two")
    (before,) = incbak("--json", "incremental", image).objects()
    first = incbak.list()[0]["id"]
    said = incbak("restore", first, image, "--in-place").out
    assert "64.0 KiB of" in said
    assert before["disks"][0]["bitmap"] in said
    with serving(tmp_path, {"disk0": image}, "--name", "web1") as serve:
        (after,) = incbak("--json", "incremental", f"qmp:{serve.monitor}").objects()
    assert after["disks"][0]["reason"] == "disk-changed"
    assert after["disks"][0]["root"] == incbak.list()[0]["disks"][0]["root"]
    assert incbak.run("restore", first, image, "--in-place", "--format", "qcow2").code == 2


@pytest.mark.qemu
def test_a_server_whose_socket_is_bound_and_does_not_listen_yet_is_waited_for(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def late(uri: str, size: int) -> NbdTarget:
        tried.append(uri)
        if len(tried) < 3:
            raise NbdError("cannot connect") from ConnectionRefusedError()
        return NbdTarget(uri, size)

    monkeypatch.setattr(images, "NbdTarget", late)
    Qcow2Target(image, SIZE, force=False).abandon()
    assert len(tried) == 3

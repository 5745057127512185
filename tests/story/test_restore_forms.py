"""What ``restore`` makes of TARGET: the format that its name or the option says, a stream, or nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from incbak.cli.restore import form_of
from incbak.disk.file import probe_format
from incbak.errors import UsageError
from tests.kit.cli import Incbak
from tests.kit.need import need
from tests.unit.restore.conftest import SIZE, Made, _original, made  # noqa: F401 - fixtures


@pytest.fixture
def incbak(made: Made) -> Incbak:  # noqa: F811
    return Incbak(made.repo.storage.root.parent)


def _whole(made: Made) -> bytes:  # noqa: F811
    data = bytearray(SIZE)
    for at, piece in made.held.items():
        if at >= 0:
            data[at : at + len(piece)] = piece
    return bytes(data)


@pytest.mark.parametrize(
    ("target", "form", "in_place", "expected"),
    [
        ("x.qcow2", None, False, "qcow2"),
        ("X.QCOW2", None, False, "qcow2"),
        ("x", "qcow2", False, "qcow2"),
        ("x.img", "qcow2", False, "qcow2"),
        ("x.img", None, False, "raw"),
        ("x.raw", "raw", False, "raw"),
        ("-", None, False, "raw"),
        ("nbd://host/x.qcow2", None, False, "raw"),
        ("x.qcow2", "raw", True, "raw"),
        ("x.raw", None, True, "raw"),
    ],
)
def test_the_format_follows_the_name_or_the_option(
    target: str, form: str | None, in_place: bool, expected: str
) -> None:
    assert form_of(target, form, in_place=in_place) == expected


@pytest.mark.parametrize(
    ("target", "form", "in_place", "said"),
    [
        ("x.qcow2", "raw", False, "contradicts"),
        ("x.raw", "qcow2", False, "contradicts"),
        ("x.vmdk", None, False, "vmdk images cannot be made"),
        ("x.VHDX", "raw", False, "vhdx images cannot be made"),
        ("nbd+unix:///x?socket=s", "qcow2", False, "is an NBD export"),
        ("x.qcow2", None, True, "is named qcow2"),
    ],
)
def test_what_contradicts_its_name_is_refused(target: str, form: str | None, in_place: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        form_of(target, form, in_place=in_place)


@pytest.mark.qemu
def test_a_name_that_ends_in_qcow2_gets_such_an_image(incbak: Incbak, tmp_path: Path) -> None:
    need("qemu-img", "qemu-nbd")
    incbak("restore", "latest", tmp_path / "x.qcow2")
    assert probe_format(tmp_path / "x.qcow2") == "qcow2"
    incbak("restore", "latest", tmp_path / "x.raw")
    assert (tmp_path / "x.raw").stat().st_size == SIZE
    subprocess.run(["qemu-img", "compare", "-q", tmp_path / "x.qcow2", tmp_path / "x.raw"], check=True, timeout=60)


@pytest.mark.qemu
@pytest.mark.parametrize("name", ["x" * 100, "a&b=c%41+d e"], ids=["long", "strange"])
def test_qcow2_images_whatever_tmpdir_is(incbak: Incbak, tmp_path: Path, name: str) -> None:
    """Sockets of QEMU's tools go below it where they can, whose paths are short, and part of URIs."""
    need("qemu-img", "qemu-nbd", "qemu-storage-daemon")
    (tmp_path / name).mkdir()
    env = {"TMPDIR": str(tmp_path / name)}
    incbak("restore", "latest", tmp_path / "x.qcow2", env=env)
    incbak("full", tmp_path / "x.qcow2", "--name", "x", env=env)
    assert list((tmp_path / name).iterdir()) == []


def test_a_mistyped_device_is_not_filled(incbak: Incbak) -> None:
    ran = incbak.run("restore", "latest", "/dev/incbak-no-such-disk")
    assert (ran.code, "nothing is made below /dev" in ran.err, "lsblk" in ran.err) == (2, True, True)
    assert not Path("/dev/incbak-no-such-disk").exists()
    assert not Path("/dev/incbak-no-such-disk.incomplete").exists()
    for argv in (("init", "-r", "/dev/incbak-no-such"), ("restore", "latest", "--all", "/dev/incbak-no-such")):
        assert incbak.run(*argv).code == 2
    assert not Path("/dev/incbak-no-such").exists()


def _streamed(incbak: Incbak, to: Path) -> tuple[int, str, bytes]:
    with to.open("wb") as out:
        process = incbak.popen("restore", "latest", "-", stdout=out, cwd=to.parent)
        _, err = process.communicate(timeout=60)
    return process.returncode, err, to.read_bytes()


def test_a_disk_is_streamed_to_standard_output(incbak: Incbak, made: Made, tmp_path: Path) -> None:  # noqa: F811
    """Every byte in its order, nothing else among them, and no file of that name."""
    code, err, out = _streamed(incbak, tmp_path / "out")
    assert (code, "is on standard output" in err) == (0, True), err
    assert out == _whole(made)
    assert not (tmp_path / "-").exists()


def test_a_stream_ends_where_the_backup_is_damaged(incbak: Incbak, made: Made, tmp_path: Path) -> None:  # noqa: F811
    """What was verified is out, and nothing after it."""
    made.spoil(made.cluster(5))
    code, err, out = _streamed(incbak, tmp_path / "out")
    assert (code, "cluster 5" in err) == (13, True), err
    assert _whole(made).startswith(out)
    assert 0 < len(out) < SIZE


@pytest.mark.parametrize("option", ["--json", "--force", "--in-place", "--salvage", "--all", "--format=qcow2"])
def test_what_a_stream_cannot_do_is_refused(incbak: Incbak, option: str) -> None:
    ran = incbak.run("restore", "latest", "-", option)
    assert (ran.code, ran.out) == (2, "")
    assert "standard output" in ran.err


def test_a_reader_that_goes_away_fails_the_stream(incbak: Incbak) -> None:
    reader, writer = os.pipe()
    process = incbak.popen("restore", "latest", "-", stdout=writer)
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (1, False)
    assert "whoever read standard output has gone" in err

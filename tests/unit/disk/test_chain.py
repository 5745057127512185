"""What belongs to a qcow2 image: only files that are allowed, of a format that is said, and nothing by a protocol."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from incbak.disk.chain import Allowed, Layer, read_chain
from incbak.errors import DiskError
from tests.kit.devices import loop_device
from tests.unit.disk.test_qcow2 import BACKING_FORMAT, DATA_FILE, header


def image(path: Path, backing: str = "", form: str = "qcow2", data: str = "") -> Path:
    extensions = [(BACKING_FORMAT, form.encode())] if form and backing else []
    extensions += [(DATA_FILE, data.encode())] if data else []
    path.write_bytes(header(*extensions, features=4 if data else 0, backing=backing.encode()))
    return path


def test_a_chain_beside_the_image(tmp_path: Path) -> None:
    (tmp_path / "d.raw").write_bytes(b"")
    (tmp_path / "base.img").write_bytes(b"QFI\xfb")  # raw, whatever is in it
    image(tmp_path / "mid", "base.img", "raw")
    top = image(tmp_path / "top", str(tmp_path / "mid"), data="d.raw")
    assert read_chain(top, Allowed()) == [
        Layer(top, "qcow2", tmp_path / "d.raw"),
        Layer(tmp_path / "mid", "qcow2"),
        Layer(tmp_path / "base.img", "raw"),
    ]


def test_devices_of_a_chain_are_read_from_their_storage(tmp_path: Path) -> None:
    """Another program that reads the device keeps its cache, and what was written below does not show there."""
    top = image(tmp_path / "top")
    with top.open("r+b") as below:
        below.truncate(1 << 20)
        with loop_device(top) as device, device.open("rb") as reader:
            reader.read()
            below.seek(1 << 19)
            below.write(b"new")
            below.flush()
            os.fsync(below.fileno())
            assert read_chain(device, Allowed()) == [Layer(device, "qcow2")]
            assert device.read_bytes()[1 << 19 :][:3] == b"new"


@pytest.mark.parametrize("what", ["backing", "data"])
@pytest.mark.parametrize("name", ["../secret", "{root}/secret", "link"])
def test_a_file_elsewhere_is_read_only_if_it_is_allowed(tmp_path: Path, what: str, name: str) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "secret").write_bytes(b"root:x")
    (tmp_path / "vm/link").symlink_to(tmp_path / "secret")
    name = name.format(root=tmp_path)
    top = image(tmp_path / "vm/top", name, "raw") if what == "backing" else image(tmp_path / "vm/top", data=name)
    with pytest.raises(DiskError, match=r"names a .* file that is not allowed") as caught:
        read_chain(top, Allowed())
    assert caught.value.hint == f"If it belongs to the disk, allow it: --allow-backing {tmp_path}/secret"
    for allowed in (tmp_path, tmp_path / "secret"):
        assert read_chain(top, Allowed([allowed]))
    with pytest.raises(DiskError, match="not allowed"):
        read_chain(top, Allowed([tmp_path / "secre"]))


def test_of_a_guessed_format_nothing_else_is_read(tmp_path: Path) -> None:
    (tmp_path / "neighbour").write_bytes(b"")
    with pytest.raises(DiskError, match="not allowed"):
        read_chain(image(tmp_path / "top", "neighbour", "raw"), Allowed(beside=False))


@pytest.mark.parametrize("name", ["json:{}", "nbd://host/x", "https://host/x", "file:base", "fat:rw:/etc", "ssh:x"])
@pytest.mark.parametrize("what", ["backing", "data"])
def test_no_protocol_is_followed(tmp_path: Path, name: str, what: str) -> None:
    top = image(tmp_path / "top", name, "raw") if what == "backing" else image(tmp_path / "top", data=name)
    with pytest.raises(DiskError, match="that is no path"):
        read_chain(top, Allowed([Path("/")]))


@pytest.mark.parametrize(("form", "said"), [("", "without saying its format"), ("vmdk", "of the format vmdk")])
def test_the_format_of_a_backing_file_is_not_guessed(tmp_path: Path, form: str, said: str) -> None:
    image(tmp_path / "base")
    with pytest.raises(DiskError, match=said) as caught:
        read_chain(image(tmp_path / "top", "base", form), Allowed())
    assert "qemu-img rebase -u" in caught.value.hint


def test_loops_and_what_is_no_file(tmp_path: Path) -> None:
    image(tmp_path / "a", "b")
    image(tmp_path / "b", "a")
    with pytest.raises(DiskError, match="its own backing file"):
        read_chain(tmp_path / "a", Allowed())
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DiskError, match="neither a file nor"):
        read_chain(image(tmp_path / "top", "fifo", "raw"), Allowed())
    with pytest.raises(DiskError, match="cannot look at"):
        read_chain(image(tmp_path / "top", "missing", "raw"), Allowed())

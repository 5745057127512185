"""The format of an image is decided by its owner and its history, and its content is only compared with that."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak.bitmap.remembered import remember_format, remembered_format
from incbak.bitmap.store import BitmapStore
from incbak.disk.formats import OFFERED, Before, Decision, decide, recognise
from incbak.errors import FormatError

CONTENT = {
    "qcow2": b"QFI\xfb\0\0\0\3",
    "qcow": b"QFI\xfb\0\0\0\1",
    "qed": b"QED\0",
    "vmdk": b"KDMV",
    "vhdx": b"vhdxfile",
    "vpc": b"conectix",
    "vdi": b"<<< Oracle VM VirtualBox Disk Image >>>\n".ljust(64, b"\0") + b"\x7f\x10\xda\xbe",
    "parallels": b"WithouFreSpacExt",
    "VMDK descriptor": b"# Disk DescriptorFile\r\n\nversion=1\n",
    "bochs": b"Bochs Virtual HD Image",
    "luks": b"LUKS\xba\xbe",
    "raw": b"",
}


def made(path: Path, content: str) -> Path:
    path.write_bytes(CONTENT[content].ljust(8192, b"\0"))
    return path


@pytest.mark.parametrize("content", CONTENT)
def test_every_format_is_recognised(tmp_path: Path, content: str) -> None:
    assert recognise(made(tmp_path / "x", content)) == content


def test_a_fixed_vhd_and_a_dmg_are_recognised_by_their_end(tmp_path: Path) -> None:
    for trailer, name in ((b"conectix", "vpc"), (b"koly", "dmg")):
        (tmp_path / "x").write_bytes(bytes(8192) + trailer.ljust(512, b"\0"))
        assert recognise(tmp_path / "x") == name


@pytest.mark.parametrize("content", CONTENT)
@pytest.mark.parametrize("where", ["history", "option", "name"])
def test_a_raw_disk_stays_raw_whatever_its_guest_wrote(tmp_path: Path, content: str, where: str) -> None:
    path = made(tmp_path / ("x.raw" if where == "name" else "x.img"), content)
    before = Before("raw", "backup 1", same=True) if where == "history" else Before()
    decision = decide(path, "raw" if where == "option" else "", before)
    assert (decision.format, decision.guessed) == ("raw", False)
    assert bool(decision.note) == (content not in ("raw", "luks"))


@pytest.mark.parametrize("content", CONTENT)
def test_a_first_backup_guesses_qcow2_and_nothing_else(tmp_path: Path, content: str) -> None:
    path = made(tmp_path / "x.img", content)
    if content in ("raw", "luks"):
        assert decide(path, "", Before()) == Decision("raw")
    elif content == "qcow2":
        decision = decide(path, "", Before())
        assert (decision.format, decision.guessed) == ("qcow2", True)
        assert f"{path} is taken for a qcow2 image by its content" in decision.note
    else:
        with pytest.raises(FormatError, match=r"x\.img is a .*, and its format is not guessed") as caught:
            decide(path, "", Before())
        assert "qemu-img convert" in caught.value.hint


def test_a_block_device_is_raw_unless_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made(tmp_path / "sdb", "qcow2")
    monkeypatch.setattr(Path, "is_block_device", lambda self: True)
    decision = decide(path, "", Before())
    assert decision.format == "raw"
    assert "a block device is raw" in decision.note
    assert decide(path, "qcow2", Before()) == Decision("qcow2")


@pytest.mark.parametrize(
    ("name", "content", "asked", "before", "error"),
    [
        ("x.img", "raw", "", "qcow2", "was a qcow2 image in backup 1, and is no image of a known format now"),
        ("x.img", "vdi", "", "qcow2", "was a qcow2 image in backup 1, and is a VDI image now"),
        ("x.img", "qcow2", "qcow2", "raw", "was a raw image in backup 1, and --format says qcow2"),
        ("x.qcow2", "qcow2", "", "raw", "was a raw image in backup 1, and its name says qcow2"),
        ("x.img", "qcow2", "raw", "qcow2", "was a qcow2 image in backup 1, and --format says raw"),
        ("x.img", "raw", "qcow2", "", "should be a qcow2 image, and is no image of a known format"),
        ("x.qcow2", "vmdk", "", "", "should be a qcow2 image, and is a VMDK image"),
    ],
)
def test_a_contradiction_names_both(
    tmp_path: Path, name: str, content: str, asked: str, before: str, error: str
) -> None:
    with pytest.raises(FormatError, match=error):
        decide(made(tmp_path / name, content), asked, Before(before, "backup 1") if before else Before())


def test_the_same_path_of_another_disk_counts_less_than_the_owner(tmp_path: Path) -> None:
    path, other = made(tmp_path / "x.img", "qcow2"), Before("raw", "disk.json", same=False)
    assert decide(path, "", other).format == "raw"
    assert decide(path, "qcow2", other).format == "qcow2"


def test_what_is_offered_is_recognised() -> None:
    assert set(OFFERED) <= set(CONTENT)


def test_the_state_directory_remembers(tmp_path: Path) -> None:
    image, state = made(tmp_path / "x.img", "qcow2"), tmp_path / "state"
    assert remembered_format(state, "web1", None, image, "disk0") == ("", "", False)
    remember_format(state, "web1", "disk0", image, "qcow2")
    form, where, same = remembered_format(state, "web1", None, image, "disk0")
    assert (form, where, same) == ("qcow2", str(state / "web1/disk0/disk.json"), True)
    assert remembered_format(state, "web1", "vdb", tmp_path / "y.img", "disk0")[0] == ""
    assert remembered_format(state, "web2", None, image, "disk0")[::2] == ("qcow2", False)
    (tmp_path / "link").symlink_to(image)
    assert remembered_format(state, "web2", None, tmp_path / "link", "disk0")[::2] == ("qcow2", False)


def test_what_was_served_is_raw(tmp_path: Path) -> None:
    image, state = made(tmp_path / "x.img", "qcow2"), tmp_path / "state"
    store = BitmapStore(state, "web1", "vda")
    store.lock()
    store.note_image(image)
    store.unlock()
    assert remembered_format(state, "web1", "vda", image, "disk0")[::2] == ("raw", True)
    assert remembered_format(state, "web1", None, image, "disk0")[::2] == ("raw", True)
    assert remembered_format(state, "other", None, image, "disk0")[::2] == ("raw", False)

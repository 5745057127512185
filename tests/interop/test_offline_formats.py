"""The format of an image that is off, from the command line to the record: owners decide, guests do not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from incbak.repo.repository import Repository
from tests.interop.test_storage_daemon import bitmaps, make, write
from tests.kit.cli import Incbak
from tests.kit.need import need

pytestmark = pytest.mark.qemu
SECRET = b"root:THE-HOSTS-SECRET"


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-storage-daemon", "qemu-img", "qemu-io")


def formats(incbak: Incbak) -> list[str]:
    return [d.format for r in Repository.open(incbak.repo).backups() for d in r.disks]


def evil(tmp_path: Path, *options: str) -> bytes:
    """The header of a qcow2 image over a file of the host."""
    secret = tmp_path / "secret"
    secret.write_bytes(SECRET.ljust(1 << 20, b"\0"))
    return make(tmp_path / "evil.qcow2", "qcow2", *options, "-F", "raw", "-b", str(secret), size=1 << 20).read_bytes()


@pytest.mark.parametrize("lost", ["nothing", "state", "records"])
@pytest.mark.parametrize("name", [None, "other"])
def test_a_guest_that_writes_a_header_changes_nothing(incbak: Incbak, tmp_path: Path, lost: str, name: str) -> None:
    """Its raw disk is known as such from the state directory, or from the records."""
    image = tmp_path / "web1.img"
    image.write_bytes(b"\7" * (2 << 20))
    incbak("full", image)
    with image.open("r+b") as f:
        f.write(evil(tmp_path))
    before = image.read_bytes()
    if lost == "state":
        shutil.rmtree(incbak.state)
    if lost == "records":
        shutil.rmtree(incbak.repo)
        incbak("init")
    if name and lost == "state":
        return  # another VM, and nothing that knows the path: that is a first backup
    said = incbak("incremental", image, *(["--name", name] if name else []))
    assert "looks like a qcow2 image" in incbak("--json", "list").out + said.err
    assert image.read_bytes() == before
    incbak("restore", "latest", tmp_path / "out.raw", *(["--name", name] if name else []))
    assert (tmp_path / "out.raw").read_bytes() == before
    assert set(formats(incbak)) == {"raw"}


def test_a_first_backup_of_such_a_disk_reads_no_other_file(incbak: Incbak, tmp_path: Path) -> None:
    image = tmp_path / "web1.img"
    image.write_bytes(evil(tmp_path).ljust(2 << 20, b"\0"))
    ran = incbak.run("full", image)
    assert ran.code == 1
    assert f"names a backing file that is not allowed: {tmp_path}/secret" in ran.err
    assert incbak.list() == []
    assert incbak.run("full", image, "--format", "raw").code == 0


def test_a_qcow2_image_by_another_name_is_one_from_the_first_backup_on(incbak: Incbak, tmp_path: Path) -> None:
    image = make(tmp_path / "web1.img")
    write(image, "write -P 1 0 1M")
    assert "is taken for a qcow2 image by its content" in incbak("full", image).err
    assert len(bitmaps(image)) == 1
    assert "is taken for a qcow2 image by its content" in str(Repository.open(incbak.repo).backups()[0].notes)
    (second,) = incbak("--json", "incremental", image).objects()
    assert (second["kind"], formats(incbak)) == ("incremental", ["qcow2", "qcow2"])
    assert Repository.open(incbak.repo).backups()[1].notes == ()
    ran = incbak.run("full", image, "--format", "raw")
    assert (ran.code, "was a qcow2 image in" in ran.err) == (1, True)
    image.write_bytes(bytes(1 << 20))
    assert "is no image of a known format now" in incbak.run("full", image).err


def test_a_template_elsewhere_is_allowed_by_its_owner(incbak: Incbak, tmp_path: Path) -> None:
    (tmp_path / "templates").mkdir()
    (tmp_path / "vms").mkdir()
    base = make(tmp_path / "templates/base.qcow2")
    write(base, "write -P 5 0 1M")
    image = make(tmp_path / "vms/web1.qcow2", "qcow2", "-b", str(base), "-F", "qcow2")
    write(image, "write -P 6 512k 64k")
    ran = incbak.run("full", image)
    assert (ran.code, f"--allow-backing {base}" in ran.err) == (1, True)
    incbak("full", image, "--allow-backing", base.parent)
    write(image, "write -P 7 2M 64k")
    (second,) = incbak("--json", "incremental", image, "--allow-backing", base).objects()
    assert second["kind"] == "incremental"
    restored = incbak.restored()
    assert restored[0][: 1 << 16] == b"\5" * 65536
    assert restored[512 << 10] == b"\6" * 65536
    assert restored[2 << 20] == b"\7" * 65536

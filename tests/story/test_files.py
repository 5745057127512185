"""``incbak files``: real file systems, backed up by ``incbak full IMAGE``."""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.kit import filesystems as make
from tests.kit.cli import Incbak, Ran
from tests.kit.filesystems import MiB, need_pytsk3

BIG = random.Random(1).randbytes(3 * MiB) * 2
HOLE = 5 * MiB


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of many kinds."""
    top = tmp_path / "source"
    (top / "etc" / "deep" / "deeper").mkdir(parents=True)
    (top / "etc" / "fstab").write_text("/dev/vda1 /\n")
    (top / "etc" / "deep" / "deeper" / "a long name with spaces.txt").write_text("found")
    (top / "big").write_bytes(BIG)
    (top / "empty").touch()
    with (top / "sparse").open("wb") as f:
        f.truncate(2 * HOLE)
        f.seek(HOLE + 1000)
        f.write(b"content")
    os.utime(top / "etc" / "fstab", (1_000_000_000, 1_000_000_000))
    (top / "etc" / "fstab").chmod(0o640)
    return top


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    need_pytsk3()
    made = Incbak(tmp_path)
    made("init")
    return made


def _same(a: Path, b: Path) -> list[str]:
    """Relative paths that are not the same in content."""
    names = {p.relative_to(top) for top in (a, b) for p in top.rglob("*")}
    return sorted(str(n) for n in names if not _equal(a / n, b / n))


def _equal(a: Path, b: Path) -> bool:
    if a.is_symlink() or b.is_symlink():
        return a.is_symlink() and b.is_symlink() and a.readlink() == b.readlink()
    if a.is_dir() or b.is_dir():
        return a.is_dir() and b.is_dir()
    return a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes()


def _names(ran: Ran) -> list[str]:
    return [o["name"] for o in ran.objects()]


def test_a_gpt_disk_with_fat_ext4_and_ntfs(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    """All files of all three come out as they went in, with times and permissions."""
    (source / "link").symlink_to("../../etc/passwd")
    parts = [(33 * MiB, make.ext4(tmp_path / "p2", source, 24 * MiB))]
    (source / "link").unlink()
    parts += [
        (MiB, make.fat(tmp_path / "p1", source, 32 * MiB)),
        (65 * MiB, make.ntfs(tmp_path / "p3", source, 24 * MiB)),
    ]
    script = "start=2048,size=65536,type=uefi\nsize=65536,type=linux\nsize=65536\nsize=8192\n"
    disk = make.partitioned(tmp_path / "disk.raw", "gpt", script, parts)
    incbak("-q", "full", disk)
    found = incbak("--json", "files", "ls", "latest").objects()
    assert [(o["partition"], o["system"], o["start"]) for o in found] == [
        (1, "FAT", MiB),
        (2, "ext4", 33 * MiB),
        (3, "NTFS", 65 * MiB),
        (4, "empty", 97 * MiB),
    ]
    for number in (1, 2, 3):
        out = tmp_path / f"out{number}"
        out.mkdir()
        incbak("files", "cp", "latest", "/", out, "-R", "--partition", str(number))
        wanted = source
        if number == 2:
            assert (out / "link").readlink() == Path("../../etc/passwd")
            (out / "link").unlink()
            (out / "lost+found").rmdir()
        if number == 3:  # ntfscp copies only files
            wanted = tmp_path / "flat"
            shutil.copytree(source, wanted, ignore=lambda *_: ["etc"])
        assert _same(wanted, out) == []
    info = (tmp_path / "out2" / "etc" / "fstab").stat()
    assert (info.st_mode & 0o7777, info.st_mtime, info.st_uid) == (0o640, 1_000_000_000, os.geteuid())
    assert (tmp_path / "out2" / "sparse").stat().st_blocks * 512 < MiB


def test_an_mbr_disk_with_logical_partitions(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    script = "start=2048,size=65536,type=c\nstart=67584,type=5\nstart=69632,size=65536,type=83\nstart=137216,type=83\n"
    parts = [
        (MiB, make.fat(tmp_path / "p1", source, 32 * MiB)),
        (34 * MiB, make.ext4(tmp_path / "p5", source, 24 * MiB)),
    ]
    disk = make.partitioned(tmp_path / "disk.raw", "dos", script, parts)
    incbak("-q", "full", disk)
    found = incbak("--json", "files", "ls", "latest").objects()
    assert [(o["partition"], o["system"]) for o in found] == [(1, "FAT"), (5, "ext4"), (6, "empty")]
    assert "fstab" in _names(incbak("--json", "files", "ls", "latest", "/etc", "--partition", "5"))
    ran = incbak.run("files", "ls", "latest", "/")
    assert (ran.code, "1 (FAT, 32.0 MiB), 5 (ext4" in ran.err) == (2, True), ran


def test_what_is_printed(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    """A disk that is a file system, without partitions; a hostile name does nothing to a terminal."""
    (source / "etc" / "bad\x1b[31m\nname").touch()
    incbak("-q", "full", make.ext4(tmp_path / "disk.raw", source, 24 * MiB))
    said = incbak("files", "ls", "latest", "/etc").out.splitlines()
    assert [line.split()[0] for line in said] == ["TYPE", "-rw-r--r--", "drwxr-xr-x", "-rw-r-----"]
    assert "bad\ufffd[31m\ufffdname" in said[1]
    assert said[3].split() == ["-rw-r-----", "12", "2001-09-09", "01:46:40", "fstab"]
    found = incbak("--json", "files", "ls", "latest", "etc/fstab").objects()
    assert found == [{"path": "etc/fstab", "name": "fstab", "type": "file", "mode": "0640", "size": 12,
                      "modified": "2001-09-09T01:46:40+00:00", "target": None}]  # fmt: skip
    assert _names(incbak("--json", "files", "ls", "latest")) == ["big", "empty", "etc", "lost+found", "sparse"]


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["ls", "latest", "/nothing"], 2, "there is no /nothing in the backup"),
        (["ls", "latest", "/../etc"], 2, "not a path in a backup"),
        (["ls", "latest", "/big/x"], 2, "/big is a file, not a directory"),
        (["ls", "latest", "/link/x"], 2, "It points to etc"),
        (["ls", "latest", "--partition", "3"], 2, "there is no partition 3"),
        (["ls", "latest", "--disk", "vdz"], 2, "has no disk 'vdz'"),
        (["cp", "latest", "/etc", "."], 2, "Copy it with -R"),
        (["cp", "latest", "/big", "/nonexistent"], 2, "is not a directory"),
        (["cp", "latest", "/big", "/big", "."], 1, "two of the paths have the name big"),
    ],
)
def test_wrong_arguments(incbak: Incbak, tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    top = tmp_path / "source"
    (top / "etc").mkdir(parents=True)
    (top / "big").touch()
    (top / "link").symlink_to("etc")
    incbak("-q", "full", make.ext4(tmp_path / "disk.raw", top))
    ran = incbak.run("files", *argv)
    assert (ran.code, says in ran.err, ran.out) == (code, True, ""), ran


@pytest.mark.parametrize(
    ("at", "magic", "name"), [(0, b"XFSB", "XFS"), (512, b"LABELONE", "LVM"), (9000, b"?", "unknown")]
)
def test_for_what_it_cannot_read_it_tells_the_way(
    incbak: Incbak, tmp_path: Path, at: int, magic: bytes, name: str
) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(at) + magic + bytes(MiB - at - len(magic)))
    incbak("-q", "full", disk)
    ran = incbak.run("files", "ls", "latest")
    assert (ran.code, ran.out) == (1, "")
    assert f"the disk has {name}, which cannot be read here" in ran.err
    assert "incbak export" in ran.err
    assert "qemu-nbd" in ran.err


def test_what_is_there_is_left_alone(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    """Unless it is to be replaced; then what was there is not written into."""
    incbak("-q", "full", make.ext4(tmp_path / "disk.raw", source, 24 * MiB))
    out, other = tmp_path / "out", tmp_path / "other"
    (out / "etc").mkdir(parents=True)
    other.write_text("precious")
    os.link(other, out / "etc" / "fstab")
    ran = incbak.run("files", "cp", "latest", "-R", "/etc", "/empty", out)
    assert (ran.code, "exists" in ran.err, os.listdir(out)) == (1, True, ["etc"])
    incbak("files", "cp", "latest", "-R", "/etc", "/empty", out, "--force")
    assert (out / "etc" / "fstab").read_text() == "/dev/vda1 /\n"
    assert other.read_text() == "precious"
    assert sorted(os.listdir(out / "etc")) == ["deep", "fstab"]


def test_a_file_system_in_use_is_told(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    image = make.ext4(tmp_path / "disk.raw", source, 24 * MiB)
    make.debugfs(image, "feature +needs_recovery")
    incbak("-q", "full", image)
    ran = incbak("files", "ls", "latest")
    assert "what is in its journal only is not seen" in ran.err


def test_damage_is_never_taken_for_content(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    """One file is hit: it is not copied, the others are, and the exit code says so."""
    incbak("-q", "full", make.ext4(tmp_path / "disk.raw", source, 24 * MiB))
    pack = max((tmp_path / "repo" / "packs").iterdir(), key=lambda p: p.stat().st_size)
    data = pack.read_bytes()
    at = data.index(BIG[MiB : MiB + 32])  # random, so it is stored as it is
    pack.chmod(0o600)
    pack.write_bytes(data[:at] + b"rot" + data[at + 3 :])
    out = tmp_path / "out"
    out.mkdir()
    ran = incbak.run("files", "cp", "latest", "-R", "/", out)
    assert (ran.code, "big was not copied" in ran.err) == (13, True), ran
    assert sorted(os.listdir(out)) == ["empty", "etc", "lost+found", "sparse"]


def test_without_the_library_it_says_what_to_install(incbak: Incbak, source: Path, tmp_path: Path) -> None:
    incbak("-q", "full", make.ext4(tmp_path / "disk.raw", source, 24 * MiB))
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import sys; sys.modules['pytsk3'] = None\n")
    paths = f"{hidden}{os.pathsep}{os.environ.get('PYTHONPATH') or Path(__file__).parents[2]}"
    ran = incbak.run("files", "ls", "latest", env={"PYTHONPATH": paths})
    assert (ran.code, "pip install 'incbak[files]'" in ran.err) == (2, True), ran

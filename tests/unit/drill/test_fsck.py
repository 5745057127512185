"""What counts as damage of a file system, and what is only the trace of a disk in use."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from incbak.drill import contents as places
from incbak.drill import fsck
from incbak.drill.contents import contents
from incbak.drill.drill import Options, drill
from incbak.drill.fsck import BAD, GOOD, UNCHECKED, Verdict
from incbak.drill.partitions import Part
from incbak.drill.scratch import Scratch
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.kit import filesystems
from tests.kit.filesystems import MiB, run
from tests.kit.need import need, need_root
from tests.unit.backup.scene import Disk, FakeEngine, back_up
from tests.unit.repo.scene import new

Copy = Callable[[Path], Scratch]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files for a file system."""
    where = tmp_path / "source"
    where.mkdir()
    for n in range(5):
        (where / f"file{n}").write_bytes(bytes([n + 1]) * 50_000)
    return where


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Copy]:
    """A copy of an image, without a name."""
    made: list[Scratch] = []

    def copy(image: Path) -> Scratch:
        made.append(Scratch(Part(0, 0, image.stat().st_size), tmp_path))
        made[-1].put(image.read_bytes(), 0)
        return made[-1]

    yield copy
    for each in made:
        each.close()


def _journalled(image: Path, tmp_path: Path) -> None:
    """The group's block bitmap is in the journal only: without a replay the file system is wrong."""
    need("debugfs")
    block = int(re.findall(r"Block bitmap at (\d+)", run("dumpe2fs", image))[0])
    data = image.read_bytes()
    (tmp_path / "block").write_bytes(data[block * 1024 : block * 1024 + 1024])
    script = tmp_path / "script"
    script.write_text(f"jo\njw -b {block} {tmp_path}/block\njc\n")
    subprocess.run(["debugfs", "-w", "-f", script, image], check=True, capture_output=True, timeout=60)
    with image.open("r+b") as f:
        f.seek(block * 1024)
        f.write(bytes(1024))
    assert "needs_recovery" in run("dumpe2fs", "-h", image)


def test_ext4_in_use_is_no_damage(source: Path, tmp_path: Path, scratch: Copy) -> None:
    image = filesystems.ext4(tmp_path / "fs", source)
    assert fsck.check("ext4", scratch(image)) == Verdict(GOOD)
    _journalled(image, tmp_path)
    wrong = subprocess.run(["e2fsck", "-fn", image], capture_output=True, timeout=60, check=False)
    assert wrong.returncode != 0
    before = image.read_bytes()
    assert fsck.check("ext4", scratch(image)) == Verdict(GOOD)
    assert image.read_bytes() == before


def test_ext4_with_damage(source: Path, tmp_path: Path, scratch: Copy) -> None:
    image = filesystems.ext4(tmp_path / "fs", source)
    filesystems.debugfs(image, "sif file2 links_count 7")
    found = fsck.check("ext4", scratch(image))
    assert (found.state, "e2fsck -fn exits with 4" in found.why) == (BAD, True), found
    with image.open("r+b") as f:
        f.seek(2048)
        f.write(b"\xff" * 200_000)
    found = fsck.check("ext4", scratch(image))
    assert (found.state, "e2fsck -p exits with" in found.why, len(found.why) < 400) == (BAD, True, True), found


@pytest.mark.parametrize(("bits", "flag"), [("16", 37), ("32", 65)])
def test_fat_in_use_is_no_damage(tmp_path: Path, scratch: Copy, bits: str, flag: int) -> None:
    image = tmp_path / "fs"
    image.write_bytes(bytes(40 * MiB))
    run("mkfs.vfat", "-F", bits, "-s", "1" if bits == "32" else "4", image)
    data = bytearray(image.read_bytes())
    data[flag] |= 1
    if bits == "32":
        at = int.from_bytes(data[48:50], "little") * 512 + 488
        data[at : at + 4] = (7).to_bytes(4, "little")
    image.write_bytes(data)
    dirty = subprocess.run(["fsck.fat", "-n", image], capture_output=True, timeout=60, check=False)
    assert dirty.returncode == 1
    assert fsck.check("FAT", scratch(image)) == Verdict(GOOD)


def test_fat_with_damage(source: Path, tmp_path: Path, scratch: Copy) -> None:
    image = filesystems.fat(tmp_path / "fs", source)
    assert fsck.check("FAT", scratch(image)) == Verdict(GOOD)
    data = bytearray(image.read_bytes())
    table = int.from_bytes(data[14:16], "little") * 512
    data[table + 4 : table + 200] = b"\x03\x00" * 98  # chains that go round
    image.write_bytes(data)
    found = fsck.check("FAT", scratch(image))
    assert (found.state, "fsck.fat exits with 1" in found.why) == (BAD, True), found


def test_ntfs(source: Path, tmp_path: Path, scratch: Copy) -> None:
    image = filesystems.ntfs(tmp_path / "fs", source)
    assert fsck.check("NTFS", scratch(image)) == Verdict(GOOD)
    data = bytearray(image.read_bytes())
    cluster = int.from_bytes(data[11:13], "little") * data[13]
    volume = int.from_bytes(data[48:56], "little") * cluster + 3 * 1024
    data[volume : volume + 200] = b"\x77" * 200
    image.write_bytes(data)
    found = fsck.check("NTFS", scratch(image))
    assert (found.state, "ntfsfix exits with 1" in found.why) == (BAD, True), found


def test_a_tool_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    need("e2fsck")
    assert fsck.checkable("ext4") == ""
    assert "no tool" in fsck.checkable("XFS")
    monkeypatch.setattr(fsck, "_PATH", str(tmp_path))
    assert fsck.checkable("ext3") == "e2fsck is not installed (Debian: e2fsprogs)"


def _tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> Scratch:
    """An e2fsck of our own, run as whoever we are."""
    path = tmp_path / "e2fsck"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    monkeypatch.setattr(fsck, "_PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    return Scratch(Part(0, 0, 4096), tmp_path)


def test_a_tool_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _tool(tmp_path, monkeypatch, "exec sleep 6")
    assert fsck.check("ext4", scratch, deadline=0.3) == Verdict(BAD, "e2fsck did not end within 0.3 s")


def test_a_tool_that_talks_is_cut_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _tool(tmp_path, monkeypatch, "yes 'something is wrong' | head -c 3000000; exit 4")
    found = fsck.check("ext4", scratch)
    assert (found.state, len(found.why) < 400, found.why.endswith("...")) == (BAD, True, True)


def test_features_of_a_later_time_are_not_called_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = _tool(tmp_path, monkeypatch, "echo 'it has unsupported feature(s): FEATURE_C17'; exit 8")
    assert fsck.check("ext4", scratch).state == UNCHECKED


@pytest.mark.root
def test_tools_are_nobody(tmp_path: Path) -> None:
    need_root()
    need("id")
    scratch = Scratch(Part(0, 0, 4096), tmp_path)
    assert fsck._run(["id", "-u"], scratch, 20) == (0, "65534")
    assert fsck._run(["id", "-G"], scratch, 20) == (0, "65534")


# -- a whole disk ------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(source: Path, tmp_path: Path) -> bytes:
    """Three partitions: FAT, ext4 in use, and one that no tool knows."""
    ext, fat = filesystems.ext4(tmp_path / "ext", source), filesystems.fat(tmp_path / "fat", source)
    _journalled(ext, tmp_path)
    xfs = tmp_path / "xfs"
    xfs.write_bytes(b"XFSB" + b"\1" * 5000)
    script = "start=2048, size=32768\nstart=65536, size=32768\nstart=102400, size=32768\n"
    path = filesystems.partitioned(tmp_path / "disk", "gpt", script, [(MiB, fat), (32 * MiB, ext), (50 * MiB, xfs)])
    with path.open("r+b") as f:
        f.truncate(80 * MiB)  # the second table is gone: only the first one counts
    return path.read_bytes()


def _backed_up(path: Path, data: bytes) -> tuple[Repository, Record]:
    repo = new(path)
    record = back_up(repo, FakeEngine({"vda": Disk(bytearray(data))}), incremental=False).record
    assert record
    return repo, record


def _states(directory: Path, data: bytes, **more: bool) -> tuple[dict[tuple[str, int], str], tuple[str, ...], int]:
    directory.mkdir()
    done = drill(*_backed_up(directory / "repo", data), Options(directory, **more))
    assert [p.name for p in directory.iterdir()] == ["repo"]
    return {(s.name, s.partition): s.state for s in done.systems}, done.problems, done.exit_code


def test_each_partition_of_a_disk(disk: bytes, tmp_path: Path) -> None:
    found, problems, code = _states(tmp_path / "a", disk)
    assert found == {("FAT", 1): GOOD, ("ext4", 2): GOOD, ("XFS", 3): UNCHECKED}
    assert (problems, code) == ((), 0)
    data = bytearray(disk)
    data[32 * MiB + 2048 : 32 * MiB + 200_000] = b"\xff" * 197_952
    found, problems, code = _states(tmp_path / "b", data)
    assert (found["ext4", 2], found["FAT", 1], code) == (BAD, GOOD, 1)
    assert problems[0].startswith("disk vda, partition 2: ext4: e2fsck -p exits with")
    assert _states(tmp_path / "c", data, fsck=False) == ({}, (), 0)
    data[512 + 20] ^= 1
    found, problems, code = _states(tmp_path / "d", data)
    assert (found, code, "GPT's header" in problems[0]) == ({}, 1, True)


def test_what_there_is_no_room_for_is_not_checked(disk: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the data in it, not by its size."""
    repo, record = _backed_up(tmp_path / "repo", disk)

    class Usage:
        free = 4 * MiB

    monkeypatch.setattr(places.shutil, "disk_usage", lambda _path: Usage)
    for free, there in ((4 * MiB, [True, True, False]), (500_000, [True, False, False])):
        Usage.free = free
        with ExitStack() as stack:
            found, _ = contents(repo, record, record.disks[0], tmp_path, stack)
            assert [bool(each.scratch) for each in found] == there
    assert "there is room for" in found[1].why

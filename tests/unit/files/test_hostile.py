"""Disks that a stranger wrote: real ext4 file systems with names, links and sizes that mkfs would never write."""

from __future__ import annotations

import errno
import os
import signal
import stat
from pathlib import Path
from typing import Any

import pytest

from incbak.errors import DamagedError, DiskError, IncbakError, RestoreError, UsageError
from incbak.events import Event, Warned
from incbak.files import copy as module
from incbak.files.copy import Copied, Copier
from incbak.files.library import Library
from incbak.files.walk import listed
from tests.kit import filesystems as make
from tests.kit.filesystems import MiB, need_pytsk3


class FileImage:
    """A file as a disk; ``bad`` is a range that cannot be read."""

    name = "vda"

    def __init__(self, path: Path, bad: range = range(0)) -> None:
        self.size, self._path, self._bad = path.stat().st_size, path, bad

    def read_into(self, buf: memoryview, offset: int) -> None:
        if self._bad.start < offset + len(buf) and offset < self._bad.stop:
            raise OSError(errno.EIO, "rot")
        with self._path.open("rb") as f:
            f.seek(offset)
            f.readinto(buf)


@pytest.fixture
def top(tmp_path: Path) -> Path:
    need_pytsk3()
    made = tmp_path / "source"
    made.mkdir()
    return made


class Scene:
    """A disk, a target, and something outside of it."""

    def __init__(self, tmp_path: Path, image: Path) -> None:
        self.image, self.out, self.outside = image, tmp_path / "x" / "y" / "out", tmp_path / "outside"
        self.out.mkdir(parents=True)
        self.outside.mkdir()
        self.told: list[Event] = []
        self._root = tmp_path

    def copy(self, *, force: bool = False, setuid: bool = False, limit: int | None = None, **more: Any) -> Copied:
        """All of it."""
        with Library(FileImage(self.image)) as library:
            root = library.mount(library.volumes()[0])
            limit = self.image.stat().st_size if limit is None else limit
            copier = Copier(library, self.out, limit, force=force, setuid=setuid, report=self.told.append, **more)
            nodes = [n for n in listed(library, root) if n.name != b"lost+found"]
            return copier.copy(nodes)

    def names(self) -> list[str]:
        """Everything below the target."""
        return sorted(str(p.relative_to(self.out)) for p in self.out.rglob("*"))

    def elsewhere(self) -> list[str]:
        """Everything that has come to be beside it."""
        known = {"source", "disk", "x", "x/y", "x/y/out", "outside"}
        found = {str(p.relative_to(self._root)) for p in self._root.rglob("*")}
        return sorted(n for n in found - known if not n.startswith(("x/y/out/", "source/")))

    def why(self) -> str:
        """What was told."""
        return "; ".join(e.text for e in self.told if isinstance(e, Warned))


@pytest.mark.parametrize(
    "name", [b"../../x1", b"/tmp/~no", b"a/../../", b"sub/evil", b"abc\0defg", b"..\0\0\0\0\0\0"], ids=repr
)
def test_a_name_leads_nowhere(tmp_path: Path, top: Path, name: bytes) -> None:
    """The library may refuse it, cut it, or hand it on: nothing is outside, and what is inside is one component."""
    (top / "sub").mkdir()
    (top / "HOSTILE1").write_text("harm")
    image = make.ext4(tmp_path / "disk", top)
    make.rename(image, b"HOSTILE1", name)
    scene = Scene(tmp_path, image)
    done = scene.copy()
    assert scene.elsewhere() == []
    assert set(scene.names()) <= {"sub", "abc", "abc^defg"}
    assert done.directories == 1


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"x" * 256])
def test_such_a_name_is_refused_by_ourselves(name: bytes) -> None:
    assert not module._is_safe(name)


def test_a_directory_in_which_nothing_is_written_is_left_out(tmp_path: Path, top: Path) -> None:
    """The repository, say, where all of a guest is copied to a directory above it."""
    for name in ("repo", "new"):
        (top / name).mkdir()
        (top / name / "config").write_text("the guest's")
    scene = Scene(tmp_path, make.ext4(tmp_path / "disk", top))
    (scene.out / "repo").mkdir()
    (scene.out / "repo" / "config").write_text("ours")

    def refuse(path: Path) -> None:
        if path == scene.out / "repo":
            raise UsageError(f"{path} is in the repository")

    done = scene.copy(force=True, refuse=refuse)
    assert done.failed == [str(scene.out / "repo")]
    assert (scene.out / "repo" / "config").read_text() == "ours"
    assert (scene.out / "new" / "config").read_text() == "the guest's"


def test_a_link_in_the_way_is_not_followed(tmp_path: Path, top: Path) -> None:
    """Two entries of one name: a link to the outside, then a directory, then a file, with things to put there."""
    (top / "SAME001").symlink_to(tmp_path / "outside")
    (top / "SAME002").mkdir()
    (top / "SAME002" / "planted").write_text("harm")
    (top / "THAT001").symlink_to(tmp_path / "outside" / "file")
    (top / "THAT002").write_text("harm")
    image = make.ext4(tmp_path / "disk", top)
    make.rename(image, b"SAME002", b"SAME001")
    make.rename(image, b"THAT002", b"THAT001")
    scene = Scene(tmp_path, image)
    with pytest.raises(RestoreError, match="two of the paths have the name"):
        scene.copy()
    for n in range(2):  # the second time all of it is there
        done = scene.copy(force=True)
        assert (scene.elsewhere(), len(done.failed) > 0) == ([], True), n
    assert os.listdir(scene.outside) == []


def test_a_link_that_was_there_is_not_followed(tmp_path: Path, top: Path) -> None:
    (top / "dir").mkdir()
    (top / "dir" / "file").write_text("new")
    (top / "plain").write_text("new")
    scene = Scene(tmp_path, make.ext4(tmp_path / "disk", top))
    (scene.out / "dir").symlink_to(scene.outside)
    (scene.out / "plain").symlink_to(scene.outside / "plain")
    done = scene.copy(force=True)
    assert os.listdir(scene.outside) == []
    assert done.failed == [str(scene.out / "dir")]
    assert (scene.out / "plain").read_text() == "new"
    assert not (scene.out / "plain").is_symlink()


def test_no_devices_and_no_setuid(tmp_path: Path, top: Path) -> None:
    (top / "suid").write_text("#!/bin/sh\n")
    os.mkfifo(top / "pipe")
    image = make.ext4(tmp_path / "disk", top)
    make.debugfs(image, "set_inode_field suid mode 0106777", "mknod disk b 8 0")
    scene = Scene(tmp_path, image)
    done = scene.copy()
    assert (scene.names(), done.special, done.failed) == (["suid"], 2, [])
    assert (scene.out / "suid").stat().st_mode & 0o7000 == 0
    scene.copy(force=True, setuid=True)
    assert (scene.out / "suid").stat().st_mode & 0o7000 == stat.S_ISUID | stat.S_ISGID


def test_a_size_beyond_the_disk_is_refused(tmp_path: Path, top: Path) -> None:
    (top / "huge").write_text("small")
    (top / "other").write_text("small")
    image = make.ext4(tmp_path / "disk", top)
    make.debugfs(image, f"set_inode_field huge size {1 << 40}")
    scene = Scene(tmp_path, image)
    assert scene.copy().failed == [str(scene.out / "huge")]
    assert f"claims {1 << 40} bytes" in scene.why()
    assert scene.names() == ["other"]


def test_no_more_is_written_than_the_disk_has(tmp_path: Path, top: Path) -> None:
    """Many names for one file."""
    (top / "file0").write_bytes(os.urandom(MiB))
    for n in range(1, 8):
        os.link(top / "file0", top / f"file{n}")
    scene = Scene(tmp_path, make.ext4(tmp_path / "disk", top))
    with pytest.raises(RestoreError, match="more is to be copied than the disk holds"):
        scene.copy(limit=5 * MiB)
    assert scene.names() == [f"file{n}" for n in range(5)]


def test_a_loop_ends(tmp_path: Path, top: Path) -> None:
    (top / "a" / "b").mkdir(parents=True)
    image = make.ext4(tmp_path / "disk", top)
    make.debugfs(image, "link a a/b/again")
    scene = Scene(tmp_path, image)
    assert scene.copy().failed == [str(scene.out / "a" / "b" / "again")]
    assert scene.names() == ["a", "a/b"]


def test_depth_has_a_bound(tmp_path: Path, top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEPTH", 3)
    (top / "1" / "2" / "3" / "4").mkdir(parents=True)
    scene = Scene(tmp_path, make.ext4(tmp_path / "disk", top))
    assert len(scene.copy().failed) == 1
    assert scene.names() == ["1", "1/2", "1/2/3"]


def test_a_file_has_its_name_when_it_is_whole(tmp_path: Path, top: Path) -> None:
    """Nothing is left of one that could not be read to its end."""
    (top / "file").write_bytes(os.urandom(MiB))
    image = make.ext4(tmp_path / "disk", top)
    make.debugfs(image, f"set_inode_field file block[2] {0x7FFFFF}", "set_inode_field file block[5] 99999999")
    scene = Scene(tmp_path, image)
    assert scene.copy().failed == [str(scene.out / "file")]
    assert scene.names() == []


def test_what_cannot_be_read_is_damage_whatever_the_library_makes_of_it(tmp_path: Path, top: Path) -> None:
    for n in range(200):
        (top / f"name-of-a-file-{n:03}").touch()
    image = make.ext4(tmp_path / "disk", top)
    at = image.read_bytes().index(b"name-of-a-file-150")
    with Library(FileImage(image, range(at, at + 1))) as library:
        root = library.mount(library.volumes()[0])
        with pytest.raises(DamagedError, match="rot"):
            listed(library, root)
        assert library.alive


def test_unwritten_blocks_are_zeroes(tmp_path: Path, top: Path) -> None:
    """ext4 has extents that were never written: what lies there is somebody else's."""
    (top / "file").write_text("x")
    image = make.ext4(tmp_path / "disk", top)
    make.debugfs(image, "fallocate file 1 100", "set_inode_field file size 100000")
    with image.open("r+b") as f:
        data = f.read()
        for at in range(0, len(data), 1024):
            if not any(data[at : at + 1024]):
                f.seek(at)
                f.write(b"secret")
    scene = Scene(tmp_path, image)
    scene.copy()
    assert (scene.out / "file").read_bytes() == b"x" + bytes(99999)


def test_the_worker_can_do_little(tmp_path: Path, top: Path) -> None:
    with Library(FileImage(make.ext4(tmp_path / "disk", top))) as library:
        library.volumes()
        pid = library._process.pid
        limits = Path(f"/proc/{pid}/limits").read_text()
        status = Path(f"/proc/{pid}/status").read_text()
    rows = {line[:25].strip(): line[25:].split()[0] for line in limits.splitlines()}
    assert [rows[n] for n in ("Max open files", "Max file size", "Max processes", "Max core file size")] == ["0"] * 4
    assert rows["Max address space"] == str(1 << 30)
    uids = next(line for line in status.splitlines() if line.startswith("Uid")).split()[1:]
    assert set(uids) == ({"65534"} if os.geteuid() == 0 else {str(os.geteuid())})


def test_a_worker_that_dies_is_an_error(tmp_path: Path, top: Path) -> None:
    with Library(FileImage(make.ext4(tmp_path / "disk", top))) as library:
        root = library.mount(library.volumes()[0])
        os.kill(library._process.pid, signal.SIGSEGV)
        with pytest.raises(DiskError, match="killed by SIGSEGV"):
            listed(library, root)
        assert not library.alive
        with pytest.raises(IncbakError):
            library.volumes()


def test_a_question_that_is_given_up_does_not_mix_with_the_next(tmp_path: Path, top: Path) -> None:
    for n in range(100):
        (top / f"f{n}").touch()
    with Library(FileImage(make.ext4(tmp_path / "disk", top))) as library:
        root = library.mount(library.volumes()[0])
        entries = library.entries(root)
        next(entries)
        entries.close()
        assert not library.alive
        with pytest.raises(DiskError):
            library.volumes()

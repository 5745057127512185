"""Whose word the times of a file are, and that the word of a program that shows a disk as a file is not taken."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from incbak import device, mounts, times
from incbak.backup.facts import Leaf, Part, Peer, are_one, are_same, facts_of, is_known
from incbak.bitmap.continuity import bypassed, changed, set_up_anew
from incbak.disk.file import open_disk
from incbak.fingerprint import NO_WRITES, beat_of, take_path
from incbak.reasons import Reason
from incbak.watch import disks
from tests.kit.cli import Incbak, differing
from tests.kit.cli import content as content_of
from tests.kit.devices import loop_device
from tests.kit.need import missing, need
from tests.kit.serve import wait_until
from tests.unit.watch.fake import a_disk

SIZE = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "image").write_bytes(bytes(SIZE))
    return tmp_path / "image"


@pytest.fixture
def unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every file is on a FUSE file system that does not say what it is."""
    monkeypatch.setattr(times, "_magic", lambda _: times._FUSE)
    monkeypatch.setattr(times, "kind_of", lambda _: "fuse")


def test_the_kernels_own_file_systems_keep_times(image: Path) -> None:
    assert times.are_kept(image)
    assert times._magic(image) == int(subprocess.check_output(["stat", "-f", "-c", "%t", image], text=True), 16)


def test_what_cannot_be_looked_at_keeps_none(tmp_path: Path) -> None:
    assert not times.are_kept(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("kind", "kept"),
    [
        ("fuse", False),
        ("fuse.nbdfuse", False),
        ("fuse.archivemount", False),
        ("fuse.s3fs", False),
        ("fuse.portal", False),
        ("sshfs", False),
        ("fuse.sshfs", True),
        ("fuse.fuse-overlayfs", True),
        ("fuse.ceph-fuse", True),
        ("fuseblk", True),
        ("fuseblk.exfat", True),
        ("virtiofs", True),
    ],
)
def test_of_fuse_only_what_stores_files_or_passes_them_on(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, kept: bool
) -> None:
    table = tmp_path / "mounts"
    with image.open() as f:
        number = Path(f"/proc/self/fdinfo/{f.fileno()}").read_text().partition("mnt_id:")[2].split()[0]
    line = f"{number} 0 8:0 / /a\\040-\\040b\f{number}0 rw shared:1 - {kind} /dev/fuse rw,user_id=0\n"
    table.write_text(f"{number}0 0 8:1 / / rw - ext4 /dev/sda rw\n{line}")
    monkeypatch.setattr(mounts, "_MOUNTS", table)
    assert times.are_kept(image), "what is not FUSE is not looked up"
    monkeypatch.setattr(times, "_magic", lambda _: times._FUSE)
    assert times.are_kept(image) is kept
    table.write_text(f"{number}0 0 8:1 / / rw - fuseblk /dev/sda rw\n")
    assert not times.are_kept(image), "a mount of another namespace"


@pytest.mark.usefixtures("unknown")
def test_a_file_whose_times_show_nothing_is_unproven(image: Path) -> None:
    """Also after a kill; what is open stays what it was, and no sample makes up for it."""
    before, now = take_path(image, raw=True), take_path(image, raw=True)
    assert now[:6] == before[:6]
    assert changed(before, now) is Reason.UNPROVEN
    assert bypassed(beat_of(before), now, beat_of(before).clock_ns) is Reason.UNPROVEN
    assert changed(before._replace(writes=NO_WRITES), now) is Reason.UNPROVEN, "recorded by an earlier version"
    assert not set_up_anew(before, now)
    disk = open_disk(image)
    try:
        assert changed(disk.fingerprint(), disk.fingerprint()) is None
        assert disk.beat().writes == disk.fingerprint().writes != NO_WRITES
        disk.write(b"x", SIZE - 1)
        os.utime(image, ns=(1, 1))
        assert changed(before._replace(writes=disk.fingerprint().writes), disk.fingerprint()) is Reason.DISK_CHANGED
    finally:
        disk.close()


def test_a_file_whose_times_are_kept_is_proven(image: Path) -> None:
    before = take_path(image, raw=True)
    assert before.writes == NO_WRITES
    assert changed(before, take_path(image, raw=True)) is None
    assert bypassed(beat_of(before), take_path(image, raw=True), beat_of(before).clock_ns) is None


def test_a_file_below_a_disk(image: Path, request: pytest.FixtureRequest) -> None:
    """It is not known, and never believed; as one of those that an engine has open it is told from others."""
    leaf, peer = Leaf(str(image), Part.BELOW, read_only=True), Peer(None, [])
    proven = facts_of(leaf, peer)
    assert is_known([proven])
    request.getfixturevalue("unknown")
    found = facts_of(leaf, peer)
    assert not is_known([found])
    assert is_known([found], trusted=[str(image)])
    assert are_same([proven], [found]), "nothing shows that it was changed, either"
    assert are_one([proven], [found])
    assert not are_one([[str(image), SIZE, image.stat().st_ino + 1, 1, 1]], [found])
    os.utime(image, ns=(1, 1))
    assert facts_of(leaf, peer) != found, "a write during a run"


def test_a_file_below_a_loop_device(image: Path, request: pytest.FixtureRequest) -> None:
    with loop_device(image) as loop:
        assert device.writes(loop)
        request.getfixturevalue("unknown")
        assert device.writes(loop) == ""


def test_a_file_that_is_watched(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    disk = a_disk(tmp_path)
    with disk.image.open("rb"):  # as QEMU has it
        assert disks._unusable(disk, os.getpid()) == ""
        request.getfixturevalue("unknown")
        assert "may not keep times" in disks._unusable(disk, os.getpid())


@pytest.fixture
def shown(image: Path, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The image as nbdfuse shows it, and the URI by which another program writes to it."""
    need("nbdfuse", "fusermount3", "qemu-nbd", "qemu-io")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing("root", "/dev/fuse cannot be used")
    sock, mount = tmp_path / "nbd", tmp_path / "fuse"
    mount.mkdir()
    uri = f"nbd+unix:///?socket={sock}"
    with subprocess.Popen(["qemu-nbd", "-f", "raw", "-k", sock, "-t", "-e", "0", image]) as server:
        try:
            wait_until(sock.exists, "qemu-nbd listens")
            with subprocess.Popen(["nbdfuse", mount, uri]) as fuse:
                try:
                    wait_until(lambda: (mount / "nbd").exists() or fuse.poll() is not None, "nbdfuse has mounted")
                    yield mount / "nbd", uri
                finally:
                    subprocess.run([shutil.which("fusermount3") or "", "-u", mount], check=False, timeout=20)
        finally:
            server.terminate()


def test_an_image_that_nbdfuse_shows_is_read_whole(shown: tuple[Path, str], image: Path, tmp_path: Path) -> None:
    """Its times and its inode stay what they are while another program writes to the disk."""
    path, uri = shown
    incbak = Incbak(tmp_path)
    incbak("init")
    incbak("full", path, "--name", "vm")
    before = path.stat()
    write = ["qemu-io", "-f", "raw", "-c", "write -P 9 196608 4096", uri]  # not where the fingerprint takes samples
    subprocess.run(write, check=True, capture_output=True, timeout=20)
    now = path.stat()
    assert (now.st_mtime_ns, now.st_ctime_ns, now.st_ino) == (before.st_mtime_ns, before.st_ctime_ns, before.st_ino)
    incbak("incremental", path, "--name", "vm")
    assert incbak.list()[-1]["disks"][0]["reason"] == "unproven"
    assert differing(incbak.restored(), content_of(image)) == []

"""``incbak export``: a backup as a disk, at once, for QEMU's tools and for anybody who speaks NBD."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kit.cli import content, differing, signal_another_thread
from tests.kit.need import need
from tests.story.test_story import CLUSTER, REGION, SIZE, Story


@pytest.fixture
def story(tmp_path: Path) -> Story:
    """Two backups that differ."""
    made = Story(tmp_path)
    with made.serving() as serve:
        made.write(serve, 0, REGION, 2 * REGION + 100, SIZE - 6000)
        made.back_up(serve, "full")
        made.write(serve, 5 * CLUSTER, REGION)
        made.back_up(serve)
    return made


@contextmanager
def exported(story: Story, *argv: str | Path) -> Iterator[str]:
    """The URI of the disk."""
    process = story.incbak.popen("export", *argv)
    try:
        assert process.stdout
        ready = process.stdout.readline()
        assert ready.startswith("ready: "), (ready, process.stderr)
        yield ready.split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        _out, err = process.communicate(timeout=30)
        assert (process.returncode, err) == (0, "")


def test_a_signal_that_another_thread_takes_ends_it(story: Story) -> None:
    """Such a one does not wake the main thread, nor does one that comes just before that waits."""
    process = story.incbak.popen("export", "latest")
    assert process.stdout
    assert process.stdout.readline().startswith("ready: ")
    signal_another_thread(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 0


def _qemu_img(*argv: str | Path) -> str:
    need("qemu-img")
    return subprocess.run(["qemu-img", *map(str, argv)], check=True, capture_output=True, text=True, timeout=120).stdout


def test_each_backup_is_a_disk(story: Story, tmp_path: Path) -> None:
    """What QEMU's tools read is what a restore gives; the map has the holes."""
    for ident, held in story.expected.items():
        with exported(story, ident) as uri:
            out = tmp_path / "out.raw"
            _qemu_img("convert", "-O", "raw", uri, out)
            assert not differing(content(out), held)
            assert '"zero": true' in _qemu_img("map", "--output=json", uri)


def _qemu_io(uri: str, *commands: str) -> str:
    """What was printed, errors too."""
    need("qemu-io")
    argv = ["qemu-io", "-f", "raw", *(word for c in commands for word in ("-c", c)), uri]
    done = subprocess.run(argv, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    return done.stdout


def test_writes_are_taken_and_forgotten(story: Story, tmp_path: Path) -> None:
    ident, held = next(iter(story.expected.items()))
    sock = tmp_path / "w.sock"
    with exported(story, ident, "--writable", "--socket", sock) as uri:
        commands = [f"write -P 7 {CLUSTER + 100} 5000", "write -z 0 4096", "discard 1M 1M"]
        said = _qemu_io(uri, *commands, f"read -P 7 {CLUSTER + 100} 5000", "read -P 0 0 4096")
        assert (said.count("bytes at offset"), "failed" in said) == (5, False), said
        assert sock.stat().st_mode & 0o777 == 0o600
    assert not sock.exists()
    assert not differing(story.incbak.restored(ident), held)


def test_what_is_not_writable_is_refused(story: Story) -> None:
    with exported(story, "latest") as uri:
        assert "Permission denied" in _qemu_io(uri, "write 0 512")


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["nothing"], 2, "no backup begins with"),
        (["latest", "--disk", "vdz"], 2, "has no disk 'vdz'"),
        (["latest", "--tcp", "nowhere"], 2, "not HOST:PORT"),
        (["latest", "--writable", "--scratch-dir", "/nonexistent"], 1, "cannot keep writes"),
    ],
)
def test_bad_arguments(story: Story, argv: list[str], code: int, says: str) -> None:
    ran = story.incbak.run("export", *argv)
    assert (ran.code, says in ran.err) == (code, True), ran

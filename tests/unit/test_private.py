"""Private directories go with their process, also one that was killed, by the next."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from incbak import private
from incbak.private import PrivateDirectory, sweep

KILLED = """
import os, signal, socket
from incbak.private import PrivateDirectory
made = PrivateDirectory()
for name in ("sink.sock", "log"):
    s = socket.socket(socket.AF_UNIX)
    s.bind(str(made.path / name))
(made.path / "sink").mkdir()
(made.path / "sink" / "0a1b").write_text("")
print(made.path, flush=True)
if os.environ["HOW"] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
signal.pause()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where they are made."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path


def _begin(how: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED], env={**os.environ, "HOW": how}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    return process, Path(process.stdout.readline().strip())


def _aged(path: Path) -> Path:
    old = time.time() - 3600
    os.utime(path, (old, old))
    return path


def test_it_is_private_and_goes(place: Path) -> None:
    with PrivateDirectory() as path:
        assert path.parent == place
        assert path.stat().st_mode & 0o777 == 0o700
        (path / "nbd").write_text("x")
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 80, "\udcff"], ids=["long", "not UTF-8"])
def test_where_no_socket_can_be_it_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """The path of a socket has 107 bytes; ``TMPDIR`` may have more."""
    elsewhere = Path(tempfile.mkdtemp(dir="/tmp"))
    usual = tmp_path / name
    usual.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(usual))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(elsewhere))
    try:
        with PrivateDirectory() as path, socket.socket(socket.AF_UNIX) as listener:
            assert path.parent == elsewhere
            listener.bind(str(path / "sink.sock"))
        assert list(usual.iterdir()) == list(elsewhere.iterdir()) == []
    finally:
        elsewhere.rmdir()


def test_what_a_killed_process_left_goes_with_the_next(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a process that lives stays, however old it is; so does one that was made just now."""
    dead, left = _begin("killed")
    assert dead.wait(60) == -signal.SIGKILL
    alive, kept = _begin("alive")
    try:
        assert left.is_dir()
        assert kept.is_dir()
        sweep(place)
        assert left.is_dir(), "it might be about to be locked"
        for path in (left, kept):
            _aged(path)
        monkeypatch.setattr(private, "_swept", False)
        PrivateDirectory().close()
        assert list(place.iterdir()) == [kept]
    finally:
        alive.kill()
        alive.communicate()


def test_nothing_else_is_taken_away(place: Path) -> None:
    """Another's content, another's directory, a link, a file: also where the name is ours."""
    names = ["with-more", "wide-open", "a-link", "a-file"]
    more, wide, link, file = (place / f"incbak-private-{name}" for name in names)
    more.mkdir(0o700)
    (more / "thesis.txt").write_text("x")
    wide.mkdir(0o755)
    wide.chmod(0o755)
    elsewhere = place / "elsewhere"
    elsewhere.mkdir(0o700)
    (elsewhere / "log").write_text("x")
    link.symlink_to(elsewhere)
    file.write_text("x")
    other = place / "incbak-backups"
    other.mkdir(0o700)
    for path in (more, wide, file, other, elsewhere):
        _aged(path)
    sweep(place)
    assert (more / "thesis.txt").read_text() == (elsewhere / "log").read_text() == file.read_text() == "x"
    assert all(path.exists() for path in (wide, link, other))
    sweep(place / "nowhere")


def test_all_names_in_them_are_known() -> None:
    """Else a directory would be left for one that nobody told of."""
    top = Path(private.__file__).parent
    used = {
        name
        for path in top.rglob("*.py")
        if "PrivateDirectory" in (text := path.read_text())
        for name in ("nbd", "nbd.sock", "sink.sock", "qmp", "log")
        if f'/ "{name}"' in text or f"}}/{name}" in text
    }
    assert used == set(private.NAMES)


def test_a_socket_in_it_is_reached_by_its_owner(place: Path) -> None:
    with PrivateDirectory() as path, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path / "nbd"))
        assert (path / "nbd").is_socket()

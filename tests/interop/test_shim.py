"""``tools/qemu-nbd-shim``: QEMU's tools on ``incbak serve`` behind the command line of qemu-nbd."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.need import need
from tests.kit.serve import DEADLINE, wait_until

SHIM = Path(__file__).parents[2] / "tools" / "qemu-nbd-shim"
MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.raw"
    with path.open("wb") as f:
        f.truncate(4 * MIB)
    return path


def shim(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(SHIM), *(str(a) for a in arguments)]


def qemu_io(where: str, *commands: str) -> subprocess.CompletedProcess[str]:
    need("qemu-io")
    flat = [part for command in commands for part in ("-c", command)]
    return subprocess.run(
        ["qemu-io", "-f", "raw", *flat, where], capture_output=True, text=True, timeout=DEADLINE, check=False
    )


def test_in_the_background_with_a_pid_file(image: Path, tmp_path: Path) -> None:
    """As QEMU's tests call it. It returns when clients can connect, and holds no pipe of its caller."""
    sock, pid = tmp_path / "s", tmp_path / "pid"
    command = shim("-v", "-t", "-k", sock, "-f", "raw", "-e", "42", "-x", "", f"--pid-file={pid}", "--fork", image)
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    number = int(pid.read_text())
    for _ in range(2):
        told = qemu_io(f"nbd+unix:///?socket={sock}", "write -P 7 1M 64k", "read -P 7 1M 64k", "discard 0 64k", "flush")
        assert told.returncode == 0, told.stderr
    os.kill(number, signal.SIGTERM)
    wait_until(lambda: not pid.exists() and not sock.exists(), "the shim has ended and cleaned up")
    assert image.read_bytes()[MIB : MIB + 65536] == b"\7" * 65536


def test_without_t_it_ends_with_its_client(image: Path, tmp_path: Path) -> None:
    sock = tmp_path / "s"
    process = subprocess.Popen(shim("-f", "raw", "-x", "disk", "-k", sock, image))
    wait_until(sock.exists, "the socket")
    assert qemu_io(f"nbd+unix:///disk?socket={sock}", "write -P 3 0 4k").returncode == 0
    assert process.wait(DEADLINE) == 0
    assert image.read_bytes()[:4096] == b"\3" * 4096


def test_tcp_and_read_only(image: Path, tmp_path: Path) -> None:
    """The port in use is told in the words that QEMU's tests look for."""
    port, pid = _free_port(), tmp_path / "pid"
    command = shim("-t", "-r", "-b", "127.0.0.1", "-p", port, "--pid-file", pid, "--fork", image)
    assert subprocess.run(command, timeout=DEADLINE, check=False).returncode == 0
    try:
        assert qemu_io(f"nbd://127.0.0.1:{port}", "write 0 4k").returncode != 0
        again = subprocess.run(
            shim("-t", "-r", "-p", port, "--fork", image), capture_output=True, text=True, check=False
        )
        assert again.returncode == 1
        assert "Address already in use" in again.stderr
    finally:
        os.kill(int(pid.read_text()), signal.SIGTERM)
        wait_until(lambda: not pid.exists(), "the shim has ended")


def _free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return str(sock.getsockname()[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-f", "qcow2", "x"], "invalid choice: 'qcow2'"),
        (["--snapshot", "x"], "unrecognized arguments: --snapshot"),
        ([], "the following arguments are required: image"),
    ],
)
def test_what_it_does_not_know_is_refused(arguments: list[str], words: str) -> None:
    done = subprocess.run(shim(*arguments), capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    assert words in done.stderr


def test_an_image_that_is_not_there(tmp_path: Path) -> None:
    command = shim("-t", "-k", tmp_path / "s", "--fork", tmp_path / "none")
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    assert "No such file or directory" in done.stderr


def test_version_and_help() -> None:
    for option, words in (("--version", "qemu-nbd 7.2"), ("--help", "--pid-file FILE")):
        done = subprocess.run(shim(option), capture_output=True, text=True, timeout=DEADLINE, check=False)
        assert done.returncode == 0
        assert words in done.stdout

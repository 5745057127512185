"""What is neither file nor device is not opened, whoever names it and whatever for."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from incbak.bitmap.identity import read_identity
from incbak.bitmap.store import view_file
from incbak.cli.attachments import read_attachments
from incbak.cli.passphrase import Passphrase
from incbak.cli.report import _replaceable
from incbak.disk import qcow2
from incbak.disk.file import open_disk, probe_format
from incbak.disk.formats import recognise
from incbak.disk.locks import writer_present
from incbak.engine.qemu_storing import sync_files
from incbak.errors import IncbakError, UsageError
from incbak.fingerprint import take_path
from incbak.fleet.config import load
from incbak.fleet.metrics import write_drill_metrics, write_metrics
from incbak.nbd.tls import client_context
from incbak.opening import open_image, open_regular, open_text
from incbak.repo.drills import Drills

_IN_OPEN = 0x20


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def opened(path: Path, what: Callable[[], object]) -> bool:
    """Whether ``what`` opens the file: the kernel tells."""
    libc = ctypes.CDLL(None, use_errno=True)
    events = libc.inotify_init1(os.O_NONBLOCK)
    assert libc.inotify_add_watch(events, os.fsencode(path), _IN_OPEN) >= 0
    try:
        with suppress(OSError, IncbakError):
            what()
        try:
            return bool(os.read(events, 4096))
        except BlockingIOError:
            return False
    finally:
        os.close(events)


def test_a_file_is_opened_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    (tmp_path / "link").symlink_to("x")
    fd = open_image(tmp_path / "link", os.O_RDWR)
    assert os.pread(fd, 7, 0) == b"content"
    assert os.pwrite(fd, b"C", 0) == 1
    assert not os.get_inheritable(fd)
    os.close(fd)


def test_of_a_link_no_regular_file_is_opened(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    (tmp_path / "link").symlink_to("x")
    os.close(open_regular(tmp_path / "x", os.O_RDONLY))
    with pytest.raises(OSError, match="not a regular file"):
        open_regular(tmp_path / "link", os.O_RDONLY)


def test_what_is_no_file(tmp_path: Path, fifo: Path) -> None:
    sock = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(sock))
    for path in (fifo, sock, Path("/dev/null")):
        with pytest.raises(OSError, match="neither a file nor a block device") as caught:
            open_image(path, os.O_RDONLY)
        assert caught.value.errno == errno.EINVAL
    with pytest.raises(IsADirectoryError):
        open_image(tmp_path, os.O_RDONLY)
    with pytest.raises(FileNotFoundError):
        open_image(tmp_path / "nothing", os.O_RDONLY)


def _certificates(path: Path) -> None:
    (path.parent / "ca-cert.pem").symlink_to(path)
    try:
        client_context(path.parent, hostname=None)
    finally:
        (path.parent / "ca-cert.pem").unlink()


def test_a_text_may_come_through_a_link_or_a_pipe_of_the_shell(tmp_path: Path, fifo: Path) -> None:
    (tmp_path / "x").write_bytes(b"content")
    (tmp_path / "link").symlink_to("x")
    with open_text(tmp_path / "link") as file:
        assert file.read() == b"content"
    reading, writing = os.pipe()
    os.write(writing, b"said")
    os.close(writing)
    with open_text(f"/dev/fd/{reading}") as file:
        assert os.get_blocking(file.fileno())
        assert file.read() == b"said"
    os.close(reading)
    for path in (fifo, Path("/dev/null"), Path("/dev/zero")):
        with pytest.raises(OSError, match="not a regular file"):
            open_text(path)


def test_metrics_replace_metrics_only(tmp_path: Path) -> None:
    (tmp_path / "disk.raw").write_bytes(bytes(512))
    with pytest.raises(UsageError, match="has no metrics"):
        write_metrics(tmp_path / "disk.raw", "v", 0, None)
    assert (tmp_path / "disk.raw").read_bytes() == bytes(512)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "dir").mkdir()
    (tmp_path / "link").symlink_to("fifo")
    for name in ("fifo", "dir", "link"):
        with pytest.raises(UsageError, match="is no regular file"):
            write_metrics(tmp_path / name, "v", 0, None)
    with pytest.raises(UsageError, match="below /dev"):
        write_metrics(Path("/dev/stdout"), "v", 0, None)
    (tmp_path / "m").touch()
    for _ in range(2):
        write_metrics(tmp_path / "m", "v", 0, None)
    assert (tmp_path / "m").read_text().startswith("# HELP incbak_")


USERS: dict[str, Callable[[Path], object]] = {
    "disk": lambda path: open_disk(path, read_only=True, lock=False),
    "format": probe_format,
    "lock": lambda path: writer_present(str(path)),
    "sync": lambda path: sync_files([str(path)]),
    "bitmap": view_file,
    "fingerprint": partial(take_path, raw=True),
    "recognise": recognise,
    "header": qcow2.read_header,
    "attachment": lambda path: read_attachments([path]),
    "passphrase": lambda path: Passphrase(environment={"INCBAK_PASSWORD_FILE": str(path)})(),
    "passphrase of the configuration": lambda path: Passphrase(str(path), environment={})(),
    "configuration": load,
    "report": _replaceable,
    "metrics": lambda path: write_drill_metrics(path, "v", Drills()),
    "certificates": _certificates,
    "identity": read_identity,
}


@pytest.mark.parametrize("user", list(USERS))
def test_a_name_of_something_else_is_not_opened(fifo: Path, user: str) -> None:
    """A FIFO stands for devices whose opening does something."""
    assert not opened(fifo, lambda: USERS[user](fifo))
    (fifo.parent / "file").write_bytes(bytes(512))
    assert opened(fifo.parent / "file", lambda: USERS[user](fifo.parent / "file"))

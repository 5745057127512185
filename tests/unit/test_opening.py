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

from incbak.bitmap.store import view_file
from incbak.disk.file import open_disk, probe_format
from incbak.disk.locks import writer_present
from incbak.engine.qemu import _sync_files
from incbak.errors import DiskError
from incbak.fingerprint import take_path
from incbak.opening import open_image, open_regular

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
        with suppress(OSError, DiskError):
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


USERS: dict[str, Callable[[Path], object]] = {
    "disk": lambda path: open_disk(path, read_only=True, lock=False),
    "format": probe_format,
    "lock": lambda path: writer_present(str(path)),
    "sync": lambda path: _sync_files([str(path)]),
    "bitmap": view_file,
    "fingerprint": partial(take_path, raw=True),
}


@pytest.mark.parametrize("user", list(USERS))
def test_a_name_of_something_else_is_not_opened(fifo: Path, user: str) -> None:
    """A FIFO stands for devices whose opening does something."""
    assert not opened(fifo, lambda: USERS[user](fifo))
    (fifo.parent / "file").write_bytes(bytes(512))
    assert opened(fifo.parent / "file", lambda: USERS[user](fifo.parent / "file"))

"""What incbak makes is the user's alone, whatever the umask."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from incbak import durable
from incbak.bitmap.store import BitmapStore
from incbak.fingerprint import Fingerprint
from incbak.nbd.server import bind_unix
from incbak.private import PrivateDirectory
from tests.unit.repo.scene import new


@pytest.fixture(params=[0o000, 0o077], ids=["000", "077"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(request.param)
    yield tmp_path
    os.umask(before)


def _socket(place: Path) -> None:
    bind_unix(place / "run" / "incbak" / "web1" / "nbd.sock").close()


def _bitmap(place: Path) -> None:
    store = BitmapStore(place / "state" / "deep", "vm", "disk")
    store.lock()
    store.create("b", 1 << 20, 65536, Fingerprint(1 << 20, 0, 0, bytes(16))).close(None)
    store.unlock()


def _private(place: Path) -> None:
    made = PrivateDirectory()
    assert made.path.parent == place
    (made.path / "seen").touch(0o600)


MAKERS: dict[str, Callable[[Path], object]] = {
    "socket": _socket,
    "bitmap": _bitmap,
    "private": _private,
    "file": lambda place: durable.write_new(place / "f", [b"x"]),
    "repository": lambda place: new(place / "deep" / "repo"),
}


@pytest.mark.parametrize("made", list(MAKERS))
def test_nobody_else_can_look(place: Path, made: str) -> None:
    MAKERS[made](place)
    found = list(place.rglob("*"))
    assert found
    for path in found:
        mode = path.lstat().st_mode & 0o777
        assert mode & 0o077 == 0, f"{path} has mode {mode:o}"
        assert mode & 0o600 == 0o600 or path.is_symlink() or mode == 0o400, f"{path} has mode {mode:o}"


def test_a_directory_that_is_there_is_left_as_it_is(place: Path) -> None:
    (place / "there").mkdir(0o755)
    (place / "there").chmod(0o755)
    bind_unix(place / "there" / "sock").close()
    assert (place / "there").stat().st_mode & 0o777 == 0o755

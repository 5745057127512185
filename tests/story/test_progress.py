"""Progress of every long command: drawn on a terminal, gone in the end, and nowhere else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit import filesystems as make
from tests.kit.cli import Incbak
from tests.kit.serve import raw_image
from tests.kit.terminal import on_terminal

SIZE = 8 << 20
LEFT = re.compile(r"^ ?\d+% .* of 8\.0 MiB, .*/s, .* left$")


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    raw_image(tmp_path / "web1.raw", SIZE, b"x" * SIZE)
    return made


def test_a_backup_shows_rate_and_time_left(incbak: Incbak) -> None:
    shown = on_terminal(incbak, "full", incbak.root / "web1.raw", "--speed-limit", "2M")
    assert shown.code == 0
    assert any(LEFT.match(frame) for frame in shown.frames), shown.frames
    assert shown.screen == []
    assert shown.out.startswith("web1 disk0: full ")
    shown = on_terminal(incbak, "full", incbak.root / "web1.raw", "--speed-limit", "2M", columns=30)
    assert any("%" in frame for frame in shown.frames)
    assert 25 <= max(len(frame) for frame in shown.frames if "%" in frame) <= 29  # cut, or it would be wrapped


def test_every_long_command_shows_where_it_is(incbak: Incbak) -> None:
    image = incbak.root / "web1.raw"
    for n in range(3):
        with image.open("r+b") as f:
            f.write(bytes([n + 1]) * (SIZE // 2))
        incbak("full", image)
    for argv, pattern in (
        (["restore", "latest", incbak.root / "out.raw"], r"% .* of 8\.0 MiB"),
        (["check", "--read-data"], r"% .* of .*B"),
        (["bitmap", "verify", image], r"comparing with the base: +0% 0 B of 8\.0 MiB"),
        (["prune", "--keep-last", "1"], r"looking through: +\d+% \d of 1 disks"),
        (["prune", "--keep-last", "1", "--grace", "0", "--repack-below", "100%"], r"looking through"),
    ):
        shown = on_terminal(incbak, *argv)
        assert shown.code == 0, (argv, shown)
        assert any(re.search(pattern, frame) for frame in shown.frames), (argv, shown.frames)
        assert shown.screen == [], argv
        assert shown.out, argv


def test_copying_files_shows_how_much(incbak: Incbak, tmp_path: Path) -> None:
    make.need_pytsk3()
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "file").write_bytes(b"x" * (4 << 20))
    incbak("full", make.ext4(tmp_path / "disk.raw", tmp_path / "source"))
    shown = on_terminal(incbak, "files", "cp", "latest", "/file", tmp_path)
    assert (shown.code, shown.screen) == (0, [])
    assert any("MiB" in frame or "0 B" in frame for frame in shown.frames), shown.frames


@pytest.mark.parametrize(
    ("extra", "env", "terminal"), [((), {}, False), (("-q",), {}, True), ((), {"TERM": "dumb"}, True)]
)
def test_nothing_where_nobody_looks(
    incbak: Incbak, extra: tuple[str, ...], env: dict[str, str], terminal: bool
) -> None:
    argv = ["full", incbak.root / "web1.raw", "--speed-limit", "4M", *extra]
    if terminal:
        assert on_terminal(incbak, *argv, env=env).drawn == ""
    else:
        assert incbak(*argv, env=env).err == ""


def test_an_error_stands_on_a_line_of_its_own(incbak: Incbak) -> None:
    incbak("full", incbak.root / "web1.raw")
    for pack in (incbak.repo / "packs").iterdir():
        pack.chmod(0o600)
        pack.write_bytes(pack.read_bytes()[:64] + bytes(64) + pack.read_bytes()[128:])
    shown = on_terminal(incbak, "check", "--read-data")
    assert shown.code == 13
    assert all(line.startswith("incbak: ") for line in shown.screen), shown.screen

"""A user without a home or a name, and paths that are not UTF-8: what can work works, the rest is refused first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from incbak import host
from incbak.errors import UsageError
from incbak.fleet import config
from tests.kit.cli import Incbak
from tests.kit.serve import raw_image

SIZE = 1 << 20
BYTES = "\udcff"
"""As Python has the byte FF of a path."""


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    raw_image(tmp_path / "d.raw", SIZE, os.urandom(SIZE))
    return Incbak(tmp_path)


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user whom passwd does not know, in an empty environment; the tests themselves run as root."""

    def none() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    monkeypatch.setattr(Path, "home", none)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME", "XDG_RUNTIME_DIR", "INCBAK_STATE_DIR"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_home_there_is_no_state_directory_and_no_configuration(homeless: None) -> None:
    with pytest.raises(UsageError, match="HOME is not set") as caught:
        host.default_state_dir()
    assert "--state-dir" in caught.value.hint
    with pytest.raises(UsageError, match="HOME is not set"):
        host.runtime_dir()
    assert not config.default_path().exists()


_HOMELESS = """
import os, sys
from pathlib import Path
os.geteuid = lambda: 54321
def none(*_):
    raise RuntimeError("Could not determine home directory.")
Path.home = none
os.environ.pop("INCBAK_STATE_DIR")
from incbak.cli.start import main
main()
"""


def _homeless(incbak: Incbak, *argv: str | Path) -> tuple[int, str]:
    command = [sys.executable, "-c", _HOMELESS, *map(str, argv)]
    ran = subprocess.run(command, env=incbak.environment(), capture_output=True, text=True, timeout=60, check=False)
    return ran.returncode, ran.stderr


def test_without_a_home_a_repository_can_be_read(incbak: Incbak, tmp_path: Path) -> None:
    """What needs no state works; what needs it says so, and what to type."""
    incbak("init")
    incbak("full", tmp_path / "d.raw")
    for argv in (["list"], ["check"], ["show", "latest"], ["restore", "latest", tmp_path / "out.raw"]):
        assert _homeless(incbak, *argv) == (0, "")
    assert (tmp_path / "out.raw").read_bytes() == (tmp_path / "d.raw").read_bytes()
    for argv in (["full", tmp_path / "d.raw"], ["status", tmp_path / "d.raw"], ["bitmap", "list"]):
        code, err = _homeless(incbak, *argv)
        assert (code, "HOME is not set" in err, "--state-dir DIR" in err) == (2, True, True), err
    assert _homeless(incbak, "--state-dir", tmp_path / "state2", "full", tmp_path / "d.raw") == (0, "")


def test_a_repository_may_be_anywhere(incbak: Incbak, tmp_path: Path) -> None:
    repo, out = tmp_path / f"r{BYTES}", tmp_path / f"out{BYTES}.raw"
    incbak("-r", repo, "init")
    incbak("-r", repo, "full", tmp_path / "d.raw")
    assert len(incbak("-r", repo, "--json", "list").objects()) == 1
    incbak("-r", repo, "check")
    (told,) = incbak("-r", repo, "--json", "restore", "latest", out).objects()
    assert told["target"] == str(out)
    assert out.read_bytes() == (tmp_path / "d.raw").read_bytes()


@pytest.mark.parametrize(
    "argv",
    [
        ["full", f"{{tmp}}/d{BYTES}.raw"],
        ["incremental", f"qmp:{{tmp}}/{BYTES}"],
        ["full", "{tmp}/d.raw", "--name", BYTES],
        ["full", "{tmp}/d.raw", "--tag", BYTES],
        ["full", "{tmp}/d.raw", "--attach", f"{{tmp}}/a{BYTES}"],
        ["serve", f"vda={{tmp}}/d{BYTES}.raw", "--name", "v"],
        ["watch", f"qmp:{{tmp}}/{BYTES}"],
        ["export", "latest", "--socket", f"{{tmp}}/{BYTES}"],
    ],
)
def test_what_would_get_into_a_record_is_refused_before_anything_is_done(
    incbak: Incbak, tmp_path: Path, argv: list[str]
) -> None:
    incbak("init")
    (tmp_path / f"d{BYTES}.raw").symlink_to("d.raw")
    (tmp_path / f"a{BYTES}").write_text("text")
    ran = incbak.run(*(word.replace("{tmp}", str(tmp_path)) for word in argv))
    assert (ran.code, "is not UTF-8" in ran.err) == (2, True), ran
    assert incbak.list() == []


def test_so_is_a_working_directory(incbak: Incbak, tmp_path: Path) -> None:
    incbak("init")
    there = tmp_path / f"x{BYTES}"
    there.mkdir()
    (there / "d.raw").symlink_to(tmp_path / "d.raw")
    top = Path(__file__).parents[3]
    process = incbak.popen("full", "d.raw", cwd=there, env={"PYTHONPATH": str(top)})
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "is not UTF-8" in err) == (2, True), err


def test_units_do_not_follow_a_link(incbak: Incbak, tmp_path: Path) -> None:
    """A directory that others can write to: what is there is replaced, not written through."""
    (tmp_path / "c.toml").write_text('[defaults]\nrepository = "/r"\n[vms.a]\nsource = "/a.raw"\n')
    (tmp_path / "units").mkdir()
    (tmp_path / "victim").write_text("mine")
    show = ["--config", tmp_path / "c.toml", "schedule", "show", "systemd", "--to", tmp_path / "units"]
    incbak(*show)
    units = sorted((tmp_path / "units").iterdir())
    texts = [unit.read_text() for unit in units]
    for unit in units:
        unit.unlink()
        unit.symlink_to(tmp_path / "victim")
    incbak(*show)
    assert (tmp_path / "victim").read_text() == "mine"
    assert [unit.read_text() for unit in units] == texts
    assert {unit.lstat().st_mode & 0o777 for unit in units} == {0o644}

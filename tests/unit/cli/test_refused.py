"""What is refused before anything is done: options that contradict each other or do nothing, names, paths."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from incbak.cli import main
from incbak.cli.given import refuse_tree, refuse_unfit_name
from incbak.cli.main import cli
from incbak.errors import IncbakError, UsageError
from incbak.repo.repository import Repository


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in [name for name in os.environ if name.startswith("INCBAK_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("INCBAK_STATE_DIR", str(tmp_path / "state"))
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    Repository.init(tmp_path / "repo").close()
    return tmp_path


def _run(place: Path, *argv: str) -> tuple[int, str, str]:
    """Exit code, message, output."""
    ran = CliRunner().invoke(cli, [a.replace("{}", str(place)) for a in argv], standalone_mode=False)
    error = ran.exception
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), ran.output
    if isinstance(error, IncbakError):
        return error.exit_code, f"{error} {error.hint}", ran.output
    assert error is None, ran
    return 0, "", ran.output


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("-r", "{}/two", "init", "{}/one"), "two places"),
        (("-r", "{}/repo", "export", "latest", "--tcp", "localhost:0", "--socket", "{}/s"), "exclude each other"),
        (("-r", "{}/repo", "export", "latest", "--scratch-dir", "{}"), "--scratch-dir has no effect"),
        (("-r", "{}/repo", "full", "{}/a.raw", "--jobs", "3"), "--jobs has no effect"),
        (("-r", "{}/repo", "status", "{}/a.raw", "--jobs=2"), "--jobs has no effect"),
        (("-r", "{}/repo", "drill", "--jobs", "2"), "--jobs has no effect"),
        (("-r", "{}/repo", "drill", "--seed", "2"), "--seed has no effect without --sample"),
        (("-r", "{}/repo", "drill", "--boot-timeout", "2m"), "--boot-timeout has no effect without --boot"),
        (("-r", "{}/repo", "drill", "--qemu-arg=-x"), "--qemu-arg has no effect"),
        (("-r", "{}/repo", "check", "--read-data", "--read-data-subset", "5%"), "exclude each other"),
        (("-r", "{}/repo", "full", "qmp:{}/s", "--format", "raw"), "not for a monitor"),
        (("-r", "{}/repo", "incremental", "qmp:{}/s", "--allow-backing", "{}"), "not for a monitor"),
        (("bitmap", "list", "qmp:{}/s", "--format", "qcow2"), "not for a monitor"),
        (("-r", "{}/repo", "full", "{}/a.raw", "--name", ""), "name of a VM is empty"),
        (("-r", "{}/repo", "list", "--name", ""), "name of a VM is empty"),
        (("-r", "{}/repo", "prune", "--keep-last", "1", "--name="), "name of a VM is empty"),
        (("serve", "--name", "", "vda={}/a.raw"), "name of a VM is empty"),
        (("-r", "{}/repo", "full", "{}/a.raw", "--name", "../x"), "it would be a path"),
        (("-r", "{}/repo", "full", "{}/a.raw", "--name", "a\nb"), "it has a control character"),
        (("serve", "--name", "a/b", "vda={}/a.raw"), "it would be a path"),
        (("watch", "qmp:{}/s", "--name", "a\x1bb"), "it has a control character"),
        (("serve", "--name", "v", "--socket", "{}/no/such/s", "vda={}/a.raw"), "there is no directory"),
        (("serve", "--name", "v", "--monitor", "{}/no/such/s", "vda={}/a.raw"), "there is no directory"),
        (("-r", "{}/repo", "export", "latest", "--socket", "{}/no/such/s"), "there is no directory"),
        (("init", "{}/no/such"), "mkdir -p"),
        (("--config", "{}/none", "-r", "{}/repo", "list"), "cannot read the configuration"),
        (("-r", "{}/repo", "list", "--config", "{}/a.raw"), "a.raw"),
        (("init", "{}/new", "--config", "{}"), "cannot read the configuration"),
    ],
)
def test_it_is_a_usage_error_and_nothing_was_done(place: Path, argv: tuple[str, ...], says: str) -> None:
    before = sorted(str(p) for p in place.rglob("*"))
    code, message, _out = _run(place, *argv)
    assert (code, says in message) == (2, True), message
    assert sorted(str(p) for p in place.rglob("*")) == before


def test_a_name_that_is_there_already_goes_on_working(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = ("-r", "{}/repo", "full", "{}/a.raw", "--name", "old/name")
    with monkeypatch.context() as before:
        before.setattr("incbak.backup.vm.unfit", lambda name: "")
        assert _run(place, *full)[0] == 0
    assert _run(place, *full)[0] == 0
    assert (place / "state" / "old%2Fname").is_dir()
    refuse_unfit_name("old/name", place / "state")
    with pytest.raises(UsageError):
        refuse_unfit_name("new/name", place / "state")


def test_a_last_directory_is_made(place: Path) -> None:
    refuse_tree("it", place)
    with pytest.raises(UsageError, match="there is no directory"):
        refuse_tree("it", place / "no" / "such")
    assert _run(place, "init", "{}/new")[0] == 0
    assert (place / "new" / "config").exists()


def test_a_damaged_configuration_at_its_default_place_does_not_prevent_anything(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "bad.toml").write_text("[")
    monkeypatch.setattr("incbak.cli.settings.default_path", lambda: place / "bad.toml")
    assert _run(place, "-r", "{}/repo", "list")[0] == 0
    monkeypatch.setenv("INCBAK_CONFIG", str(place / "bad.toml"))
    assert _run(place, "-r", "{}/repo", "list")[0] == 0


def test_a_repository_of_the_environment_that_cannot_be_read_is_not_looked_at(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INCBAK_REPOSITORY", str(place / "secret"))
    monkeypatch.setattr("os.access", lambda *args, **more: False)
    (place / "secret").mkdir(mode=0)
    assert _run(place, "bitmap", "list")[0] == 0
    assert _run(place, "-r", "{}/repo", "list")[0] == 0


def test_a_message_of_choices_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["incbak", "schedule", "show"])
    assert main._status() == 2
    assert "Choose from: cron, systemd\n" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["cron", "systemd"])
@pytest.mark.parametrize("given", [True, False])
def test_what_is_scheduled_has_the_state_directory(place: Path, kind: str, given: bool) -> None:
    config = place / "c.toml"
    config.write_text(
        '[vms.v]\nsource = "qmp:/x"\nwatch = "qmp:/w"\nrepository = "/r"\n[vms.v.serve]\nvda = "/a.raw"\n'
    )
    config.chmod(0o600)
    more = ("--state-dir", "{}/mine") if given else ()
    code, _message, out = _run(place, "schedule", "show", kind, "--config", "{}/c.toml", *more)
    lines = [line for line in out.splitlines() if " --config " in line or "ExecStart" in line]
    where = place / ("mine" if given else "state")
    assert code == 0
    assert lines
    assert [line for line in lines if f"--state-dir {where}" not in line] == []


def test_the_state_directory_of_the_environment_does_not_win_over_the_configuration(place: Path) -> None:
    config = place / "c.toml"
    config.write_text('[vms.v]\nsource = "qmp:/x"\nrepository = "/r"\nstate-dir = "/s"\n')
    config.chmod(0o600)
    assert "--state-dir" not in _run(place, "schedule", "show", "cron", "--config", "{}/c.toml")[2]

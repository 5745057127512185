"""What an owner decides once, in the configuration: for all VMs, for one, and for the services that belong to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak.cli.configured import _options
from incbak.cli.settings import Settings
from incbak.errors import UsageError
from incbak.fleet.config import Config, load
from incbak.fleet.schedule import systemd


def _config(directory: Path, defaults: str, own: str) -> Config:
    path = directory / "incbak.toml"
    path.write_text(f'[defaults]\n{defaults}\n[vms.web1]\nsource = "/srv/web1.raw"\n{own}\n')
    path.chmod(0o600)
    return load(path)


@pytest.mark.parametrize("key", ["strict", "ignore-ctime"])
@pytest.mark.parametrize(
    ("defaults", "own", "given"),
    [("", "", False), ("true", "", True), ("", "true", True), ("true", "false", False), ("false", "true", True)],
)
def test_the_word_of_a_vm_wins(tmp_path: Path, key: str, defaults: str, own: str, given: bool) -> None:
    """Also ``false``: it is said, and not left out."""
    lines = [f"{key} = {value}" if value else "" for value in (defaults, own)]
    vm = _config(tmp_path, *lines).vm("web1")
    assert list(_options(Settings(), "web1", vm, {f"--{key}"})) == ["--name", "web1", *([f"--{key}"] if given else [])]
    assert list(_options(Settings(), "web1", vm, set())) == ["--name", "web1"]


@pytest.mark.parametrize("value", ["1", '"yes"'])
def test_what_is_neither_true_nor_false_is_named(tmp_path: Path, value: str) -> None:
    with pytest.raises(UsageError, match=r"vms\.web1\.strict: expected `bool"):
        _config(tmp_path, "", f"strict = {value}")


def test_what_is_below_is_trusted_by_name(tmp_path: Path) -> None:
    vm = _config(tmp_path, "", 'trust-backing = ["nbd:a", "rbd:b"]').vm("web1")
    assert list(_options(Settings(), "web1", vm, {"--trust-backing"}))[2:] == [
        "--trust-backing", "nbd:a", "--trust-backing", "rbd:b",
    ]  # fmt: skip


@pytest.mark.parametrize("said", [True, False])
def test_services_record_as_backups_do(tmp_path: Path, said: bool) -> None:
    """Of one image a serve, a watch and a backup that is off leave bitmaps for one another."""
    own = 'watch = "qmp:/run/web1.watch"\nserve = {vda = "/srv/web1.raw"}'
    config = _config(tmp_path, "ignore-ctime = true" if said else "", own)
    units = systemd("incbak", ["--config", str(tmp_path / "incbak.toml")], config)
    for name in ("incbak-serve-web1.service", "incbak-watch-web1.service"):
        assert ("--ignore-ctime" in units[name]) is said

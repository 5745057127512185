"""``incbak doctor``: a healthy host has no fault; each thing that is wrong is named, with the next step."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest

from incbak.repo import record as records
from tests.kit.cli import Incbak, Ran
from tests.kit.serve import raw_image, serving

SIZE = 4 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    raw_image(tmp_path / "web1.raw", SIZE, b"x" * SIZE)
    return made


def looked(incbak: Incbak, *argv: str | Path, env: dict[str, str] | None = None) -> tuple[int, list[dict[str, Any]]]:
    """The exit code, and what was found that is not in order."""
    ran: Ran = incbak.run("--json", "doctor", *argv, env=env)
    return ran.code, [f for f in ran.objects() if f["level"] != "ok"]


def about(found: list[dict[str, Any]], what: str) -> str:
    """The texts and hints about one thing."""
    return " ".join(f"{f['level']}: {f['text']} {f['hint']}" for f in found if f["what"] == what)


def everything(root: Path) -> dict[str, tuple[int, bytes]]:
    """Names, times of change and content of all files."""
    return {str(p): (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else b"") for p in sorted(root.rglob("*"))}


def test_a_healthy_host_has_no_fault_and_nothing_changes(incbak: Incbak) -> None:
    incbak("full", incbak.root / "web1.raw")
    before = everything(incbak.root)
    code, found = looked(incbak, incbak.root / "web1.raw")
    assert code == 0
    assert [f for f in found if f["level"] == "fault"] == []
    assert about(found, "backups") == ""
    after = everything(incbak.root)
    assert {k: v[1] for k, v in after.items()} == {k: v[1] for k, v in before.items()}
    assert "no fault" not in incbak("-q", "doctor").out
    assert "web1: newest is" in incbak("doctor").out


def test_a_monitor_is_looked_at_and_its_disks_are_listed(incbak: Incbak) -> None:
    with serving(incbak.root, {"vda": incbak.root / "web1.raw"}, "--name", "web1") as serve:
        source = f"qmp:{serve.monitor}"
        incbak("full", source)
        out = incbak("doctor", source).out
        assert "disk vda: raw, 4.0 MiB; its bitmaps outlast a restart" in out
        assert "bitmaps: 1 in use" in out
        os.chmod(serve.monitor, 0o666)
        incbak.root.chmod(0o755)
        code, found = looked(incbak, source)
        assert code == 0
        assert about(found, source).startswith("warning: every user of this host can connect")


def test_each_thing_that_is_wrong_is_named(incbak: Incbak, tmp_path: Path) -> None:
    incbak("full", incbak.root / "web1.raw")
    (record,) = (incbak.repo / "backups").iterdir()
    record.write_bytes(b"x" + record.read_bytes()[1:])
    incbak.repo.chmod(0o755)
    incbak.state.chmod(0o777)
    (bitmap,) = incbak.state.rglob("*.bitmap")
    bitmap.write_bytes(bytes(8192))
    code, found = looked(incbak, f"qmp:{tmp_path}/nobody")
    assert code == 1
    assert "Run: incbak check" in about(found, "backups")
    assert about(found, "storage").startswith(f"warning: {incbak.repo} can be read by others")
    assert "mode 0777" in about(found, "state directory")
    assert "web1 disk0" in about(found, "bitmaps")
    assert about(found, f"qmp:{tmp_path}/nobody").startswith("fault: ")
    assert incbak.run("-q", "doctor").out.count("FAULT") == 1


@pytest.mark.parametrize(
    ("config", "said"), [(None, "is not a repository"), (b"{}", "malformed"), (b'{"version": 99}', "is of format 99")]
)
def test_what_is_no_repository(incbak: Incbak, config: bytes | None, said: str) -> None:
    path = incbak.repo / "config"
    path.unlink() if config is None else path.write_bytes(config)
    code, found = looked(incbak)
    assert code == 1
    assert said in about(found, "repository")


@pytest.mark.parametrize(("days", "said"), [(-9, "Is the timer"), (2, "yet to come")])
def test_old_backups_and_those_from_the_future_are_told(incbak: Incbak, days: int, said: str) -> None:
    incbak("full", incbak.root / "web1.raw")
    (path,) = (incbak.repo / "backups").iterdir()
    then = (datetime.now(UTC) + timedelta(days=days)).isoformat()
    old = records.decode(path.name, path.read_bytes())
    path.chmod(0o600)
    path.write_bytes(records.encode(msgspec.structs.replace(old, finished=then)))
    shutil.rmtree(incbak.state / ".repositories")  # this host knows that the record was another
    code, found = looked(incbak)
    assert code == 0
    assert said in about(found, "backups")


def test_a_repository_that_is_locked_is_told(incbak: Incbak) -> None:
    incbak("full", incbak.root / "web1.raw")
    with (incbak.repo / "locks" / "repository.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _, found = looked(incbak)
    assert about(found, "locks").startswith("warning: ")


def test_programs_that_are_missing_are_warnings(incbak: Incbak) -> None:
    code, found = looked(incbak, env={"PATH": str(incbak.root)})
    assert code == 0
    assert "no restores to qcow2" in about(found, "qemu-img")


def test_a_silent_monitor_is_a_fault_and_no_hang(incbak: Incbak) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(incbak.root / "silent"))
        listener.listen()
        source = f"qmp:{incbak.root}/silent"
        code, found = looked(incbak, source, "--monitor-wait", "0.5")
    assert code == 1
    assert "no greeting" in about(found, source)


@pytest.mark.parametrize("argv", [["qmp:"], ["--monitor-wait", "soon"], ["--colour"], ["a", "b"]])
def test_wrong_arguments(incbak: Incbak, argv: list[str]) -> None:
    ran = incbak.run("doctor", *argv)
    assert (ran.code, ran.out) == (2, "")
    assert "Traceback" not in ran.err


def test_the_configuration_is_looked_at(incbak: Incbak) -> None:
    config = incbak.root / "incbak.toml"
    config.write_text(f'[vms.web1]\nsource = "{incbak.root}/web1.raw"\nrepository = "{incbak.repo}"\n')
    config.chmod(0o600)
    code, found = looked(incbak, "web1", env={"INCBAK_CONFIG": str(config)})
    assert (code, about(found, "configuration")) == (0, "")
    config.write_text("[vms.web1]\nsauce = 1")
    code, found = looked(incbak, env={"INCBAK_CONFIG": str(config)})
    assert (code, "vms.web1" in about(found, "configuration")) == (1, True)


def test_json_is_one_object_per_line(incbak: Incbak) -> None:
    for line in incbak("--json", "doctor").out.splitlines():
        assert set(json.loads(line)) == {"level", "what", "text", "hint"}

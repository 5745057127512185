"""What is printed is in its order, complete, and names what is meant."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from incbak.bitmap.store import BitmapStore
from incbak.cli.configured import Done
from incbak.cli.main import cli
from incbak.disk.memory import MemoryDisk
from incbak.doctor import source as doctor
from incbak.doctor.finding import Level
from incbak.drill.partitions import Part
from incbak.drill.scratch import Scratch as DrillScratch
from incbak.engine.base import EngineDisk
from incbak.engine.qemu import _explain
from incbak.engine.qemu_filter import DiskFilter
from incbak.engine.qemu_storing import UNFLUSHED
from incbak.export.overlay import Overlay
from incbak.fleet.config import load
from incbak.fleet.schedule import left_out
from incbak.serve.scratch import Budget, Scratch
from tests.kit.need import need_root

CONFIG = """
[defaults]
repository = "/backup"
[vms.web9]
source = "/srv/web9.raw"
[vms.web9.keep]
daily = 7
[vms.db]
source = "qmp:/run/incbak/db/qmp.sock"
[vms.db.serve]
vda = "/srv/db.raw"
[vms.app]
source = "qmp:/run/app.qmp"
watch = "qmp:/run/app.watch"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "incbak.toml"
    path.write_text(CONFIG)
    path.chmod(0o600)
    return path


def test_status_of_all_is_in_the_order_of_the_configuration(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever answers first."""
    ended = [Done(vm, 0, json.dumps({"vm": vm}) + "\n", "") for vm in ("app", "db", "web9")]
    monkeypatch.setattr("incbak.cli.status.run_all", lambda *_, **__: iter(ended))
    ran = CliRunner().invoke(cli, ["--json", "status", "--all", "--config", str(config)], catch_exceptions=False)
    assert [json.loads(line)["vm"] for line in ran.output.splitlines()] == ["web9", "db", "app"]


def test_a_schedule_says_what_it_leaves_out(config: Path) -> None:
    found = left_out("cron", load(config))
    assert [text.split(":")[0] for text in found] == [
        "incbak serve of db is left out",
        "incbak watch of app is left out",
        "backups of app, db are never pruned",
        "no backup is copied to a second place",
    ]
    assert left_out("systemd", load(config)) == found[2:]
    config.write_text(CONFIG + '[defaults.keep]\nlast = 1\n[sync]\ntarget = "/mnt"\n')
    assert left_out("systemd", load(config)) == []


def test_it_is_on_stderr(config: Path) -> None:
    """Standard output goes into /etc/cron.d."""
    ran = CliRunner().invoke(cli, ["schedule", "show", "cron", "--config", str(config)], catch_exceptions=False)
    assert "never pruned" in ran.stderr
    assert "never pruned" not in ran.stdout


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_knows_a_watch_that_runs(tmp_path: Path) -> None:
    """It holds the bitmaps of the disk in the state directory."""
    disk = EngineDisk("vda", 1 << 20, "vda", can_persist=False)
    assert not doctor._held(tmp_path, "vm", disk)
    store = BitmapStore(tmp_path, "vm", "vda")
    store.lock()
    try:
        assert doctor._held(tmp_path, "vm", disk)
        assert not doctor._held(tmp_path, "other", disk)
    finally:
        store.unlock()
    assert not doctor._held(tmp_path, "vm", disk)
    watched, alone = (doctor._disk("qemu", disk, watched=each) for each in (True, False))
    assert (watched.level, "incbak watch keeps them" in watched.text) == (Level.OK, True)
    assert (alone.level, "incbak watch" in alone.hint) == (Level.WARNING, True)
    unflushed = EngineDisk("vda", 1 << 20, "vda", extra={UNFLUSHED: True})
    found = doctor._disk("qemu", unflushed, watched=False)
    assert (found.level, "cache=unsafe" in found.text, "cache=none" in found.hint) == (Level.WARNING, True, True)


# -- scratch space that is used up -------------------------------------------------------------------------------------


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A directory whose file system has room for 256 KiB."""
    need_root()
    where = tmp_path / "small"
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], check=True, timeout=20)
    yield where
    subprocess.run(["umount", "--lazy", where], check=True, timeout=20)


@pytest.mark.root
def test_a_scratch_file_system_that_is_full_is_named(
    full: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """By serve, by a drill, by a writable export, and for the scratch file that QEMU writes to."""
    overlay = Overlay(MemoryDisk(4 << 20, name="vda"), full)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            overlay.write(memoryview(bytes(4 << 20)), 0)
    assert caplog.messages == [f"vda: the file system of the scratch directory {full} is full"]
    overlay.close()
    scratch = Scratch(Budget(full, 1 << 30), 4 << 20)
    with pytest.raises(OSError, match=f"the file system of the scratch directory {full} is full") as caught:
        scratch.write(memoryview(bytes(4 << 20)), 0)
    assert caught.value.errno == errno.ENOSPC
    disk = DiskFilter.__new__(DiskFilter)
    disk.why_cut, disk.bound, disk.scratch_dir = "", 1 << 30, full
    disk.scratch = os.open(full, os.O_TMPFILE | os.O_RDWR)
    assert _explain(disk, "No space left on device") == (
        f"the file system of the scratch directory {full} is full: No space left on device"
    )
    drill = DrillScratch(Part(1, 0, 4 << 20), full)
    with pytest.raises(OSError, match=f"scratch directory {full}: No space left"):
        drill.put(bytes(4 << 20), 0)
    drill.close()
    scratch.close()
    os.close(disk.scratch)
    disk.scratch = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    assert _explain(disk, "Input/output error") == "Input/output error"
    os.close(disk.scratch)

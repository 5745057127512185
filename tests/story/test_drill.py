"""``incbak drill`` as a user sees it: exit codes, what is written down, and where it is shown."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.kit.bootable import boot_sector
from tests.kit.cli import Incbak
from tests.kit.live import eventually
from tests.kit.need import need
from tests.kit.serve import raw_image

SIZE = 4 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    for vm in ("web1", "web2"):
        made("full", raw_image(tmp_path / f"{vm}.raw", SIZE, vm.encode() * 100_000), "--name", vm)
    return made


def _spoil(incbak: Incbak) -> None:
    for pack in (incbak.repo / "packs").iterdir():
        data = bytearray(pack.read_bytes())
        data[len(data) // 3] ^= 1
        pack.write_bytes(data)


def test_the_latest_of_each_vm(incbak: Incbak) -> None:
    told = incbak("drill").out
    assert told.count(": good, in ") == 2
    assert told.count("64 of 64 clusters restored, the root digest matches") == 2
    assert incbak("-q", "drill", "--name", "web1").out == ""
    first, second = incbak("--json", "drill", "--seed", "7", "--sample", "10%").objects()
    assert [(o["vm"], o["good"], o["seed"], o["sample"]) for o in (first, second)] == [
        ("web1", True, 7, 10.0), ("web2", True, 7, 10.0)]  # fmt: skip
    assert "sample drawn with --seed 7" in incbak("drill", "--seed", "7", "--sample", "10%").out
    assert sorted(p.name for p in incbak.root.iterdir()) == ["repo", "state", "web1.raw", "web2.raw"]


def test_damage_exits_13_and_the_next_backup_mends_it(incbak: Incbak) -> None:
    _spoil(incbak)
    ran = incbak.run("drill", "--name", "web1")
    assert (ran.code, "do not verify" in ran.err or "match its digest" in ran.err) == (13, True), ran
    assert "failed" in incbak("status", incbak.root / "web1.raw", "--name", "web1").out.lower()
    assert incbak.run("drill").code == 13
    for vm in ("web1", "web2"):
        incbak("full", incbak.root / f"{vm}.raw", "--name", vm)
    assert incbak("drill").out.count(": good, in ") == 2


@pytest.mark.parametrize(("damaged", "code"), [(False, 1), (True, 13)])
def test_it_tells_how_it_went_where_it_cannot_be_written_down(incbak: Incbak, damaged: bool, code: int) -> None:
    """As on a full disk: on stdout and by the exit code, which damage decides."""
    if damaged:
        _spoil(incbak)
    no_space = {"INCBAK_FAULT_AT": "durable.synced:1:ENOSPC"}
    ran = incbak.run("drill", "--name", "web1", "--sample", "100%", env=no_space)
    assert (ran.code, "web1: drill of" in ran.out) == (code, True), ran
    assert ("cannot be written down" in ran.err, "No space left" in ran.err) == (True, True), ran
    assert list((incbak.repo / "drills").iterdir()) == []


def test_a_record_that_cannot_be_read(incbak: Incbak) -> None:
    newest = incbak.list()[-1]["id"]
    (incbak.repo / "backups" / newest).write_bytes(b"rot")
    ran = incbak.run("drill")
    assert (ran.code, "1 records cannot be read" in ran.err, "web1: drill of" in ran.out) == (13, True, True)


BAD = (
    (["--name", "web3"], "there is no backup of web3"),
    (["--backup", "0000"], "no backup begins with"),
    (["--name", "web1", "--disk", "vdz"], "has no disk 'vdz'"),
    (["--sample", "0"], "not a percentage"),
    (["--full", "--sample", "5%"], "exclude each other"),
    (["--boot", "--boot-expect", "("], "not a regular expression"),
    (["--boot", "--qemu", "qemu-none"], "qemu-none is not installed"),
    (["--metrics", "/tmp/x.prom"], "--metrics is for one VM"),
    (["web1", "--all"], "one was named"),
)


def test_bad_arguments(incbak: Incbak) -> None:
    for argv, says in BAD:
        ran = incbak.run("drill", *argv)
        assert (ran.code, says in ran.err) == (2, True), ran
    assert not list((incbak.repo / "drills").iterdir())


def test_a_scratch_directory_that_is_not_there(incbak: Incbak) -> None:
    need("mkfs.ext4")
    image = incbak.root / "ext.raw"
    raw_image(image, 16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", image], check=True, timeout=60)
    incbak("full", image, "--name", "ext")
    ran = incbak.run("drill", "--name", "ext", "--scratch-dir", incbak.root / "none")
    assert (ran.code, "cannot make a file in" in ran.err, "--scratch-dir" in ran.err) == (1, True, True)
    assert "ext disk disk0: ext4: good" in incbak("drill", "--name", "ext", "--scratch-dir", incbak.root).out


def test_it_is_shown_by_status_report_and_metrics(incbak: Incbak) -> None:
    image, page, metrics = (incbak.root / name for name in ("web1.raw", "report.html", "web1.prom"))
    (row,) = incbak("--json", "status", image, "--name", "web1").objects()
    assert (row["drill"], row["verified"]["within"]) == (None, None)
    assert "never" in incbak("status", image, "--name", "web1").out
    incbak("report", "--html", page)
    assert page.read_text().count("No drill yet.") == 2
    incbak("full", image, "--name", "web1", "--metrics", metrics)
    incbak("drill", "--name", "web1", "--metrics", metrics)
    (row,) = incbak("--json", "status", image, "--name", "web1").objects()
    assert (row["drill"]["good"], row["drill"]["age"] < 300, row["drill"]["problems"]) == (True, True, [])
    incbak("report", "--html", page)
    assert (page.read_text().count("(all of it): good."), page.read_text().count("No drill yet.")) == (1, 1)
    good = _samples(metrics)
    assert abs(good['incbak_drill_timestamp_seconds{vm="web1"}'] - time.time()) < 300
    assert good['incbak_drill_run_exit_code{vm="web1"}'] == 0
    assert good['incbak_run_exit_code{vm="web1"}'] == 0
    _spoil(incbak)
    assert incbak.run("drill", "--name", "web1", "--metrics", metrics).code == 13
    bad = _samples(metrics)
    assert bad['incbak_drill_run_exit_code{vm="web1"}'] == 13
    kept = [k for k in good if "run_timestamp" not in k and "drill_run" not in k]
    assert {k: bad[k] for k in kept} == {k: good[k] for k in kept}
    incbak.run("full", incbak.root / "none.raw", "--name", "web1", "--metrics", metrics)
    assert _samples(metrics)['incbak_drill_run_exit_code{vm="web1"}'] == 13
    (row,) = incbak("--json", "status", image, "--name", "web1").objects()
    assert (row["drill"]["good"], row["drill"]["last_good"]["backup"] is not None) == (False, True)
    assert "FAILED, good" in incbak("status", image, "--name", "web1").out
    incbak("report", "--html", page)
    assert "failed: disk disk0: " in page.read_text()
    shutil.copytree(incbak.repo, incbak.root / "copy")
    (row,) = incbak("--json", "-r", incbak.root / "copy", "status", image, "--name", "web1").objects()
    assert row["drill"] is None


def _samples(path: Path) -> dict[str, float]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_all_vms_of_the_configuration(incbak: Incbak) -> None:
    config = incbak.root / "incbak.toml"
    tables = "".join(f'[vms.{vm}]\nsource = "{incbak.root}/{vm}.raw"\n' for vm in ("web1", "web2"))
    config.write_text(f'[defaults]\nrepository = "{incbak.repo}"\nscratch-dir = "{incbak.root}"\n{tables}')
    config.chmod(0o600)
    env = {"INCBAK_CONFIG": str(config), "INCBAK_REPOSITORY": ""}
    assert incbak("drill", "--all", "--sample", "50%", env=env).out.count(": good, in ") == 2
    config.write_text(config.read_text().replace("[vms.web2]", f'metrics = "{incbak.root}/m.prom"\n[vms.web3]'))
    ran = incbak.run("drill", "--all", "--jobs", "2", env=env)
    assert (ran.code, "web3 (exit code 2)" in ran.err, "web1: drill of" in ran.out) == (3, True, True), ran
    assert (incbak.root / "m.prom").exists()
    assert "web1: drill of" in incbak("drill", "web1", env=env).out
    assert incbak.run("drill", "web9", env=env).code == 2


@pytest.mark.qemu
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_qemu_ends_with_us(incbak: Incbak, number: int, code: int) -> None:
    need("qemu-system-x86_64")
    incbak("full", raw_image(incbak.root / "b.raw", 1 << 20, boot_sector("up")), "--name", "b")
    argv = ["--name", "b", "--boot", "--boot-expect", "never", "--qemu", "qemu-system-x86_64"]
    process = incbak.popen("drill", *argv, "--boot-memory", "64M", "--qemu-arg=-accel", "--qemu-arg=tcg")
    found: list[int] = []

    def qemu() -> list[int]:
        guards = _children(process.pid)
        found[:] = [pid for each in guards for pid in _children(each) if b"qemu-system" in _command(pid)]
        return [pid for pid in found if os.geteuid() != 0 or "\nUid:\t65534" in _status(pid)]

    eventually(qemu, 60, "QEMU runs, and has given up its rights")
    process.send_signal(number)
    process.communicate(timeout=60)
    assert process.returncode == code
    eventually(lambda: not _command(found[0]), 60, "QEMU is gone")
    assert incbak("status", incbak.root / "b.raw", "--name", "b").out.count("never") == 2


def _children(pid: int) -> list[int]:
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


def _status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _command(pid: int) -> bytes:
    """The command line up to its first argument; empty for what has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().partition(b"\0")[0]
    except (FileNotFoundError, ProcessLookupError):
        return b""


@pytest.mark.qemu
def test_a_boot(incbak: Incbak) -> None:
    need("qemu-system-x86_64")
    incbak("full", raw_image(incbak.root / "b.raw", 1 << 20, boot_sector("b login: ")), "--name", "b")
    argv = ["--boot", "--qemu", "qemu-system-x86_64", "--boot-memory", "64M", "--qemu-arg=-accel", "--qemu-arg=tcg"]
    assert "b: the guest was up after" in incbak("drill", "--name", "b", *argv).out
    assert incbak("--json", "status", incbak.root / "b.raw", "--name", "b").objects()[0]["drill"]["boot"]["good"]
    ran = incbak.run("drill", "--name", "b", *argv, "--boot-expect", "root@", "--boot-timeout", "1s")
    assert (ran.code, "'root@' (--boot-expect) did not come within 1 s; the console says:" in ran.err) == (1, True)

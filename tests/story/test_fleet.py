"""Many VMs by name: the configuration, ``--all``, hooks, metrics, ``status --max-age``, and what schedule prints."""

from __future__ import annotations

import configparser
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from incbak.cli.configured import _Children
from tests.kit.cli import Incbak, content, differing, signal_another_thread
from tests.kit.live import eventually
from tests.kit.need import need
from tests.kit.serve import raw_image, serving

SIZE = 4 << 20


class Fleet(Incbak):
    """A repository, images, and a configuration."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.file = root / "incbak.toml"

    def image(self, name: str) -> Path:
        """A disk with something in it."""
        return raw_image(self.root / f"{name}.raw", SIZE, name.encode() * (SIZE // len(name)))

    def write(self, text: str) -> None:
        """The configuration."""
        self.file.write_text(text.replace("ROOT", str(self.root)))
        self.file.chmod(0o600)

    def script(self, name: str, text: str) -> Path:
        """A hook."""
        path = self.root / name
        path.write_text(f"#!/bin/sh\n{text.replace('ROOT', str(self.root))}\n")
        path.chmod(0o700)
        return path

    def environment(self, extra: object = None) -> dict[str, str]:
        found = super().environment(extra)  # type: ignore[arg-type]
        del found["INCBAK_REPOSITORY"]
        return {**found, "INCBAK_CONFIG": str(self.file)}


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    made = Fleet(tmp_path)
    made("init", made.repo)
    made.image("web1")
    made.image("web2")
    return made


TWO = """
[defaults]
repository = "ROOT/repo"
[vms.web1]
source = "ROOT/web1.raw"
tags = ["nightly"]
[vms.web2]
source = "ROOT/web2.raw"
"""


def test_a_vm_by_name_is_what_its_options_say(fleet: Fleet) -> None:
    fleet.write(TWO + 'attach = ["ROOT/note"]\n')
    (fleet.root / "note").write_text("hello")
    fleet("full", "web2")
    fleet("incremental", "web1", "--tag", "mine")
    first, second = fleet("--json", "-r", fleet.repo, "list").objects()
    assert (first["vm"], second["vm"], second["tags"]) == ("web2", "web1", ["nightly", "mine"])
    assert fleet("show", "-r", fleet.repo, first["id"], "--attachment", "note").out == "hello"
    status = fleet("--json", "status", "web1").objects()
    assert [s["last"] for s in status] == [second["id"]]


def test_the_command_line_wins_over_the_configuration(fleet: Fleet) -> None:
    fleet.write(TWO)
    other = fleet.root / "other"
    fleet("init", other)
    fleet("full", "web1", "-r", other)
    fleet("-r", other, "incremental", "web1", "--name", "else")
    assert [b["vm"] for b in fleet("--json", "-r", other, "list").objects()] == ["web1", "else"]
    assert fleet("--json", "-r", fleet.repo, "list").out == ""
    fleet("full", "web2", env={"INCBAK_REPOSITORY": str(other)})
    assert [b["vm"] for b in fleet("--json", "-r", fleet.repo, "list").objects()] == ["web2"]


def test_the_repository_of_all_vms_is_that_of_other_commands_too(fleet: Fleet) -> None:
    """Unless the command line or the environment says otherwise; who has no configuration is told what to do."""
    fleet.write(TWO)
    fleet("full", "web1")
    other = fleet.root / "other"
    fleet("init", other)
    (listed,) = fleet("--json", "list").objects()
    assert listed["vm"] == "web1"
    assert "1 backup," in fleet("check").out
    assert fleet("sync", other).out.splitlines()[-1].startswith("1 backup copied")
    fleet("restore", "latest", fleet.root / "restored.raw")
    assert "repository" in fleet.run("doctor").out
    assert fleet("--json", "list", env={"INCBAK_REPOSITORY": str(other)}).objects()[0]["id"] == listed["id"]
    assert fleet("--json", "-r", other, "list").objects()[0]["id"] == listed["id"]
    fleet.write('[vms.web1]\nsource = "ROOT/web1.raw"\n')
    ran = fleet.run("list")
    assert (ran.code, "no repository was given" in ran.err, "the configuration" in ran.err) == (2, True, True)
    fleet.write("[defaults]\nrepositry = 1\n")
    assert fleet.run("list").code == 2
    assert fleet("list", "-r", fleet.repo).out
    assert "repositry" in fleet.run("doctor").out


def test_the_second_place_is_that_of_the_configuration(fleet: Fleet) -> None:
    """With its passphrase; the command line says otherwise."""
    secret, other, plain = (fleet.root / name for name in ("secret", "other", "plain"))
    secret.write_text("x")
    secret.chmod(0o600)
    fleet.write(TWO + f'[sync]\ntarget = "{other}"\npassword-file = "{secret}"\n')
    fleet("init", "--encrypt", other, env={"INCBAK_PASSWORD_FILE": str(secret)})
    fleet("init", plain)
    fleet("full", "--all")
    assert fleet("sync").out.splitlines()[-1].startswith("2 backups copied")
    assert fleet("sync", plain).out.splitlines()[-1].startswith("2 backups copied")
    assert fleet("sync", "--name", "web1").out == "0 backups copied, 0 B stored\n"
    assert len(fleet("-r", other, "--json", "list", env={"INCBAK_PASSWORD_FILE": str(secret)}).objects()) == 2
    assert "  sync --config " in fleet("schedule", "show", "cron").out.replace("-q sync", "  sync")
    assert "incbak-sync.timer" in fleet("schedule", "show", "systemd").out
    fleet.write(TWO)
    assert fleet.run("sync").code == 2
    assert " sync " not in fleet("schedule", "show", "cron").out


def test_all_of_them_and_one_that_fails_does_not_stop_the_others(fleet: Fleet) -> None:
    fleet.write(TWO)
    made = fleet("incremental", "--all")
    assert {line.split()[0] for line in made.out.splitlines()} == {"web1", "web2"}
    fleet.write(TWO + '[vms.gone]\nsource = "ROOT/gone.raw"\n')
    ran = fleet.run("incremental", "--all", "--jobs", "3")
    assert ran.code == 3
    assert "not all is backed up, 1 of 3 VMs: gone (exit code 1)" in ran.err
    assert "incbak: gone: error: " in ran.err
    assert len(fleet("--json", "-r", fleet.repo, "list").objects()) == 4
    objects = fleet.run("--json", "incremental", "--all").objects()
    assert {o["vm"] for o in objects} == {"web1", "web2"}
    assert all(d["kind"] == "incremental" for o in objects for d in o["disks"])
    (fleet.root / "web1.raw").unlink()
    (fleet.root / "web2.raw").unlink()
    ran = fleet.run("-q", "full", "--all")
    assert (ran.code, ran.out, "every" in ran.err or "nothing is backed up" in ran.err) == (1, "", True)


def test_options_go_to_every_vm(fleet: Fleet) -> None:
    fleet.write(TWO)
    fleet("full", "--all", "--tag", "x", "--jobs=1", "--tag=y")
    tags = {b["vm"]: b["tags"] for b in fleet("--json", "-r", fleet.repo, "list").objects()}
    assert tags == {"web1": ["nightly", "x", "y"], "web2": ["x", "y"]}
    assert "would be incremental" in fleet("incremental", "--all", "--dry-run").out


def test_a_backup_prunes_by_the_rules_of_its_vm(fleet: Fleet) -> None:
    """Only when it was made, only that VM, and beside another prune another time."""
    fleet.write(TWO.replace("[vms.web2]", "[vms.web1.keep]\nlast = 2\n[vms.web2]"))
    for _ in range(3):
        fleet("full", "web2")
    for _ in range(3):
        out = fleet("full", "web1", "--prune").out
    assert out.splitlines()[1:] == ["web1: 2 backups kept, 1 removed"]
    made = fleet("--json", "-r", fleet.repo, "list").objects()
    assert [b["vm"] for b in made] == ["web2"] * 3 + ["web1"] * 2
    with (fleet.repo / "locks" / "prune.lock").open("rb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = fleet.run("incremental", "web1", "--prune")
    assert (ran.code, "pruned another time" in ran.err) == (0, True)
    ran = fleet.run("full", "web2", "--prune")
    assert (ran.code, "has rules" in ran.err) == (2, True)
    (fleet.root / "web1.raw").unlink()
    assert fleet.run("full", "web1", "--prune").code == 1
    assert len(fleet("--json", "-r", fleet.repo, "list").objects()) == 6


def test_a_damaged_configuration_does_not_prevent_a_restore(fleet: Fleet) -> None:
    fleet.write(TWO)
    fleet("full", "web1")
    fleet.write("[defaults\n")
    out = fleet.root / "out.raw"
    ran = fleet("-r", fleet.repo, "restore", "latest", out)
    assert "cannot look up a passphrase in the configuration" in ran.err
    assert differing(content(out), content(fleet.root / "web1.raw")) == []


def test_a_signal_ends_all_of_them(fleet: Fleet) -> None:
    fleet.write(TWO)
    process = fleet.popen("full", "--all", "--speed-limit", "10k")  # which would take minutes
    eventually(lambda: len(_children(process.pid)) == 2, 60, "two runs")
    children = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    fleet("full", "--all")


def test_a_signal_that_another_thread_takes_ends_all_of_them(fleet: Fleet) -> None:
    """It wakes no main thread that waits, and neither does one that comes just before it waits."""
    fleet.write(TWO)
    process = fleet.popen("full", "--all", "--speed-limit", "10k")
    eventually(lambda: len(_children(process.pid)) == 2, 60, "two runs")
    signal_another_thread(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 130


def test_a_signal_while_they_are_started_ends_all_of_them(fleet: Fleet) -> None:
    """It may come when the last has begun, and who starts it does not know that yet."""
    fleet.write(TWO)
    code = """
import glob, os, signal, time
from incbak.cli import configured, main

class Pool(configured.ThreadPoolExecutor):
    def submit(self, work, name):
        started = super().submit(work, name)
        if name == "web2":
            while len([c for path in glob.glob("/proc/self/task/*/children") for c in open(path).read().split()]) < 2:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
        return started

configured.ThreadPoolExecutor = Pool
main.main()
"""
    argv = [sys.executable, "-c", code, "full", "--all", "--jobs", "2", "--speed-limit", "10k"]
    process = subprocess.Popen(argv, env=fleet.environment(), stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    process.communicate(timeout=60)
    assert process.returncode == 130


def _children(pid: int) -> list[int]:
    """The processes that one has started."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += [int(child) for child in (task / "children").read_text().split()]
    return found


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[vms.web1", "incbak.toml: "),
        ("[vm.web1]\nsource='/x'", "vm: no such key"),
        ("[sync]\ntarget='offsite'", "sync.target: not an absolute path: 'offsite'"),
        ("[sync]\npassword-file='/x'", "sync.target: missing"),
        ("[sync]\ntarget='/x'\npassword-file='/x'\npassword-command=['/y']", "sync.password-command: there is a"),
        ("[sync]\nkeep=1", "sync: object contains unknown field `keep`"),
        ("[vms.web1]\n", "vms.web1: object missing required field `source`"),
        ("[vms.web1]\nsource='/x'\nquiese=true", "vms.web1: object contains unknown field `quiese`"),
        ("[vms.web1]\nsource=7", "vms.web1.source: expected `str`, got `int`"),
        ("[vms.web1]\nsource='web1.raw'", "vms.web1.source: neither a monitor nor an absolute path"),
        ("[vms.web1]\nsource='/x'\nquiesce=true", "vms.web1.quiesce: goes together with agent-socket"),
        ("[vms.web1]\nsource='qmp:/x'\nformat='raw'", "vms.web1.format: is for an image, not for a monitor"),
        ("[vms.web1]\nsource='qmp:/x'\nallow-backing=['/a']", "vms.web1.allow-backing: is for an image"),
        ("[vms.web1]\nsource='/x'\nattach=['/a','b']", "vms.web1.attach[1]: not an absolute path: 'b'"),
        ("[defaults]\nmax-duration='x'", "defaults.max-duration: not a duration"),
        ("[vms.web1]\nsource='/x'\nlock-wait='soon'", "vms.web1.lock-wait: not a duration: 'soon'"),
        ("[defaults]\nspeed-limit='fast'", "defaults.speed-limit: not a size"),
        ("[defaults]\naudit='all'", "defaults.audit: not a percentage"),
        ("[defaults.hooks]\nbefore=['x']", "defaults.hooks.before: not an absolute path: 'x'"),
        ("[defaults.hooks]\nbefore='/x'", "defaults.hooks.before: expected `array`, got `str`"),
        ("[defaults.keep]\ndaily=-1", "defaults.keep: a number below 0"),
        ("[defaults.keep]\nwithin='x'", "defaults.keep.within: not a time to keep backups for"),
        ("[vms.'../x']\nsource='/x'", "vms.../x: not a name of a VM"),
        ("vms = 3", "vms: expected a table for each VM"),
        ("[vms]\nweb1 = 3", "vms.web1: expected `object`, got `int`"),
        ("[vms.web1]\nsource='/x'\nwatch='/y'", "vms.web1.watch: not the Unix socket of a monitor"),
        ("[vms.web1.serve]\nvda=[]", "vms.web1"),
        ("x = " + "[" * 100000, "incbak.toml"),
        ("#" * (1 << 20) + "#", "is larger than"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_done(fleet: Fleet, text: str, said: str) -> None:
    fleet.write(text)
    for argv in (["config", "check"], ["full", "web1"], ["incremental", "--all"]):
        ran = fleet.run(*argv)
        assert ran.code == 2, ran
        assert said in ran.err, ran.err
    assert fleet("--json", "-r", fleet.repo, "list").out == ""


def test_a_configuration_that_others_can_write_is_refused(fleet: Fleet) -> None:
    fleet.write(TWO)
    fleet.file.chmod(0o622)
    ran = fleet.run("full", "web1")
    assert (ran.code, "can be written by others" in ran.err) == (2, True)


def test_no_configuration(fleet: Fleet) -> None:
    ran = fleet.run("full", "web1")
    assert (ran.code, "incbak.toml: No such file" in ran.err) == (2, True)
    fleet.write("")
    ran = fleet.run("full", "--all")
    assert (ran.code, "has no VM" in ran.err) == (2, True)
    ran = fleet.run("full")
    assert (ran.code, "say --all" in ran.err) == (2, True)
    fleet.write(TWO)
    assert fleet.run("full", "web1", "--all").code == 2
    assert fleet.run("full", "--all", "--name", "x").code == 2
    assert "web2" in fleet("config", "check").out
    ran = fleet.run("full", "web3")
    assert (ran.code, "web3 is no VM of the configuration" in ran.err, "web1, web2" in ran.err) == (2, True, True)


HOOKS = """
[vms.web1]
repository = "ROOT/repo"
source = "ROOT/web1.raw"
metrics = "ROOT/metrics.prom"
[vms.web1.hooks]
before = ["ROOT/before", "one arg"]
after = ["ROOT/after"]
failed = ["ROOT/failed"]
timeout = "5s"
"""


def test_hooks_run_around_a_backup_and_are_told_how_it_went(fleet: Fleet) -> None:
    fleet.write(HOOKS)
    fleet.script("before", 'echo "before $1 $INCBAK_RESULT $INCBAK_VM" >> ROOT/log; cat > ROOT/before.json')
    fleet.script("after", 'echo "after $INCBAK_RESULT $INCBAK_EXIT_CODE $INCBAK_BACKUP" >> ROOT/log; cat > ROOT/json')
    fleet.script("failed", 'echo "failed $INCBAK_EXIT_CODE" >> ROOT/log')
    fleet("full", "web1", "--dry-run")
    assert not (fleet.root / "log").exists()
    made = fleet("--json", "full", "web1").objects()[0]
    log = (fleet.root / "log").read_text().splitlines()
    assert log == ["before one arg before web1", f"after done 0 {made['id']}"]
    told = json.loads((fleet.root / "json").read_text())
    assert (told["record"], told["kind"]) == (made, "full")
    (fleet.repo / "config").rename(fleet.root / "away")
    assert fleet.run("full", "web1").code == 14
    assert (fleet.root / "log").read_text().splitlines()[3:] == ["failed 14"]
    (fleet.root / "away").rename(fleet.repo / "config")
    fleet.script("before", "exit 7")
    ran = fleet.run("full", "web1")
    assert (ran.code, "hook before of web1" in ran.err, "exited with 7" in ran.err) == (1, True, True)
    assert len(fleet("--json", "-r", fleet.repo, "list").objects()) == 1
    assert (fleet.root / "log").read_text().splitlines()[-1] == "failed 1"


@pytest.mark.parametrize(("script", "said"), [("exec sleep 60", "did not end within 5 s"), ("exit 3", "exited with 3")])
def test_a_hook_that_fails_after_the_backup_is_a_warning(fleet: Fleet, script: str, said: str) -> None:
    fleet.write(HOOKS)
    fleet.script("before", "true")
    fleet.script("after", script)
    fleet.script("failed", "true")
    ran = fleet("full", "web1")
    assert said in ran.err
    (fleet.root / "after").unlink()
    assert "No such file" in fleet("full", "web1").err


@pytest.mark.parametrize(
    "script",
    ["printf 'no \\377 text\\n' >&2", "sleep 60 & echo $! >> ROOT/left", "head -c 100000000 /dev/zero; echo end"],
    ids=["bytes", "child", "much"],
)
def test_what_a_hook_prints_or_leaves_stops_no_other_vm(fleet: Fleet, script: str) -> None:
    """One after the other: the second is reached when the first has ended."""
    fleet.write(TWO.replace("[vms.web1]", '[defaults.hooks]\nafter = ["ROOT/after"]\n[vms.web1]'))
    fleet.script("after", script)
    try:
        ran = fleet("full", "--all", "--jobs", "1")
        assert sorted(line.split()[0] for line in ran.out.splitlines()) == ["web1", "web2"]
        assert len(ran.err) < 40 << 20
    finally:
        for pid in (fleet.root / "left").read_text().split() if (fleet.root / "left").exists() else ():
            os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize("which", ["before", "after"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("every", [False, True])
def test_a_hook_ends_with_us(fleet: Fleet, which: str, number: int, every: bool) -> None:
    """Also what it has started; the signal goes to all, as that of a terminal, or SIGTERM to the first."""
    fleet.write(TWO.replace("[vms.web1]", f'[defaults.hooks]\n{which} = ["ROOT/hook"]\n[vms.web1]'))
    fleet.script("hook", "sleep 300 & echo $! > ROOT/new-$INCBAK_VM; mv ROOT/new-$INCBAK_VM ROOT/pid-$INCBAK_VM; wait")
    vms = ["web1", "web2"] if every else ["web1"]
    process = fleet.popen("full", *(["--all", "--jobs", "2"] if every else vms), start_new_session=True)
    files = [fleet.root / f"pid-{vm}" for vm in vms]
    eventually(lambda: all(file.exists() for file in files), 60, "the hooks run")
    pids = [int(file.read_text()) for file in files]
    os.kill(process.pid, number) if number == signal.SIGTERM else os.killpg(process.pid, number)
    process.communicate(timeout=60)
    assert process.returncode != 0
    eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 20, "the hooks have ended")


def _samples(path: Path) -> dict[str, float]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_metrics_tell_of_the_last_run_and_the_last_backup(fleet: Fleet) -> None:
    fleet.write(TWO)
    out = fleet.root / "metrics.prom"
    made = fleet("--json", "full", "web1", "--metrics", out).objects()[0]
    found = _samples(out)
    assert found['incbak_run_exit_code{vm="web1"}'] == 0
    assert found['incbak_backup_read_bytes{vm="web1",disk="disk0"}'] == SIZE
    assert found['incbak_backup_stored_bytes{vm="web1",disk="disk0"}'] == made["disks"][0]["stored"]
    assert abs(found['incbak_backup_timestamp_seconds{vm="web1"}'] - time.time()) < 60
    (fleet.root / "web1.raw").rename(fleet.root / "away")
    assert fleet.run("full", "web1", "--metrics", out).code == 1
    later = _samples(out)
    assert later['incbak_run_exit_code{vm="web1"}'] == 1
    kept = 'incbak_backup_timestamp_seconds{vm="web1"}'
    assert later[kept] == found[kept]
    assert out.stat().st_mode & 0o444 == 0o444
    ran = fleet.run("full", "web2", "--metrics", fleet.root / "nowhere" / "x")
    assert (ran.code, "nowhere" in ran.err) == (0, True)


def test_status_answers_whether_all_is_protected(fleet: Fleet) -> None:
    fleet.write(TWO)
    ran = fleet.run("status", "--all", "--max-age", "1h")
    assert ran.code == 1
    fleet("full", "web1")
    ran = fleet.run("status", "--all", "--max-age", "1h")
    assert ran.code == 3
    assert "web2 (exit code 1)" in ran.err
    fleet("full", "web2")
    assert fleet("status", "--all", "--max-age", "1h").out.count("4.0 MiB") == 2
    assert fleet("-q", "status", "--all", "--max-age", "1h").out == ""
    time.sleep(0.1)
    ran = fleet.run("status", "web1", "--max-age", "10ms")
    assert (ran.code, "disks without a backup of the last" in ran.err) == (1, True)
    (fleet.root / "web1.raw").rename(fleet.root / "away")
    ran = fleet("status", "web1", "--max-age", "1h")
    assert ("no answer" in ran.out, "web1.raw" in ran.err) == (True, True)
    assert fleet.run("status", "web1").code == 1
    rows = fleet.run("--json", "status", "--all", "--max-age", "1h").objects()
    assert {(r["vm"], r["dirty"] is None) for r in rows} == {("web1", True), ("web2", False)}


SCHEDULE = """
[defaults]
repository = "ROOT/repo"
state-dir = "ROOT/state"
[vms.web1]
source = "qmp:ROOT/run/web1/qmp.sock"
[vms.web1.serve]
vda = "ROOT/with $ and % and space.raw"
[vms.web2]
source = "qmp:/run/web2.qmp"
watch = "qmp:/run/web2.watch"
"""


def test_systemd_units_run_what_they_say(fleet: Fleet) -> None:
    fleet.write(SCHEDULE)
    units = fleet.root / "units"
    units.mkdir()
    fleet("schedule", "show", "systemd", "--to", units)
    assert {p.name for p in units.iterdir()} == {
        "incbak-backup.service", "incbak-backup.timer", "incbak-serve-web1.service", "incbak-watch-web2.service",
        "incbak-serve-web1-nbd.socket", "incbak-serve-web1-monitor.socket", "incbak-drill.service",
        "incbak-drill.timer",
    }  # fmt: skip
    need("systemd-analyze")
    ran = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *sorted(map(str, units.iterdir()))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    ours = [line for line in ran.stderr.splitlines() if "incbak" in line]
    assert ours == []
    for path in units.iterdir():
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read(path)
        assert "Unit" in parser
    line = next(x for x in (units / "incbak-serve-web1.service").read_text().splitlines() if x.startswith("ExecStart="))
    argv = [a.replace("%%", "%").replace("$$", "$") for a in shlex.split(line.removeprefix("ExecStart="))]
    assert argv[1:] == ["serve", "--name", "web1", "--state-dir", str(fleet.state),
                        f"vda={fleet.root}/with $ and % and space.raw"]  # fmt: skip
    assert "Persistent=yes" in (units / "incbak-backup.timer").read_text()
    for unit in units.glob("*.service"):
        assert {"UMask=0077", "NoNewPrivileges=yes", "ProtectSystem=full"} <= set(unit.read_text().splitlines()), unit
        job = "Type=oneshot" in unit.read_text()
        assert ("\nTimeoutStartSec=" in unit.read_text()) == job, unit
        assert ("\nCapabilityBoundingSet=" in unit.read_text()) != job, "a hook may need any"
    assert fleet("schedule", "show", "systemd").out.count("[Service]") == 4


@pytest.mark.parametrize(
    ("limits", "seconds"), [((), 2 * 86400), (("1h",), 3600), (("1h", "30m"), 3600), (("1h", "3h", "2h"), 2 * 3 * 3600)]
)
def test_systemd_ends_no_backup_before_its_own_limit_does(fleet: Fleet, limits: Sequence[str], seconds: int) -> None:
    """Two run at once, so the longest that all can take is that of the longest, for each two."""
    tables = [f'[vms.v{n}]\nsource = "/x{n}.raw"\nmax-duration = "{limit}"\n' for n, limit in enumerate(limits)]
    fleet.write("".join(tables) or '[vms.v]\nsource = "/x.raw"\n')
    units = fleet.root / "units"
    units.mkdir()
    fleet("schedule", "show", "systemd", "--to", units)
    assert f"\nTimeoutStartSec={seconds + 3600}\n" in (units / "incbak-backup.service").read_text()


def test_cron_lines_run_what_they_say(fleet: Fleet) -> None:
    fleet.write(TWO)
    lines = [x for x in fleet("schedule", "show", "cron").out.splitlines() if not x.startswith("#")]
    fleet("full", "--all")
    commands = [line.split(None, 6)[6] for line in lines]
    assert len(commands) == 3
    env = {**os.environ, **fleet.environment()}
    for command in commands:
        done = subprocess.run(
            ["/bin/sh", "-c", command], env=env, capture_output=True, text=True, timeout=60, check=False
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert len(fleet("--json", "-r", fleet.repo, "list").objects()) == 4
    assert fleet.run("schedule", "show", "cron", "--to", fleet.root).code == 2
    assert fleet.run("schedule", "show", "at").code == 2


def test_prune_goes_by_the_rules_of_each_vm(fleet: Fleet) -> None:
    fleet.write(TWO)
    for _ in range(3):
        fleet("full", "--all")
    assert (fleet.run("prune", "--all").code, len(_kept(fleet, "web1"))) == (2, 3)
    fleet.write(TWO + "[vms.web2.keep]\nlast = 2\n")
    told = fleet("prune", "--all").out
    assert "web1: the configuration has no rules" in told
    assert (len(_kept(fleet, "web1")), len(_kept(fleet, "web2"))) == (3, 2)
    fleet.write(TWO + "[vms.web2.keep]\nlast = 2\n[defaults.keep]\nlast = 1\n")
    fleet("prune", "--all", "--dry-run")
    assert len(_kept(fleet, "web1")) == 3
    fleet("prune", "--all")
    assert (len(_kept(fleet, "web1")), len(_kept(fleet, "web2"))) == (1, 2)
    assert fleet.run("prune", "--all", "--keep-last", "1").code == 2
    assert fleet.run("prune", "--all", "--name", "web1").code == 2
    assert "prune --all" in fleet("schedule", "show", "cron").out
    assert "incbak-prune.timer" in fleet("schedule", "show", "systemd").out


def _kept(fleet: Fleet, vm: str) -> list[str]:
    return [b["id"] for b in fleet("--json", "-r", fleet.repo, "list", "--name", vm).objects()]


def test_a_vm_that_is_served_by_name(fleet: Fleet) -> None:
    with serving(fleet.root, {"vda": fleet.root / "web1.raw"}, "--name", "web1") as serve:
        fleet.write(f'[vms.web1]\nsource = "qmp:{serve.monitor}"\nrepository = "ROOT/repo"\ndisks = ["vda"]\n')
        fleet("full", "web1")
        fleet("incremental", "web1", "--no-fallback")
    out = fleet.root / "out.raw"
    fleet("-r", fleet.repo, "restore", "latest", out)
    assert differing(content(out), content(fleet.root / "web1.raw")) == []


def test_no_process_begins_after_the_end(tmp_path: Path) -> None:
    """A signal that comes while one of them is being started reaches that one too, or it is not started."""
    children = _Children()
    process = children.start(["sleep", "600"])
    children.end()
    assert process.wait(60) == -signal.SIGTERM
    process.communicate()
    with pytest.raises(KeyboardInterrupt):
        children.start(["touch", str(tmp_path / "begun")])
    assert not (tmp_path / "begun").exists()

"""What a user can get wrong, and what the world can: a clear error, the right exit code, and nothing changed."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from incbak.cli.main import cli
from tests.kit.cli import Incbak, content, differing
from tests.kit.need import need_root
from tests.kit.serve import raw_image, serving


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Incbak:
    """A repository with one backup of a small image; no test changes it."""
    incbak = Incbak(tmp_path_factory.mktemp("made"))
    raw_image(incbak.root / "disk.raw", 3 << 20, os.urandom(100_000))
    incbak("init")
    incbak("full", incbak.root / "disk.raw", "--name", "vm")
    return incbak


@pytest.mark.parametrize(
    ("argv", "code", "says"),
    [
        (["list", "-r", "{tmp}/nothing"], 10, "does not exist"),
        (["list", "-r", "{tmp}"], 10, "is not a repository"),
        (["init"], 2, "is a repository already"),
        (["init", "{tmp}/file"], 2, "not an empty directory"),
        (["init", "{tmp}/new", "--cluster-size", "5000"], 2, "not a cluster size"),
        (["init", "{tmp}/new", "--cluster-size", "many"], 2, "not a size"),
        (["restore", "deadbeef", "{tmp}/out"], 2, "no backup begins with"),
        (["restore", "../../etc/passwd", "{tmp}/out"], 2, "no backup begins with"),
        (["restore", "latest", "{tmp}/file"], 1, "exists"),
        (["restore", "latest", "{tmp}/no/such/dir/out"], 1, "cannot create"),
        (["restore", "latest", "/dev/null"], 1, "neither a file nor a block device"),
        (["restore", "latest", "{tmp}/out", "--disk", "nope"], 2, "has no disk 'nope'"),
        (["restore", "latest", "{tmp}/out", "--name", "nope"], 2, "no backup of nope"),
        (["restore", "latest", "nbd+unix:///x"], 2, "no socket"),
        (["restore", "latest", "nbd+unix:///x?socket={tmp}/none"], 1, "cannot connect"),
        (["full", "{tmp}/none.raw"], 1, "cannot read"),
        (["full", "{tmp}"], 1, "Is a directory"),
        (["full", "{tmp}/fifo"], 1, "neither a file nor a block device"),
        (["status", "{tmp}/fifo"], 1, "neither a file nor a block device"),
        (["full", "{tmp}/disk.raw", "--attach", "{tmp}/fifo"], 2, "not a regular file"),
        (["serve", "--name", "v", "vda={tmp}/fifo"], 1, "neither a file nor a block device"),
        (["full", "qmp:{tmp}/none.qmp"], 1, "cannot connect to monitor"),
        (["full", "qmp:"], 2, "address is empty"),
        (["full", "{tmp}/disk.raw", "--name", "vm", "--disk", "a", "--disk", "b"], 2, "one disk"),
        (["full", "{tmp}/disk.raw", "--lock-wait", "soon"], 2, "not a duration"),
        (["full"], 2, "missing argument SOURCE"),
        (["frobnicate"], 2, "No such command"),
        (["list", "--frobnicate"], 2, "No such option"),
        (["check", "--read-data-subset", "0"], 2, "not a percentage"),
        (["diff", "latest", "ffffffff"], 2, "no backup begins with"),
        (["bitmap", "dirty", "nobody"], 2, "no such bitmap"),
        (["serve", "--name", "vm", "vda"], 2, "not DISK=IMAGE"),
        (["serve", "--name", "vm", "vda={tmp}/none.raw"], 1, "cannot"),
        (["serve", "--name", "vm", "vda={tmp}/disk.raw", "vda={tmp}/disk.raw"], 2, "given twice"),
        (["serve", "--name", "vm", "vda={tmp}/disk.raw", "vda:ro={tmp}/file"], 2, "not the name of a disk: vda:ro"),
        (["serve", "--name", "vm", "--scratch-limit", "x", "vda={tmp}/disk.raw"], 2, "not a size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_argument(made: Incbak, tmp_path: Path, argv: list[str], code: int, says: str) -> None:
    (tmp_path / "file").write_text("mine")
    raw_image(tmp_path / "disk.raw", 1 << 20)
    os.mkfifo(tmp_path / "fifo")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    ran = made.run(*(a.replace("{tmp}", str(tmp_path)) for a in argv))
    assert ran.code == code, ran
    assert says in ran.err
    assert ran.err.startswith("incbak: error: ")
    assert ran.out == ""
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"
    assert len(made.list()) == 1


def test_help_of_every_command(made: Incbak) -> None:
    ran = made("--help")
    commands = [line.split()[0] for line in ran.out.partition("Commands:\n")[2].splitlines() if line[2:3] != " "]
    assert {"init", "full", "incremental", "list", "show", "diff", "restore", "check", "bitmap", "serve"} <= set(
        commands
    )
    for command in commands:  # in this process, for the sake of time
        ran = CliRunner().invoke(cli, [command, "--help"])
        assert (ran.exit_code, "Usage:" in ran.output) == (0, True), command


def test_options_before_and_after_the_command(made: Incbak) -> None:
    elsewhere = {"INCBAK_REPOSITORY": "/nowhere"}
    assert made("--json", "-r", made.repo, "list", env=elsewhere).out == made("list", "--json", "-r", made.repo).out
    assert made.run("list", env={"INCBAK_REPOSITORY": ""}).code == 2


def test_quiet_is_silent(made: Incbak, tmp_path: Path) -> None:
    ran = made("-q", "restore", "latest", tmp_path / "out.raw")
    assert (ran.out, ran.err) == ("", "")


def test_no_fallback_exits_4_and_makes_nothing(made: Incbak, tmp_path: Path) -> None:
    raw_image(tmp_path / "other.raw", 1 << 20)
    ran = made.run("incremental", tmp_path / "other.raw", "--no-fallback")
    assert ran.code == 4
    assert "no-base" in ran.err
    assert len(made.list()) == 1


def test_dry_run_changes_nothing(made: Incbak) -> None:
    ran = made("incremental", made.root / "disk.raw", "--name", "vm", "--dry-run")
    assert "would be incremental on" in ran.out
    assert len(made.list()) == 1


def test_an_image_in_use_is_not_read(tmp_path: Path) -> None:
    incbak = Incbak(tmp_path)
    image = raw_image(tmp_path / "disk.raw", 1 << 20)
    incbak("init")
    with serving(tmp_path, {"vda": image}):
        ran = incbak.run("full", image, "--name", "other")
        assert ran.code == 1
        assert "in use" in ran.err
        assert incbak.run("restore", "latest", image, "--force").code == 2
    incbak("full", image, "--name", "other")
    with serving(tmp_path, {"vda": image}):
        ran = incbak.run("restore", "latest", image, "--force")
        assert ran.code == 1
        assert "in use" in ran.err
    assert incbak("restore", "latest", image, "--force").code == 0


def test_two_runs_on_one_vm(tmp_path: Path) -> None:
    """The second says so and exits 11 at once, or waits."""
    incbak = Incbak(tmp_path)
    image = raw_image(tmp_path / "disk.raw", 1 << 20)
    incbak("init")
    with serving(tmp_path, {"vda": image}) as serve:
        source = f"qmp:{serve.monitor}"
        with _stopped_run(incbak, source) as first:
            began = time.monotonic()
            ran = incbak.run("incremental", source)
            assert ran.code == 11
            assert time.monotonic() - began < 10
            assert "lock" in ran.err
            waiting = incbak.popen("incremental", source, "--lock-wait", "1m")
            time.sleep(0.5)
            assert waiting.poll() is None
            first.send_signal(signal.SIGCONT)
            assert first.wait(60) == 0
            assert waiting.wait(60) == 0
            waiting.communicate()
    assert len(incbak.list()) == 2


@contextmanager
def _stopped_run(incbak: Incbak, source: str) -> Iterator[subprocess.Popen[str]]:
    """A full backup that holds the VM's lock and is stopped."""
    run = incbak.popen("full", source)
    lock = incbak.repo / "locks" / "vm-vm.lock"
    while not lock.exists():
        time.sleep(0.002)
    run.send_signal(signal.SIGSTOP)
    try:
        yield run
    finally:
        run.send_signal(signal.SIGCONT)
        run.communicate(timeout=60)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_takes_its_bitmap_with_it(tmp_path: Path, number: signal.Signals) -> None:
    incbak = Incbak(tmp_path)
    image = tmp_path / "disk.raw"
    image.write_bytes(os.urandom(192 << 20))
    incbak("init")
    with serving(tmp_path, {"vda": image}) as serve:
        run = incbak.popen("full", f"qmp:{serve.monitor}")
        qmp = serve.qmp()
        while not qmp("query-jobs"):
            assert run.poll() is None
        run.send_signal(number)
        _out, err = run.communicate(timeout=60)
        assert run.returncode == 130, err
        assert "Traceback" not in err
        assert qmp.bitmaps("vda") == {}
        assert qmp("query-jobs") == []
        qmp.close()
        assert incbak.list() == []
        assert incbak("full", f"qmp:{serve.monitor}").code == 0
    assert differing(incbak.restored(), content(image)) == []


@pytest.mark.root
def test_a_full_repository_fails_the_run_and_nothing_else(tmp_path: Path) -> None:
    need_root()
    incbak = Incbak(tmp_path)
    incbak.repo.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", incbak.repo], check=True)
    try:
        image = raw_image(tmp_path / "disk.raw", 32 << 20)
        incbak("init")
        with serving(tmp_path, {"vda": image}) as serve:
            source = f"qmp:{serve.monitor}"
            client = serve.connect("vda")
            incbak("full", source)
            client.write(os.urandom(8 << 20), 0)
            ran = incbak.run("incremental", source)
            assert ran.code == 1
            assert "No space left" in ran.err
            client.write(b"the guest goes on", 20 << 20)
            assert len(incbak.list()) == 1
            assert len(list(incbak.repo.glob("packs/.*.tmp"))) == 0
            subprocess.run(["mount", "-o", "remount,size=40m", incbak.repo], check=True)
            made = incbak("--json", "incremental", source).objects()[0]
            assert made["disks"][0]["reason"] is None
            client.close()
        assert differing(incbak.restored(), content(image)) == []
    finally:
        subprocess.run(["umount", incbak.repo], check=True)

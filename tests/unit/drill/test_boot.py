"""Booting from a backup: a sign of life or a reason, no network, and a QEMU that always ends."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from incbak.drill.boot import Boot, _refused, boot, command
from incbak.drill.drill import Options, drill
from incbak.errors import UsageError
from incbak.repo.drills import read_drills
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.kit.bootable import boot_sector
from tests.kit.need import need
from tests.unit.backup.scene import Disk, FakeEngine, back_up
from tests.unit.repo.scene import new

TCG = ("-accel", "tcg")
PC = "qemu-system-x86_64"


def _backed_up(tmp_path: Path, says: str = "", *, resets: bool = False) -> tuple[Repository, Record]:
    repo = new(tmp_path / "repo")
    data = bytearray(boot_sector(says, resets=resets) + bytes(1 << 20)) if says else bytearray(65536)
    disks = {"vda": Disk(data), "vdb": Disk(bytearray(4096))}
    record = back_up(repo, FakeEngine(disks), incremental=False).record
    assert record
    return repo, record


def _wanted(expect: str = "login:", timeout: float = 120.0, **more: str) -> Boot:
    need(PC)
    return Boot(re.compile(expect), timeout, 64 << 20, arguments=TCG, program=PC, **more)


@pytest.mark.qemu
@pytest.mark.parametrize("bus", ["virtio", "scsi", "ide", "nvme"])
def test_a_guest_boots_from_a_backup(tmp_path: Path, bus: str) -> None:
    repo, record = _backed_up(tmp_path, "hello\r\nvm1 login:")
    wanted = _wanted(r"^vm\d login:$".replace("^", "(?m)^"), bus=bus)
    found = boot(repo, record, record.disks, wanted, tmp_path)
    assert (found.good, found.why) == (True, "")
    assert [p.name for p in tmp_path.iterdir()] == ["repo"]


@pytest.mark.qemu
def test_a_guest_that_says_something_else(tmp_path: Path) -> None:
    """It is given up when the time is over, or when it resets itself."""
    repo, record = _backed_up(tmp_path, "kernel panic \x1b[31m", resets=True)
    found = boot(repo, record, record.disks, _wanted(), tmp_path)
    assert (found.good, "QEMU ended with 0" in found.why, "kernel panic" in found.why) == (False, True, True)
    found = boot(repo, record, record.disks, _wanted("panic"), tmp_path)
    assert found.good


@pytest.mark.qemu
def test_time_is_up(tmp_path: Path) -> None:
    repo, record = _backed_up(tmp_path, "hm")
    done = drill(repo, record, Options(tmp_path, boot=_wanted(timeout=0.5)))
    assert (done.exit_code, done.good) == (1, False)
    assert "the guest did not boot: 'login:' (--boot-expect) did not come within 0.5 s" in done.problems[0]
    assert [d.boot and d.boot.good for d in read_drills(repo.storage)] == [False]


@pytest.mark.qemu
def test_qemu_that_does_not_start(tmp_path: Path) -> None:
    repo, record = _backed_up(tmp_path)
    wanted = Boot(re.compile("login:"), 60.0, 64 << 20, arguments=("-no-such-option",), program=PC)
    with pytest.raises(UsageError, match="no-such-option"):
        drill(repo, record, Options(tmp_path, boot=wanted))
    assert read_drills(repo.storage) == []


@pytest.mark.parametrize(
    ("said", "arguments", "refused"),
    [
        ("qemu-system-x86_64: -no-such: invalid option", ("-no-such",), True),
        ("qemu-system-x86_64: -device x: 'x' is not a valid device model name", ("-device", "x"), True),
        ("qemu-system-x86_64: unsupported machine type", ("-machine", "x"), True),
        ("qemu-system-x86_64: unsupported machine type", (), False),
        ("qemu-system-x86_64: -blockdev {}: Failed to connect", ("-device", "x"), False),  # ours
        ("hello login: -device", ("-device",), False),
        ("", ("-device",), False),
    ],
)
def test_whose_mistake_it_is_that_qemu_does_not_start(said: str, arguments: tuple[str, ...], refused: bool) -> None:
    assert _refused(said, arguments) is refused


def test_what_is_damaged_is_not_booted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo, record = _backed_up(tmp_path, "login:")
    for pack in (tmp_path / "repo" / "packs").iterdir():
        data = bytearray(pack.read_bytes())
        data[100:-100] = bytes(len(data) - 200)
        pack.write_bytes(data)
    done = drill(repo, record, Options(tmp_path, boot=_wanted(timeout=1.0)))
    assert (done.exit_code, done.boot) == (13, None)


def test_a_guest_has_no_network_and_what_the_user_says_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = Boot(re.compile("x"), memory=300 << 20, arguments=("-m", "2G"))
    argv = command(wanted, ["0", "1"], Path("/run/s"))
    nic = argv.index("-nic")
    assert (argv[nic + 1], argv.count("-nic"), argv.count("-nodefaults")) == ("none", 1, 1)
    assert [argv[n + 1] for n, a in enumerate(argv) if a == "-m"] == ["300M", "2G"]
    assert argv[-2:] == ["-accel", "tcg"]
    assert command(Boot(re.compile("x"), arguments=TCG), ["0"], Path("/run/s")).count("-accel") == 1
    assert any("spawn=deny" in a for a in argv)
    for euid, given in ((0, True), (1000, False)):
        monkeypatch.setattr(os, "geteuid", lambda euid=euid: euid)
        assert ("-runas" in command(wanted, ["0"], Path("/run/s"))) is given


def test_a_missing_qemu_is_said_before_anything_is_read(tmp_path: Path) -> None:
    repo, record = _backed_up(tmp_path)
    with pytest.raises(UsageError, match="qemu-none is not installed"):
        drill(repo, record, Options(tmp_path, boot=Boot(re.compile("x"), program="qemu-none")))
    assert read_drills(repo.storage) == []

"""Options of the commands that make and show backups, on an image that nobody has open."""

from __future__ import annotations

import subprocess
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.kit.cli import Incbak
from tests.kit.need import need
from tests.kit.qmp import Qmp
from tests.kit.serve import raw_image, serving

SIZE = 4 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    raw_image(tmp_path / "web1.raw", SIZE, b"x" * SIZE)
    return made


def test_attached_files_come_back_as_they_were(incbak: Incbak) -> None:
    text = "<domain type='kvm'>\n  <name>web1 \N{SNOWMAN}</name>\n</domain>"
    (incbak.root / "web1.xml").write_text(text)
    (incbak.root / "note").write_text("")
    incbak("full", incbak.root / "web1.raw", "--attach", incbak.root / "web1.xml", "--attach", incbak.root / "note")
    assert incbak("show", "latest", "--attachment", "web1.xml").out == text
    assert "attached  web1.xml" in incbak("show", "latest").out
    assert incbak("--json", "show", "latest").objects()[0]["attachments"] == ["web1.xml", "note"]
    missing = incbak.run("show", "latest", "--attachment", "web2.xml")
    assert (missing.code, "It has: web1.xml, note." in missing.err) == (2, True)


@pytest.mark.parametrize(
    ("content", "said"), [(b"\xff\xfe", "is not text"), (b"x" * ((1 << 20) + 1), "larger than"), (None, "No such file")]
)
def test_what_cannot_be_attached_is_said_before_anything_is_done(
    incbak: Incbak, content: bytes | None, said: str
) -> None:
    path = incbak.root / "web1.xml"
    if content is not None:
        path.write_bytes(content)
    ran = incbak.run("full", incbak.root / "web1.raw", "--attach", path)
    assert ran.code == 2
    assert said in ran.err
    assert incbak.list() == []


@pytest.mark.alone
def test_a_speed_limit_is_kept(incbak: Incbak) -> None:
    image = incbak.root / "web1.raw"
    assert _slower(incbak, image) > 2
    with serving(incbak.root, {"disk0": image}, "--name", "web1") as serve:
        assert _slower(incbak, f"qmp:{serve.monitor}") > 2
    assert incbak.run("full", image, "--speed-limit", "fast").code == 2


@pytest.mark.qemu
@pytest.mark.alone
def test_a_speed_limit_is_kept_for_other_formats(incbak: Incbak) -> None:
    need("qemu-img", "qemu-storage-daemon")
    image = incbak.root / "web1.qcow2"
    convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", incbak.root / "web1.raw", image]
    subprocess.run(convert, check=True, timeout=20)
    assert _slower(incbak, image, "512K") > 3  # the first MiB goes at once


def test_a_backup_that_takes_too_long_is_ended_and_leaves_nothing(incbak: Incbak) -> None:
    """An image, and a served VM: jobs and bitmaps of the run are gone, and the next one works."""
    image = incbak.root / "web1.raw"
    endless = ("--speed-limit", "200k", "--max-duration", "0.5s")
    with serving(incbak.root, {"vda": image}, "--name", "web1") as serve:
        vm = f"qmp:{serve.monitor}"
        ran = incbak.run("full", vm, *endless)
        assert (ran.code, "took longer than 0.50 s" in ran.err, "--max-duration TIME" in ran.err) == (1, True, True)
        monitor = Qmp(serve.monitor)
        monitor = Qmp(serve.monitor)
        (disk,) = monitor("query-block")
        assert (monitor("query-jobs"), disk["inserted"].get("dirty-bitmaps", [])) == ([], [])
        monitor.close()
        assert incbak.list() == []
        incbak("full", vm)
    ran = incbak.run("full", image, "--name", "web2", *endless)
    assert (ran.code, "took longer than" in ran.err, len(incbak.list())) == (1, True, 1)
    incbak("full", image, "--name", "web2")
    assert incbak.run("full", image, "--max-duration", "soon").code == 2


def _slower(incbak: Incbak, source: Path | str, rate: str = "1M") -> float:
    """How many seconds longer a full of 4 MiB takes at that rate."""
    took = []
    for limit in ("0", rate):
        begun = time.monotonic()
        incbak("full", source, "--speed-limit", limit)
        took.append(time.monotonic() - begun)
    return took[1] - took[0]


def test_only_a_guest_can_be_frozen(incbak: Incbak) -> None:
    image = incbak.root / "web1.raw"
    ran = incbak.run("full", image, "--quiesce", "--agent-socket", "/run/web1.qga")
    assert (ran.code, "has no guest that could be frozen" in ran.err) == (2, True)
    assert incbak.run("full", image, "--quiesce").code == 2
    assert incbak.run("full", image, "--agent-socket", "/run/web1.qga").code == 2


def test_status_tells_what_the_next_incremental_reads_and_changes_nothing(incbak: Incbak) -> None:
    image = incbak.root / "web1.raw"
    (before,) = incbak("--json", "status", image).objects()
    assert (before["last"], before["base"], before["dirty"], before["reason"]) == (None, None, SIZE, "no-base")
    made = incbak("--json", "full", image).objects()[0]
    with serving(incbak.root, {"disk0": image}, "--name", "web1") as serve:
        with closing(serve.connect("disk0")) as guest:
            guest.write(b"y" * 5, 3 * 65536 - 2)
        for _ in range(2):
            (row,) = incbak("--json", "status", f"qmp:{serve.monitor}").objects()
            assert (row["last"], row["base"], row["dirty"], row["reason"]) == (made["id"], made["id"], 131072, None)
            assert row["bitmap"] == made["disks"][0]["bitmap"]
            assert row["age"] < 300
        said = incbak("status", f"qmp:{serve.monitor}").out
        assert made["id"][:8] in said
        assert "128.0 KiB" in said
        disk = incbak("--json", "incremental", f"qmp:{serve.monitor}").objects()[0]["disks"][0]
        assert (disk["read"], disk["base"]) == (131072, made["id"])


def test_the_shell_completes_commands_and_options(incbak: Incbak) -> None:
    def completed(words: str) -> list[str]:
        env = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" ")), "_INCBAK_COMPLETE": "bash_complete"}
        return [line.partition(",")[2] for line in incbak("", env=env).out.splitlines()]

    assert completed("incbak in") == ["init", "incremental"]
    assert completed("incbak full --qui") == ["--quiesce", "--quiet"]


def test_two_images_are_not_taken_for_one_disk(incbak: Incbak) -> None:
    """A name that somebody gave makes a full of the other one, with a warning and a note; never an incremental."""
    for name in "ab":
        (incbak.root / name).mkdir()
    first, second = (raw_image(incbak.root / name / "disk.raw", SIZE, name.encode()) for name in "ab")
    incbak("full", first)
    for argv in (("full", second), ("incremental", second), ("incremental", second, "--name", "disk")):
        ran = incbak.run(*argv)
        assert (ran.code, "is another image" in ran.err, "--disk" in ran.err) == (2, True, True), argv
    ran = incbak("full", second, "--name", "disk")
    assert "is another image" in ran.err
    assert "is another image" in str(incbak("--json", "show", "latest", "--name", "disk").objects()[0]["notes"])
    assert incbak.run("full", first, "--name", "disk", "--strict").code == 2
    incbak("incremental", first, "--name", "disk", "--disk", "first")
    assert len(incbak.list()) == 3


def test_a_name_that_the_monitor_does_not_say(incbak: Incbak) -> None:
    """It is a warning once and again, or refused; the right one is not, whatever was done under a wrong one."""
    image = raw_image(incbak.root / "a.raw", 1 << 20)
    with serving(incbak.root, {"vda": image}) as serve:
        right, wrong = ("full", f"qmp:{serve.monitor}"), ("full", f"qmp:{serve.monitor}", "--name", "zz")
        assert incbak.run(*wrong, "--strict").code == 2
        assert "is called" in incbak(*wrong).err
        assert incbak(*right, "--strict").err == ""
        assert "is of the same VM" in incbak(*wrong).err
        assert incbak.run(*wrong, "--strict").code == 2
        assert incbak(*right, "--strict").err == ""

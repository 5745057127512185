"""Which disks a VM has, however they are attached and whatever holds them; monitors over TCP. No guest is booted."""

from __future__ import annotations

import random
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.cli import Incbak, content, differing
from tests.kit.guest import Guest, GuestDisk, need_guest
from tests.kit.live import backup_jobs, content_of, eventually, ours_in, qcow2_image
from tests.kit.need import need
from tests.kit.serve import raw_image, serving

pytestmark = pytest.mark.kvm
SIZE = 3 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    need_guest()
    need("qemu-img", "qemu-io")
    made = Incbak(tmp_path)
    made("init")
    return made


def filled(path: Path, seed: int) -> Path:
    return raw_image(path, SIZE, random.Random(seed).randbytes(1 << 20))


def filled_qcow2(path: Path, size: int = SIZE) -> Path:
    qcow2_image(path, size)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 7 1M 300k", path], check=True, capture_output=True)
    return path


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_every_kind_of_disk(incbak: Incbak) -> None:
    tmp = incbak.root
    top = tmp / "top.qcow2"
    filled_qcow2(tmp / "base.qcow2")
    create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", top]
    subprocess.run(create, check=True, cwd=tmp, timeout=20)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -P 9 0 64k", top], check=True, capture_output=True)
    remote = tmp / "remote"
    remote.mkdir()
    with serving(remote, {"far": filled(tmp / "far.raw", 1)}, "--name", "remote") as serve:
        disks = [
            GuestDisk("scsi", filled(tmp / "scsi.raw", 2), bus="scsi", iothread=True),
            GuestDisk("ide", filled(tmp / "ide.raw", 3), bus="ide"),
            GuestDisk("nvme", filled_qcow2(tmp / "nvme.qcow2"), format="qcow2", bus="nvme"),
            GuestDisk("old", filled(tmp / "old.raw", 4), legacy=True),
            GuestDisk("top", top, format="qcow2"),
            GuestDisk("far", str(serve.uri("far"))),
            GuestDisk("fixed", filled(tmp / "fixed.raw", 5), read_only=True),
        ]
        with Guest(tmp / "guest", disks, arguments=["-S"]) as guest:
            _every_kind(incbak, guest, [d for d in disks if not d.read_only])


def _every_kind(incbak: Incbak, guest: Guest, disks: list[GuestDisk]) -> None:
    (made,) = incbak("--json", "full", f"qmp:{guest.monitor}", "--name", "vm").objects()
    names = {"old": "old"} | {d.name: f"{d.name}-dev" for d in disks if not d.legacy}
    assert {d["name"] for d in made["disks"]} == set(names.values())
    assert any("it is read-only" in note for note in made["notes"])
    (again,) = incbak("--json", "incremental", f"qmp:{guest.monitor}", "--name", "vm").objects()
    assert {(d["reason"], d["read"]) for d in again["disks"]} == {(None, 0)}
    assert {d["root"] for d in again["disks"]} == {d["root"] for d in made["disks"]}
    assert ours_in(guest) == []
    for disk in disks:
        image = incbak.root / "far.raw" if disk.name == "far" else Path(disk.source)
        assert differing(incbak.restored(disk=names[disk.name]), content_of(image)) == [], disk.name
    shown = incbak("show", "latest", "--vm").out
    for part in ('"machine"', '"qemu"', "base.qcow2", "scsi-dev"):
        assert part in shown
    looks = {f["what"]: f for f in incbak("--json", "doctor", f"qmp:{guest.monitor}", "--name", "vm").objects()}
    assert "its bitmaps outlast a restart" in looks["disk nvme-dev"]["text"]
    assert "incbak watch" in looks["disk ide-dev"]["hint"]
    assert "is left out: it is read-only" in looks["disk fixed-dev"]["text"]


def test_the_variables_of_uefi_are_a_disk(incbak: Incbak) -> None:
    """In flash: the code is read-only and left out, what the firmware stores is not."""
    code, variables = incbak.root / "code.fd", incbak.root / "vars.fd"
    shutil.copy("/usr/share/seabios/bios-256k.bin", code)
    raw_image(variables, 256 << 10, random.Random(7).randbytes(100_000))
    flash = [f"if=pflash,unit=0,format=raw,readonly=on,file={code}", f"if=pflash,unit=1,format=raw,file={variables}"]
    arguments = ["-S", "-drive", flash[0], "-drive", flash[1]]
    disks = [GuestDisk("vda", filled(incbak.root / "vda.raw", 8))]
    with Guest(incbak.root / "guest", disks, arguments=arguments) as guest:
        (made,) = incbak("--json", "full", f"qmp:{guest.monitor}", "--name", "vm").objects()
        (again,) = incbak("--json", "incremental", f"qmp:{guest.monitor}", "--name", "vm").objects()
        assert ours_in(guest) == []
    assert [d["name"] for d in made["disks"]] == ["pflash1", "vda-dev"]
    assert [(d["kind"], d["read"]) for d in again["disks"]] == [("incremental", 0)] * 2
    assert any("pflash0" in note and "read-only" in note for note in made["notes"])
    assert differing(incbak.restored(disk="pflash1"), content(variables)) == []


def test_storage_daemon_and_qemu_make_the_same_backup(incbak: Incbak) -> None:
    image = filled_qcow2(incbak.root / "web1.qcow2")
    with Guest(incbak.root / "guest", [GuestDisk("vda", image, format="qcow2")], arguments=["-S"]) as guest:
        (by_qemu,) = incbak("--json", "full", f"qmp:{guest.monitor}", "--name", "a").objects()
        guest.quit()
    (by_daemon,) = incbak("--json", "full", image, "--name", "b").objects()
    assert by_qemu["disks"][0]["root"] == by_daemon["disks"][0]["root"]


def test_a_monitor_over_tcp(incbak: Incbak) -> None:
    image = filled(incbak.root / "vda.raw", 6)
    port = free_port()
    arguments = ["-S", "-qmp", f"tcp:127.0.0.1:{port},server=on,wait=off"]
    with Guest(incbak.root / "guest", [GuestDisk("vda", image)], arguments=arguments) as guest:
        incbak("full", f"qmp:127.0.0.1:{port}", "--name", "vm")
        (made,) = incbak("--json", "incremental", f"qmp:127.0.0.1:{port}", "--name", "vm").objects()
        assert (made["disks"][0]["kind"], made["disks"][0]["read"]) == ("incremental", 0)
        assert differing(incbak.restored(), content(image)) == []
        assert ours_in(guest) == []


@pytest.fixture
def slow(incbak: Incbak) -> Iterator[tuple[Incbak, Path, Guest]]:
    """A VM with a qcow2 disk that has a backup, and of which another is under way."""
    image = filled_qcow2(incbak.root / "vda.qcow2", 32 << 20)
    with Guest(incbak.root / "guest", [GuestDisk("vda", image, format="qcow2")], arguments=["-S"]) as guest:
        incbak("full", f"qmp:{guest.monitor}", "--name", "vm")
        yield incbak, image, guest


def test_qemu_ends_cleanly_during_a_backup(slow: tuple[Incbak, Path, Guest]) -> None:
    """As after a guest's shutdown; the bitmap of the last backup is kept, and that of the broken one is not used."""
    incbak, image, guest = slow
    process = incbak.popen("full", f"qmp:{guest.monitor}", "--name", "vm", "--speed-limit", "2M")
    eventually(lambda: backup_jobs(guest.qmp), 20, "a job")
    assert guest.quit() == 0
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "Traceback" not in err
    (made,) = incbak("--json", "incremental", image, "--name", "vm", "--disk", "vda-dev").objects()
    assert (made["disks"][0]["reason"], made["disks"][0]["read"]) == (None, 0)
    assert differing(incbak.restored(), content_of(image)) == []

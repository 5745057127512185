"""A real guest with an ext4 file system on disks of ``incbak serve``: backups while it writes, restores, e2fsck."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from tests.kit import records
from tests.kit.cli import Incbak, content, differing
from tests.kit.guest import Guest, GuestDisk, Target, need_guest
from tests.kit.need import need
from tests.kit.serve import Serve, raw_image, serving

SLOTS = 211
STREAM = 7
ON_DISK = Target(disk="vdb", spacing=3 * 65536)
IN_FILE = Target(file="/mnt/records", spacing=4096)


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    need_guest()
    need("mkfs.ext4", "e2fsck", "debugfs")
    made = Incbak(tmp_path)
    made("init")
    return made


def guest_on(serve: Serve, directory: Path) -> Guest:
    return Guest(directory, [GuestDisk(name, str(serve.uri(name))) for name in ("vda", "vdb")])


def check_backup(incbak: Incbak, ident: str, acknowledged: int) -> int:
    """The file system is whole, and the records of both disks are those of one instant; the newest record."""
    directory = incbak.root / "out"
    directory.mkdir(exist_ok=True)
    incbak("-q", "restore", ident, directory, "--force")
    root, other = directory / "vda.raw", directory / "vdb.raw"
    subprocess.run(["e2fsck", "-E", "journal_only", "-y", root], check=False, capture_output=True)
    checked = subprocess.run(["e2fsck", "-fn", root], check=False, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    file = directory / "records"
    subprocess.run(["debugfs", "-R", f"dump /records {file}", root], check=True, capture_output=True)
    images = [ON_DISK.blocks(other, SLOTS), IN_FILE.blocks(file, SLOTS)]
    return records.check(images, STREAM, SLOTS, acknowledged)


@pytest.mark.kvm
def test_a_guest_writes_all_the_time(incbak: Incbak) -> None:
    tmp = incbak.root
    images = {"vda": raw_image(tmp / "vda.raw", 128 << 20), "vdb": raw_image(tmp / "vdb.raw", 64 << 20)}
    subprocess.run(["mkfs.ext4", "-q", "-F", images["vda"]], check=True)
    acknowledged: dict[str, int] = {}

    def back_up(serve: Serve, guest: Guest, kind: str) -> list[dict]:
        before = guest.acked["w"]
        made = incbak("--json", kind, f"qmp:{serve.monitor}").objects()[0]
        acknowledged[made["id"]] = before
        return made["disks"]

    with serving(tmp, images) as serve, guest_on(serve, tmp / "guest") as guest:
        guest("mount", disk="vda", directory="/mnt")
        guest.start_writer("w", STREAM, [ON_DISK, IN_FILE], slots=SLOTS)
        guest.wait_acked("w", 50)
        assert [d["reason"] for d in back_up(serve, guest, "full")] == [None, None]
        for _ in range(4):
            guest.wait_more("w", 30)
            disks = back_up(serve, guest, "incremental")
            assert [d["kind"] for d in disks] == ["incremental"] * 2
            assert 0 < disks[1]["read"] < 64 << 20
        figures = guest.stop_writer("w")
        assert figures["failed"] is None
        guest("unmount", directory="/mnt")
        assert guest.poweroff() == 0
        assert serve.stop() == 0
    with serving(tmp, images) as serve, guest_on(serve, tmp / "guest") as guest:
        guest("mount", disk="vda", directory="/mnt")
        guest.start_writer("w", STREAM, [ON_DISK, IN_FILE], slots=SLOTS, first=figures["next"])
        guest.wait_more("w", 30)
        assert [d["reason"] for d in back_up(serve, guest, "incremental")] == [None, None]
        guest.wait_more("w", 30)
        serve.stop(signal.SIGKILL)
        newest = guest.acked["w"]
    with serving(tmp, images) as serve:
        made = incbak("--json", "incremental", f"qmp:{serve.monitor}").objects()[0]
        assert [d["kind"] for d in made["disks"]] == ["incremental"] * 2
        acknowledged[made["id"]] = newest
        for name, image in images.items():
            assert differing(incbak.restored(made["id"], name), content(image)) == []
    found = {ident: check_backup(incbak, ident, n) for ident, n in acknowledged.items()}
    assert list(found.values()) == sorted(found.values())
    assert len(found) == 7

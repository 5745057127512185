"""What holds bytes of a disk is written by another program between two backups: nothing of the bitmap is believed."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path
from typing import Any

from tests.kit.cli import Incbak
from tests.kit.devices import loop_device, partition, written
from tests.kit.need import need

MIB = 1 << 20


def backed_up(incbak: Incbak, kind: str, image: Path, *options: str) -> dict[str, Any]:
    ran = incbak("--json", kind, image, "--name", "vm", *options)
    (disk,) = ran.objects()[0]["disks"]
    return dict(disk)


def restored(incbak: Incbak) -> bytes:
    incbak("-q", "restore", "latest", incbak.root / "restored", "--force")
    return (incbak.root / "restored").read_bytes()


def told(disk: dict[str, Any]) -> tuple[str, str | None]:
    return disk["kind"], disk["reason"]


def test_a_loop_device_whose_file_was_written(tmp_path: Path, incbak: Incbak) -> None:
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom(4 * MIB))
    with loop_device(backing) as loop:
        backed_up(incbak, "full", loop)
        assert told(backed_up(incbak, "incremental", loop)) == ("incremental", None)
        written(backing, MIB)
        assert told(backed_up(incbak, "incremental", loop)) == ("full", "disk-changed")
        assert restored(incbak) == backing.read_bytes()


def test_a_partition_whose_disk_was_written(tmp_path: Path, incbak: Incbak) -> None:
    """Where its neighbour was written too, the loop device's file shows it all the same: see `incbak.device`."""
    backing = tmp_path / "backing"
    backing.write_bytes(os.urandom(4 * MIB))
    with loop_device(backing) as whole, partition(whole, 1, MIB, 2 * MIB, tmp_path / "part") as part:
        backed_up(incbak, "full", part)
        assert told(backed_up(incbak, "incremental", part)) == ("incremental", None)
        written(whole, 2 * MIB)
        assert told(backed_up(incbak, "incremental", part)) == ("full", "disk-changed")
        assert restored(incbak) == backing.read_bytes()[MIB : 3 * MIB]


def qcow2(path: Path, *options: str) -> Path:
    need("qemu-img", "qemu-storage-daemon")
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path], check=True, timeout=20)
    return path


def content(image: Path) -> bytes:
    plain = image.with_suffix(".plain")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, plain], check=True, timeout=20)
    return plain.read_bytes()


def test_a_data_file_that_was_written(tmp_path: Path, incbak: Incbak) -> None:
    """Of an image that is off, and of its backing file."""
    options = ("-o", f"data_file={tmp_path}/base-data,data_file_raw=on,size=4M")
    base = qcow2(tmp_path / "base.qcow2", *options)
    image = qcow2(tmp_path / "disk.qcow2", "-o", f"data_file={tmp_path}/data", "-b", base.name, "-F", "qcow2")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 1 0 1M", image]
    subprocess.run(command, check=True, timeout=20, capture_output=True)
    backed_up(incbak, "full", image)
    assert told(backed_up(incbak, "incremental", image)) == ("incremental", None)
    for name, reason in (("data", "disk-changed"), ("base-data", "backing-changed")):
        written(tmp_path / name, MIB // 2 if name == "data" else 3 * MIB)
        assert told(backed_up(incbak, "incremental", image)) == ("full", reason)
    assert told(backed_up(incbak, "incremental", image)) == ("incremental", None)
    assert restored(incbak) == content(image)


def test_a_device_below_an_overlay_that_was_written(tmp_path: Path, incbak: Incbak) -> None:
    """As a template on a logical volume; not through this name of it."""
    (tmp_path / "backing").write_bytes(os.urandom(4 * MIB))
    with loop_device(tmp_path / "backing") as loop:
        number = loop.stat().st_rdev
        os.mknod(tmp_path / "node", 0o600 | stat.S_IFBLK, number)
        image = qcow2(tmp_path / "disk.qcow2", "-b", str(loop), "-F", "raw")
        allowed = ("--allow-backing", str(loop))
        backed_up(incbak, "full", image, *allowed)
        assert told(backed_up(incbak, "incremental", image, *allowed)) == ("incremental", None)
        written(tmp_path / "node", MIB)
        assert told(backed_up(incbak, "incremental", image, *allowed)) == ("full", "backing-changed")
        assert restored(incbak) == content(image)


def test_a_device_whose_writes_are_not_counted(tmp_path: Path, incbak: Incbak) -> None:
    """Its count stands still, whoever writes."""
    backing = tmp_path / "backing"
    backing.write_bytes(bytes(2 * MIB))
    with loop_device(backing) as loop:
        (switch := Path(f"/sys/block/{loop.name}/queue/iostats")).write_text("0")
        try:
            backed_up(incbak, "full", loop)
            written(loop, MIB)
            assert told(backed_up(incbak, "incremental", loop)) == ("full", "unproven")
            assert restored(incbak) == backing.read_bytes()
        finally:
            switch.write_text("1")

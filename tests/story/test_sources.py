"""What holds bytes of a disk is written by another program between two backups: nothing of the bitmap is believed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cli import Incbak
from tests.kit.devices import loop_device, partition, written

MIB = 1 << 20


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    made = Incbak(tmp_path)
    made("init")
    return made


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

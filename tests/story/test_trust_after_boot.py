"""A block device after a boot: read whole, or believed by a sample of it, as its owner decides."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import uuid
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import IO, Any

import pytest

from incbak.engine.image import ImageEngine
from tests.kit.cli import Incbak
from tests.kit.need import missing, need, need_root
from tests.kit.serve import raw_image, serving

CLUSTER = 65536
SIZE = 64 * CLUSTER
ELSEWHERE = 5 * CLUSTER + 20_000
"""None of the blocks that tell another disk at once is there."""


class Device(Incbak):
    """A loop device with content, served once and backed up, cluster 3 written since; its host has come up again."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.boot, self.backing = root / "boot-id", raw_image(root / "backing", SIZE, random.Random(1).randbytes(SIZE))
        ran = subprocess.run(["losetup", "-f", "--show", self.backing], capture_output=True, text=True, check=False)
        if ran.returncode:
            missing("losetup", "no loop device can be had here")
        self.path = Path(ran.stdout.strip())
        self.holder: IO[bytes] | None = None
        self.reboot()

    def environment(self, extra: Any = None) -> dict[str, str]:
        return {**super().environment(extra), "INCBAK_BOOT_ID_FILE": str(self.boot)}

    def reboot(self) -> None:
        """The host comes up again."""
        self.boot.write_text(f"{uuid.uuid4()}\n")

    def begin(self) -> None:
        """See the class."""
        self("init")
        with serving(self.root, {"disk0": self.path}, env={"INCBAK_BOOT_ID_FILE": str(self.boot)}) as serve:
            self("full", f"qmp:{serve.monitor}", "--name", "vm")
            with closing(serve.connect("disk0")) as client:
                client.write(b"s" * CLUSTER, 3 * CLUSTER)
            assert serve.stop() == 0
        self.reboot()

    def back_up(self, *options: str) -> dict[str, Any]:
        """An incremental of the device."""
        record: dict[str, Any] = self("--json", "incremental", self.path, "--name", "vm", *options).objects()[0]
        return record

    def write_behind(self) -> None:
        """Change one cluster where neither a bitmap nor the device's page cache sees it."""
        self.holder = self.path.open("rb")  # as long as somebody has it open, its pages stay
        self.holder.read()
        with self.backing.open("r+b") as f:
            f.seek(ELSEWHERE)
            f.write(b"another host")
            os.fsync(f)


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    need_root()
    need("losetup")
    made = Device(tmp_path)
    made.begin()
    yield made
    if made.holder:
        made.holder.close()
    subprocess.run(["losetup", "--detach", str(made.path)], check=True)


SAMPLE = ("--trust-after-boot", "sample")


def _facts(record: dict[str, Any]) -> tuple[str | None, int]:
    (disk,) = record["disks"]
    return disk["reason"], disk["read"] // CLUSTER


def test_without_a_word_of_its_owner_it_is_read_whole(device: Device) -> None:
    assert _facts(device.back_up()) == ("unproven", 64)
    assert _facts(device.back_up()) == (None, 0)


def test_a_sample_speaks_for_it(device: Device) -> None:
    """What is marked is not compared; the record says so; in this boot the kernel's count tells again."""
    made = device.back_up(*SAMPLE)
    assert _facts(made) == (None, 1)
    assert any("63 random clusters match the base" in note for note in made["notes"])
    again = device.back_up()
    assert _facts(again) == (None, 0)
    assert not any("sample" in note for note in again["notes"])
    device("restore", "latest", device.root / "restored.raw")
    assert (device.root / "restored.raw").read_bytes() == device.path.read_bytes()


def test_a_sample_that_differs_is_final(device: Device) -> None:
    """It is read past the page cache. Also a run that makes no backup then leaves no bitmap that could be believed."""
    device.write_behind()
    ran = device.run("incremental", device.path, "--name", "vm", *SAMPLE, "--no-fallback")
    assert ran.code == 4
    with device.backing.open("r+b") as f:
        f.seek(ELSEWHERE)
        f.write(random.Random(1).randbytes(SIZE)[ELSEWHERE : ELSEWHERE + 12])
    assert _facts(device.back_up(*SAMPLE)) == ("audit", 64)


def test_a_device_with_nothing_to_compare_is_read_whole(device: Device) -> None:
    """All that held data is marked: no cluster can speak for the rest."""
    device.reboot()
    with serving(device.root, {"disk0": device.path}, env={"INCBAK_BOOT_ID_FILE": str(device.boot)}) as serve:
        device("full", f"qmp:{serve.monitor}", "--name", "vm")
        with closing(serve.connect("disk0")) as client:
            client.write(b"t" * SIZE, 0)
        assert serve.stop() == 0
    device.reboot()
    made = device.back_up(*SAMPLE)
    assert _facts(made) == ("unproven", 64)
    assert "too little unmarked data" in made["disks"][0]["detail"]


def test_a_run_that_fails_after_its_sample_has_proven_nothing(device: Device) -> None:
    """The next run without the option reads all, and one with it samples again."""
    ran = device.run("incremental", device.path, "--name", "vm", *SAMPLE, env={"INCBAK_CRASH_AT": "runner.planned"})
    assert ran.code == -9
    listed = device("--json", "bitmap", "list").objects()
    assert [b["reason"] for b in listed] == ["unproven"]
    assert _facts(device.back_up(*SAMPLE)) == (None, 1)


def test_an_engine_that_only_had_it_open_has_proven_nothing(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is provisional stays so on disk, whatever becomes of the run."""
    monkeypatch.setenv("INCBAK_BOOT_ID_FILE", str(device.boot))

    async def open_and_close() -> list[bool]:
        engine = ImageEngine(device.path, device.state, "vm", None, sampling=True)
        (disk,) = (await engine.describe()).disks
        await engine.close()
        return [b.provisional for b in disk.bitmaps]

    assert [asyncio.run(open_and_close()) for _ in range(2)] == [[True], [True]]


def test_the_configuration_says_so_too(device: Device) -> None:
    """``status`` tells that the bitmap is not believed yet, and changes nothing."""
    config = device.root / "incbak.toml"
    config.write_text(f'[defaults]\ntrust-after-boot = "sample"\n[vms.vm]\nsource = "{device.path}"\n')
    config.chmod(0o600)
    env = {"INCBAK_CONFIG": str(config)}
    (row,) = device("--json", "status", "vm", env=env).objects()
    assert (row["reason"], row["dirty"], row["sample"]) == (None, CLUSTER, True)
    assert "64.0 KiB if a sample agrees" in device("status", "vm", env=env).out
    (record,) = device("--json", "incremental", "vm", env=env).objects()
    assert _facts(record) == (None, 1)
    (row,) = device("--json", "status", "vm", env=env).objects()
    assert row["sample"] is False
    config.write_text(f'[vms.vm]\nsource = "{device.path}"\ntrust-after-boot = "hope"\n')
    assert "There are: read, sample." in device.run("incremental", "vm", env=env).err

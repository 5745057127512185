"""Targets that are no NBD nodes, on ``incbak serve`` and on QEMU: another disk, a qcow2 image, the disk itself."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.need import need
from tests.kit.serve import wait_until
from tests.kit.twins import FIRST, GRAIN, SIZE, Engine, alike, both

pytestmark = pytest.mark.qemu


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    with both(tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")) as found:
        yield found


def done(engine: Engine) -> list[Any]:
    wait_until(lambda: not engine.jobs(), "the job is gone")
    return engine.events()


@pytest.mark.parametrize("sync", ["full", "incremental"])
def test_another_disk(engines: tuple[Engine, Engine], sync: str) -> None:
    """What is written there is in that disk's bitmap."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write(FIRST, 0x11)
        more = {"bitmap": "b"} if sync == "incremental" else {}
        told = [engine.backup(target="drive1", sync=sync, **more), done(engine)]
        told += [engine.bitmap(), engine.digest(), engine.bitmap("drive1"), engine.digest("drive1")]
        guest = engine.connect("drive1")
        told.append([guest.read(cluster * GRAIN, 10) for cluster in FIRST])
        guest.close()
        return [*told, engine.backup(target="drive0", sync="full")]

    told = alike(engines, run)
    assert told[4]["count"] == (SIZE if sync == "full" else len(FIRST) * GRAIN)


def plain(image: Path) -> bytes:
    out = image.with_suffix(".plain")
    subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(out)], check=True)
    return out.read_bytes()


def test_qcow2_images(engines: tuple[Engine, Engine]) -> None:
    """A new one, and incrementals into it: with its format, and without: QEMU looks into it, we at its name."""
    need("qemu-img", "qemu-nbd")

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        out = engine.directory / "out.qcow2"
        arguments = {"device": "drive0", "target": str(out), "job_id": "j"}
        engine.write(FIRST, 0x22)
        told = [engine.ask("drive-backup", **arguments, sync="full", format="qcow2"), done(engine), plain(out)]
        for number, more in enumerate(({"format": "qcow2"}, {})):
            engine.write((30 + number,), 0x33)
            incremental = {"sync": "incremental", "bitmap": "b", "mode": "existing"}
            told += [engine.ask("drive-backup", **arguments, **incremental, **more), done(engine)]
            told += [plain(out), engine.bitmap(), engine.digest()]
        return told

    alike(engines, run)


def test_fleecing(tmp_path: Path) -> None:
    """QEMU's test 222: a point in time is read while the guest writes. QEMU keeps it with two nodes, we with one.

    Cluster by cluster: of a longer read QEMU 7.2 takes old content for a hole (`test_snapshot_access`).
    """

    def fix(engine: Engine) -> None:
        if engine.name == "incbak":
            engine.qmp("x-incbak-point-in-time-add", device="drive0", node_name="p")
            engine.qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(engine.directory / "p.sock")}})
        else:
            engine.guest.close()
            for drive in ("drive0", "drive1"):
                engine.qmp("block-export-del", id=drive, mode="hard")
                engine.qmp.wait_event("BLOCK_EXPORT_DELETED")
            engine.qmp("blockdev-add", driver="copy-before-write", node_name="cbw", file="drive0", target="drive1")
            export = {"type": "nbd", "id": "drive0", "node_name": "cbw", "name": "drive0", "writable": True}
            engine.qmp("block-export-add", **export)
            engine.guest = engine.connect("drive0")
            engine.qmp("blockdev-add", driver="snapshot-access", node_name="p", file="cbw")
        engine.qmp("block-export-add", type="nbd", id="p", node_name="p")

    def run(engine: Engine) -> list[Any]:
        engine.write((*FIRST, 30, 31), 0x11)
        fix(engine)
        reader = engine.connect("p", "p.sock" if engine.name == "incbak" else "nbd.sock")
        told: list[Any] = [reader.size, reader.read_only]
        engine.write((0, 1, 63), 0x22)
        engine.guest.write(b"some", 5 * GRAIN + 777)
        engine.guest.write_zeroes(30 * GRAIN, 2 * GRAIN)
        told.append(b"".join(reader.read(offset, GRAIN) for offset in range(0, SIZE, GRAIN)))
        told.append(engine.guest.read(0, SIZE))
        told += [engine.ask("blockdev-del", node_name="p").replace("Block device", "Node")[:40]]
        reader.close()
        return told

    for name in ("ours", "theirs"):
        (tmp_path / name).mkdir()
    with both(tmp_path / "ours", tmp_path / "theirs") as engines:
        told = alike(engines, run)
    assert told[2] != told[3]
    assert told[2][30 * GRAIN :][:1] == b"\x11"

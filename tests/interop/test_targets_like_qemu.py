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
    """A new one, and incrementals into it: with its format, and without, which is then looked for."""
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

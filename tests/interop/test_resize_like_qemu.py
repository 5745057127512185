"""Disks that grow between incrementals, as in QEMU's test 124, on ``incbak serve`` and on QEMU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tests.kit.serve import wait_until
from tests.kit.twins import GRAIN, SIZE, Engine, alike, both

pytestmark = pytest.mark.qemu
GROWN = SIZE + 16 * GRAIN


@pytest.fixture
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    with both(tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")) as found:
        yield found


def incremental(engine: Engine) -> Any:
    reply = engine.backup(sync="incremental", bitmap="b")
    wait_until(lambda: not engine.jobs(), "the job is gone")
    return reply


def test_a_disk_that_grows_between_incrementals(engines: tuple[Engine, Engine]) -> None:
    """Into a target that grows with it. Our bitmap has all of the new end, QEMU's what was written there."""

    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.write((0, 5), 0x11)
        told = [engine.resize(GROWN), engine.guest.size]
        engine.write((7, 66), 0x22)
        count = engine.bitmap()["count"]
        assert count == (4 + (15 if engine.name == "incbak" else 0)) * GRAIN
        peer = engine.target("t0", size=GROWN)
        told += [incremental(engine), engine.bitmap(), engine.digest(), peer.disk.read(0, GROWN)]
        engine.write((79,), 0x33)
        return [*told, incremental(engine), engine.bitmap(), peer.disk.read(0, GROWN)]

    told = alike(engines, run)
    assert told[:3] == [{}, GROWN, {}]


def test_a_target_of_the_old_size_is_refused(engines: tuple[Engine, Engine]) -> None:
    def run(engine: Engine) -> list[Any]:
        engine.clear()
        engine.target("t0")
        told = [engine.resize(GROWN), incremental(engine), engine.resize(SIZE), engine.guest.size]
        engine.write((63,), 0x44)
        return [*told, engine.guest.read(SIZE - 1, 1)]

    alike(engines, run)


def test_what_cannot_be_a_size(engines: tuple[Engine, Engine]) -> None:
    """With the errors of the look-up, in QEMU's words."""

    def run(engine: Engine) -> list[Any]:
        asked: list[dict[str, Any]] = [{"device": "nothing"}, {"node_name": "nothing"}, {}]
        told = [engine.ask("block_resize", size=SIZE, **arguments) for arguments in asked]
        told += [engine.ask("block_resize", node_name="drive0", size=size) for size in (-1, "big", 1 << 63)]
        return [*told, engine.ask("block_resize", node_name="drive0"), engine.resize((1 << 63) - 1)]

    assert all(isinstance(reply, str) for reply in alike(engines, run))

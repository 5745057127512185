"""What ``bitmap list`` and ``bitmap show`` tell of a file."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from incbak.bitmap.store import get_dirty_blocks
from incbak.cli.main import cli
from incbak.extents import total
from tests.unit.bitmap.scene import CLUSTER, NAME, SIZE, Scene

TAIL = SIZE % CLUSTER


@pytest.mark.parametrize(
    ("marks", "dirty"),
    [
        ([], 0),
        ([(0, 1)], CLUSTER),
        ([(0, 1), (CLUSTER - 1, 2), (5 * CLUSTER, 1)], 3 * CLUSTER),
        ([(SIZE - 1, 1)], TAIL),
        ([(SIZE - TAIL - 1, 2)], CLUSTER + TAIL),
        ([(0, SIZE)], SIZE),
    ],
)
@pytest.mark.parametrize("command", [("list",), ("show", "vm")])
def test_dirty_bytes_end_with_the_disk(
    scene: Scene, marks: list[tuple[int, int]], dirty: int, command: tuple[str, ...]
) -> None:
    bitmap = scene.create()
    for offset, length in marks:
        bitmap.mark(offset, length)
    bitmap.close(scene.fingerprint())
    ran = CliRunner().invoke(cli, ["--state-dir", str(scene.state), "--json", "bitmap", *command])
    assert json.loads(ran.output)["dirty"] == dirty == total(get_dirty_blocks(scene.state, "vm", "disk", NAME))

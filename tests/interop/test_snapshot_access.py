"""What a job in QEMU copies from a point in time that the guest has zeroed or overwritten in the meantime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from incbak.engine.qemu_filter import in_flight
from tests.kit.serve import wait_until
from tests.kit.twins import CLUSTERS, GRAIN, SIZE, Engine, theirs

pytestmark = pytest.mark.qemu
DATA = (0, 5, 20, 30, 31, 40, 41, 42, 63)
"""Clusters with content; holes between them."""


def fix(engine: Engine) -> None:
    """A point in time of drive0, node ``p``; the guest's writes go through its filter."""
    engine.guest.close()
    for drive in ("drive0", "drive1"):
        engine.qmp("block-export-del", id=drive, mode="hard")
        engine.qmp.wait_event("BLOCK_EXPORT_DELETED")
    engine.qmp("blockdev-add", driver="copy-before-write", node_name="cbw", file="drive0", target="drive1")
    export = {"type": "nbd", "id": "drive0", "node_name": "cbw", "name": "drive0", "writable": True}
    engine.qmp("block-export-add", **export)
    engine.guest = engine.connect("drive0")
    engine.qmp("blockdev-add", driver="snapshot-access", node_name="p", file="cbw")


def copied(directory: Path, perf: dict[str, Any]) -> set[int]:
    """The clusters that are not as they were at the instant, in what a job with ``perf`` has copied."""
    directory.mkdir()
    with theirs(directory) as engine:
        engine.write(DATA, 0x11)
        before = engine.guest.read(0, SIZE)
        fix(engine)
        engine.guest.write_zeroes(30 * GRAIN, 2 * GRAIN)
        engine.guest.write_zeroes(41 * GRAIN, GRAIN)
        engine.write((5, 6), 0x22)
        engine.guest.trim(20 * GRAIN, GRAIN)
        peer = engine.target("t0")
        arguments = {"device": "p", "target": "t0", "sync": "full", "job_id": "j", "x_perf": perf}
        engine.qmp("blockdev-backup", **arguments)
        wait_until(lambda: not engine.jobs(), "the job is gone")
        found = peer.disk.read(0, SIZE)
        engine.guest.close()
        peer.stop()
    return {c for c in range(CLUSTERS) if found[c * GRAIN :][:GRAIN] != before[c * GRAIN :][:GRAIN]}


def test_old_content_is_copied_where_the_guest_has_zeroed_it(tmp_path: Path) -> None:
    """I1. With larger chunks QEMU 7.2 copies zeroes in place of clusters 30 and 31."""
    assert copied(tmp_path / "qemu", in_flight()) == set()

"""Grouped incrementals against a model: a bitmap is a set of clusters, a target a disk of some time ago.

The story of QEMU's test 124 without end: two disks are written, backed up in groups that succeed, fail or are
cancelled, are tried again, grow and shrink; QEMU's test 257 says what is in the bitmaps after each.
"""

from __future__ import annotations

import errno
import random
from pathlib import Path

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.memory import MemoryDisk
from tests.kit.serve import Machine, Peer, wait_until

GRAIN = 65536
CLUSTERS = 24
DISKS = ("vda", "vdb")
STEPS = 30


class Model:
    """One disk: what it holds is on the disk itself; here is which clusters its bitmap has, and its target."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name, self.node = machine, name, f"t-{name}"
        self.dirty: set[int] = set()
        self.faults = Faults(once=True)
        self.peer: Peer | None = None
        self.clusters = CLUSTERS
        machine("block-dirty-bitmap-add", node=name, name="b")
        self.new_target()
        self.dirty = set(range(self.clusters))
        machine.guest[name].write_zeroes(0, self.clusters * GRAIN, unmap=False, fast=False)

    def new_target(self) -> None:
        """A target of the disk's size, with what the former one had: as a file that is resized with its disk."""
        kept = b""
        if self.peer:
            kept = self.peer.disk.read(0, self.peer.disk.size)
            self.machine("blockdev-del", node_name=self.node)
            self.peer.stop()
            self.machine.peers.remove(self.peer)
        self.peer = self.machine.target(self.node, self.clusters * GRAIN, self.faults)
        inner: MemoryDisk = self.peer.disk.inner  # type: ignore[union-attr, assignment]
        inner.data[: len(kept)] = kept[: len(inner.data)]

    def write(self, rng: random.Random) -> None:
        cluster = rng.randrange(self.clusters)
        count = min(rng.choice((1, 1, 2, 5)), self.clusters - cluster)
        self.machine.guest[self.name].write(memoryview(rng.randbytes(count * GRAIN)), cluster * GRAIN)
        self.dirty.update(range(cluster, cluster + count))

    def resize(self, rng: random.Random) -> None:
        before, self.clusters = self.clusters, rng.randrange(CLUSTERS // 2, CLUSTERS * 2)
        self.machine("block_resize", device=self.name, size=self.clusters * GRAIN)
        self.dirty = {c for c in self.dirty if c < self.clusters} | set(range(before, self.clusters))
        self.new_target()

    def check(self) -> None:
        runs = self.machine.tracked[self.name].bitmaps["b"].runs().tolist()
        assert {c for first, count in runs for c in range(first, first + count)} == self.dirty
        disk = self.machine.disks[self.name].read(0, self.clusters * GRAIN)
        assert self.peer
        there = self.peer.disk.read(0, self.clusters * GRAIN)
        differ = {c for c in range(self.clusters) if disk[c * GRAIN :][:GRAIN] != there[c * GRAIN :][:GRAIN]}
        assert differ <= self.dirty, "a cluster that differs from the target is clean"


def back_up(machine: Machine, models: list[Model], rng: random.Random) -> None:
    """A group of two, that ends in one of several ways, with writes while it is under way."""
    mode = rng.choice(("on-success", "on-success", "never", "always"))
    end = rng.choice(("success", "success", "failure", "cancel"))
    loser = rng.choice(models)
    if end == "failure":
        loser.faults.seen.clear()
        loser.faults.fail = {"write": (1, errno.EIO), "zero": (1, errno.EIO)}
    common = {"sync": "bitmap", "bitmap": "b", "bitmap-mode": mode, "auto-finalize": False}
    actions = [
        {"type": "blockdev-backup", "data": {"device": m.name, "target": m.node, "job-id": f"j{m.name}", **common}}
        for m in models
    ]
    before = {m.name: set(m.dirty) for m in models}
    machine.events.clear()
    machine("transaction", actions=actions, properties={"completion-mode": "grouped"})
    fails = end == "failure" and bool(loser.dirty)
    for model in models:
        model.dirty = set()
        for _ in range(rng.randrange(3)):
            model.write(rng)
    if not fails:
        jobs = machine.vm.jobs
        wait_until(lambda: all(str(jobs.find(f"j{m.name}").status) == "pending" for m in models), "both are pending")  # type: ignore[union-attr]
        machine("job-cancel" if end == "cancel" else "job-finalize", id=f"j{rng.choice(models).name}")
    for model in models:
        machine.ended(f"j{model.name}")
        gives_up = mode == "on-success" and not fails and end != "cancel"
        if mode == "always":
            left = {c for f, n in machine.tracked[model.name].bitmaps["b"].runs().tolist() for c in range(f, f + n)}
            kept = left - model.dirty
            assert kept <= before[model.name]
            assert fails or not kept
            model.dirty = left
        elif not gives_up:
            model.dirty |= before[model.name]
        model.faults.fail.clear()


@pytest.mark.parametrize("seed", range(3))
def test_grouped_incrementals_retries_and_growing_disks(tmp_path: Path, seed: int) -> None:
    """I2 and I6, faults rows 35, 36 and 58."""
    rng = random.Random(seed)
    disks = {name: FaultyDisk(MemoryDisk(CLUSTERS * GRAIN, name=name), Faults()) for name in DISKS}
    with Machine(tmp_path, disks) as machine:
        models = [Model(machine, name) for name in DISKS]
        for _ in range(STEPS):
            match rng.choice(("write", "write", "back up", "back up", "resize")):
                case "write":
                    rng.choice(models).write(rng)
                case "back up":
                    back_up(machine, models, rng)
                case _:
                    rng.choice(models).resize(rng)
            for model in models:
                model.check()

"""Backups and prunes in any interleaving: at every step of a prune others begin, go on, commit or die, and so may it.

A backup here is what the runner makes of it: it reads the list, takes over the tree of a base without looking at what
is below it, finds content that is there, and commits much later. The model is what each listed backup must hold; and
what prunes have kept of what is needed must be what counting anew finds.
"""

from __future__ import annotations

import secrets
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from incbak import durable
from incbak.errors import LockedError
from incbak.repo import repository, tree
from incbak.repo.check import check
from incbak.repo.counts import Keys, Numbers
from incbak.repo.needs import Needs
from incbak.repo.prune import Options, prune
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from incbak.repo.tree import TreeUpdate
from incbak.repo.writer import Writer
from tests.unit.repo.scene import CLUSTER, cluster, new, record_of, restore, store

CLUSTERS = 6
SIZE = CLUSTERS * CLUSTER


class Killed(BaseException):
    """The prune dies here."""


@dataclass
class Run:
    """A backup that has begun."""

    stack: ExitStack
    repo: Repository
    writer: Writer
    update: TreeUpdate
    content: list[int]


class World:
    """A repository, what its backups hold, and the runs under way by VM."""

    def __init__(self, path: Path, rng: Random) -> None:
        self.path, self.rng = path, rng
        self.held: dict[str, list[int]] = {}
        self.runs: dict[str, Run] = {}
        self.done: list[str] = []
        new(path)

    def step(self) -> None:
        """One thing that somebody else does."""
        vm = self.rng.choice("ab")
        if vm not in self.runs:
            self.begin(vm)
        elif self.rng.random() < 0.8:
            self.commit(vm)
        else:
            self.done.append("died")
            self.runs.pop(vm).stack.close()

    def begin(self, vm: str) -> None:
        """Look for a base and for content; nothing is committed yet."""
        repo, stack = Repository.open(self.path), ExitStack()
        try:
            still = stack.enter_context(repo.vm_lock(vm))
        except LockedError:
            self.done.append("locked out")
            stack.close()
            return
        bases = [r for r in repo.backups(vm) if r.id in self.held]
        base = self.rng.choice(bases) if bases and self.rng.random() < 0.7 else None
        writer = stack.enter_context(repo.writer(still))
        if base is not None and not writer.trusts_bases:
            base = None
        content = list(self.held[base.id]) if base else [0] * CLUSTERS
        update = repo.update(writer, base.disks[0] if base else None, SIZE)
        for number in self.rng.sample(range(CLUSTERS), self.rng.choice((1, 2, CLUSTERS))):
            content[number] = self.rng.randrange(12)
            digest = np.frombuffer(store(writer, cluster(content[number])), dtype=np.uint8).reshape(1, 32)
            update.set(np.array([number]), digest)
        if self.rng.random() < 0.3:
            writer.finish()
        self.runs[vm] = Run(stack, repo, writer, update, content)
        self.done.append("begun")

    def commit(self, vm: str) -> None:
        """The rest of a run."""
        run = self.runs.pop(vm)
        record = record_of(run.repo, {"vda": (SIZE, run.update.finish())}, vm=vm)
        run.writer.commit(record)
        run.stack.close()
        self.held[record.id] = run.content
        self.done.append("committed")

    def prune(self) -> None:
        """With others at its steps; perhaps killed at one."""
        kill = self.rng.random() < 0.4

        def hook(name: str) -> None:
            if not name.startswith("prune."):
                return
            while self.rng.random() < 0.4:
                self.step()
            if kill and self.rng.random() < 0.2:
                raise Killed

        options = Options(self.rng.choice((0.0, 0.0, 1e6)), self.rng.choice((0.0, 0.5, 1.0)))
        with mock.patch.object(durable, "crash_point", hook):
            try:
                done = prune(Repository.open(self.path), Policy(last=self.rng.choice((1, 2))), None, options)
                assert done.trouble is None or isinstance(done.trouble, LockedError)
                self.done.append("held up" if done.trouble else "pruned")
            except Killed:
                self.done.append("killed")
        listed = Repository.open(self.path).storage.list("backups")
        self.held = {ident: content for ident, content in self.held.items() if ident in listed}

    def look(self) -> None:
        """What is listed is what the model says, to the last cluster."""
        repo = Repository.open(self.path)
        records = repo.backups()
        assert {r.id for r in records} == self.held.keys(), self.done
        for record in records:
            assert restore(repo, record) == [cluster(n) for n in self.held[record.id]], self.done
        kept, anew = Needs(repo), Needs(repo, anew=True)
        for needs in (kept, anew):
            needs.count(records)
        (keys, counts), (wanted, right) = (
            [np.concatenate(c) for c in zip(*_all(n), strict=True)] for n in (kept, anew)
        )
        assert (keys.tolist(), counts.tolist()) == (wanted.tolist(), right.tolist()), self.done
        repo.close()


def _all(needs: Needs) -> list[tuple[Keys, Numbers]]:
    """All keys with their counts, in parts, one of which is empty."""
    return [(np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)), *needs.all()]


@given(st.integers(0, (1 << 64) - 1))
@settings(max_examples=60, deadline=None)
def test_what_is_listed_restores_in_any_interleaving(seed: int) -> None:
    """faults rows 15, 49. Small pages make deep trees. Names are drawn from the seed, too: they decide which copy is
    found first."""
    rng, names = Random(seed), Random(~seed)
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(repository, "_CONDEMNING", 0.0),
        mock.patch.multiple(tree, FANOUT=2, PAGE=64),
        mock.patch.object(secrets, "token_hex", lambda count: names.randbytes(count).hex()),
        mock.patch.object(secrets, "token_bytes", names.randbytes),
    ):
        world = World(Path(directory, "repo"), rng)
        for _ in range(rng.randrange(2, 14)):
            world.step() if rng.random() < 0.6 else world.prune()
            world.look()
        for vm in list(world.runs):
            world.commit(vm)
        assert check(Repository.open(world.path), read_data=True).problems == []
        prune(Repository.open(world.path), Policy(last=1), None, Options(grace=0.0))
        listed = Repository.open(world.path).storage.list("backups")
        world.held = {ident: content for ident, content in world.held.items() if ident in listed}
        world.look()
        assert check(Repository.open(world.path), read_data=True).problems == []

"""A disk, a repository and the commands to look after them; checks what each must be true."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from incbak import durable
from incbak.errors import IncbakError
from incbak.extents import whole_sectors
from incbak.nbd.client import NbdClient
from torturelib.children import Child, spawn
from torturelib.model import Model, State, Write, apply, difference, random_write, read_state

CLUSTER = 65536
COUNT_ONLY = f"{durable.ANY}:0"
"""Arms nothing, but has a command count its crash points."""


class LostError(Exception):
    """Something that was acknowledged or backed up is not what it must be."""


def _verb(argv: tuple[str, ...]) -> str:
    return next(word for word in argv if not word.startswith("-"))


@dataclass
class Outcomes:
    """Counts by name, and why full reads happened."""

    counts: dict[str, int] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, count: int = 1) -> None:
        """One more of ``name``."""
        self.counts[name] = self.counts.get(name, 0) + count

    def reason(self, name: str) -> None:
        """A disk was read whole because of ``name``."""
        self.reasons[name] = self.reasons.get(name, 0) + 1


class World:
    """Everything below ``root``; deterministic but for the timing of kills."""

    def __init__(self, root: Path, rng: Random, outcomes: Outcomes, aside: Path | None = None) -> None:
        """What is there already is taken as it is. ``aside``: where sockets, restores and what was printed go."""
        self.root, self.rng, self.outcomes, self.aside = root, rng, outcomes, aside or root
        self.image, self.repo = root / "disk.raw", root / "repo"
        self.run = self.aside / "run"
        self.nbd, self.monitor = self.run / "nbd.sock", self.run / "qmp.sock"
        if self.image.exists():
            self.model = Model(self.image.stat().st_size, read_state(self.image))
        else:
            self.model = Model(rng.choice((160 << 20, (130 << 20) + 512, (200 << 20) + 37)))
        self.backups: dict[str, State] = {}
        self.number = 0
        self.undisturbed: dict[str, tuple[float, int]] = {}
        """Seconds that the last whole run of each command took, and the crash points that it passed."""
        self.serve: Child | None = None
        self.client: NbdClient | None = None
        self.root.mkdir(parents=True, exist_ok=True)
        self.run.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not self.image.exists():
            with self.image.open("wb") as f:
                f.truncate(self.model.size)
            self.command("init", str(self.repo))

    def spawn(self, *argv: str, crash_at: str | None = None, fault_at: str | None = None, log: str = "cmd") -> Child:
        """A command on this world's repository and state directory."""
        base = ["-r", str(self.repo), "--state-dir", str(self.root / "state")]
        if argv[0] == "init":
            base = base[2:]
        return spawn([*base, *argv], self.aside / log, crash_at=crash_at, fault_at=fault_at)

    def command(self, *argv: str) -> str:
        """A command that must succeed; its stdout."""
        began = time.monotonic()
        child = self.spawn(*argv, crash_at=COUNT_ONLY)
        if child.wait() != 0:
            raise LostError(f"incbak {' '.join(argv)} exited {child.status}: {child.err.read_text()[-500:]}")
        self.undisturbed[_verb(argv)] = time.monotonic() - began, child.steps
        return child.out.read_text()

    def moment(self, verb: str) -> float:
        """A random time, in seconds, in which a run of ``verb`` is likely still going on, however fast the machine."""
        return self.rng.random() * self.undisturbed.get(verb, (0.05, 0))[0]

    def step(self, verb: str) -> str:
        """Any of the crash points that the last undisturbed run of ``verb`` passed, in the form that arms it."""
        return f"{durable.ANY}:{self.rng.randint(1, max(self.undisturbed.get(verb, (0, 0))[1], 1))}"

    # -- the guest ------------------------------------------------------------------------------------------------

    def start(self, crash_at: str | None = None, fault_at: str | None = None) -> bool:
        """Start serve and connect the guest; false when it ended before it was ready (something was armed)."""
        armed = crash_at or fault_at
        argv = ("serve", "--name", "vm", "--socket", str(self.nbd), "--monitor", str(self.monitor))
        self.serve = self.spawn(*argv, f"vda={self.image}", crash_at=crash_at, fault_at=fault_at, log="serve")
        end = time.monotonic() + 60
        while "ready" not in self.serve.out.read_text() if self.serve.out.exists() else True:
            if (status := self.serve.poll()) is not None:
                if armed is None:
                    raise LostError(f"serve exited {status} at its start: {self.serve.err.read_text()[-500:]}")
                return False
            if time.monotonic() > end:
                raise LostError("serve was not ready within 60 s")
            time.sleep(0.002)
        try:
            self.client = NbdClient.connect(f"nbd+unix:///vda?socket={self.nbd}", timeout=60)
        except (IncbakError, OSError):
            if armed is None:
                raise
            return False
        return True

    def write(self) -> bool:
        """One random guest write; false when serve is gone."""
        self.number += 1
        return self.issue(random_write(self.rng, self.model.size, self.number))

    def issue(self, write: Write) -> bool:
        """One guest write, recorded before it goes out and again when it is answered."""
        assert self.client
        self.model.writes.append(write)
        try:
            if write.data is not None:
                self.client.write(write.data, write.offset)
            elif write.unmap:
                self.client.trim(write.offset, write.length)
                self.client.write_zeroes(write.offset, write.length)
            else:
                self.client.write_zeroes(write.offset, write.length)
        except (IncbakError, OSError):
            return False
        self.model.acknowledged += 1
        return True

    def gone(self) -> None:
        """Serve is dead: compare the image with what was acknowledged, and take it as the truth."""
        if self.client:
            self.client.abort()
        self.client = None
        if self.serve and self.serve.poll() is None:
            self.serve.kill()
        self.serve = None
        if problem := self.model.settle(read_state(self.image)):
            raise LostError(problem)

    def stop(self) -> None:
        """A clean shutdown."""
        assert self.serve
        if self.client:
            self.client.close()
        self.serve.kill(15)
        if (status := self.serve.wait()) != 0:
            raise LostError(f"serve exited {status} on SIGTERM: {self.serve.err.read_text()[-500:]}")
        self.gone()

    # -- backups --------------------------------------------------------------------------------------------------

    def listed(self) -> list[dict[str, object]]:
        """The repository's own list."""
        return [json.loads(line) for line in self.command("--json", "list").splitlines()]

    def backup(self) -> None:
        """An incremental of the quiet disk, which must equal it."""
        assert self.model.acknowledged == len(self.model.writes)
        self.command("-q", "incremental", f"qmp:{self.monitor}")
        self.account(*self.new_backups(len(self.model.writes), len(self.model.writes)))

    def new_backups(self, low: int, high: int) -> list[str]:
        """Restore every backup not seen before; each must be the disk after ``low`` to ``high`` writes."""
        fresh = []
        for entry in self.listed():
            ident = str(entry["id"])
            if ident not in self.backups:
                self.backups[ident] = self._prefix(ident, self.restore(ident), low, high)
                fresh.append(ident)
                for disk in entry["disks"]:  # type: ignore[attr-defined]
                    if disk["reason"]:
                        self.outcomes.reason(disk["reason"])
        return fresh

    def account(self, *fresh: str) -> None:
        """The quiet backup that was just made was right."""
        if len(fresh) != 1:
            raise LostError(f"one backup was made, {len(fresh)} are listed")
        disk = self.listed()[-1]["disks"][0]  # type: ignore[index]
        self.outcomes.add("correct-after-full-read" if disk["reason"] else "correct")

    def _prefix(self, ident: str, found: State, low: int, high: int) -> State:
        state = self.model.state(low)
        for count in range(low, high + 1):
            if count > low:
                apply(state, self.model.writes[count - 1])
            if state == found:
                return found
        near = difference(self.model.state(low), found)
        raise LostError(f"backup {ident} is no state of the disk between writes {low} and {high}; at {low}: {near}")

    def restore(self, ident: str) -> State:
        """The content of a backup, by the ordinary command."""
        target = self.aside / "restored.raw"
        target.unlink(missing_ok=True)
        self.command("-q", "restore", ident, str(target))
        if (size := os.stat(target).st_size) != (expected := whole_sectors(self.model.size)):
            raise LostError(f"backup {ident} restored to {size} bytes instead of {expected}")
        return read_state(target)

    def verify_all(self) -> None:
        """Every backup ever made restores to what it held, and the repository checks."""
        idents = {str(entry["id"]) for entry in self.listed()}
        if missing := self.backups.keys() - idents:
            raise LostError(f"backups vanished from the list: {sorted(missing)}")
        for ident, state in self.backups.items():
            if problem := difference(state, self.restore(ident)):
                raise LostError(f"backup {ident} changed: {problem}")
            self.outcomes.add("old-backups-restored")
        self.command("-q", "check", "--read-data")

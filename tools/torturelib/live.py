"""A real guest on a raw and a qcow2 disk, under ``incbak watch``: anything is killed at any moment while it writes.

The guest writes numbered records and reports each that is synced. In a round a runner, watch or QEMU is killed, at
random or at a crash point, or the guest shuts down and starts again; five rounds have each of these. Then the guest
must be running, and have seen no error; and the next incremental must restore to disks that hold every record which
was acknowledged before it began, in half of the rounds to the disks bit for bit, with the VM paused. Outcomes count
disks, not backups.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random

from incbak import durable
from tests.kit.cli import content, differing
from tests.kit.guest import Guest, GuestDisk, GuestFailed, Target
from tests.kit.live import Writes, content_of, ours_in, qcow2_image, unharmed
from tests.kit.serve import raw_image
from torturelib.children import Child, spawn
from torturelib.world import LostError, Outcomes

SIZE = 64 << 20
TRACEBACK = "Traceback (most recent call last)"
WRITES = Writes("w", 11, [Target("vda", spacing=3 * 65536), Target("vdb", spacing=2 * 65536)], slots=331)
PATIENCE = 120.0
"""Seconds for whatever has to end: a command, a boot, a shutdown."""


class LiveWorld:
    """The VM, its disks, its repository. ``serve`` is what a campaign ends in any case: the VM with its watch."""

    def __init__(self, root: Path, rng: Random, outcomes: Outcomes) -> None:
        self.root, self.rng, self.outcomes = root, rng, outcomes
        root.mkdir(parents=True)
        self.run = Path(tempfile.mkdtemp(prefix="ibt"))
        self.images = {
            "vda": raw_image(root / "vda.raw", SIZE, rng.randbytes(1 << 20)),
            "vdb": qcow2_image(root / "vdb.qcow2", SIZE),
        }
        self.guest: Guest | None = None
        self.watch: Child | None = None
        self.armed: str | None = None  # where the watch that runs is to be killed
        self.acked = -1
        self.falling = False
        """The guest was told to power off: its kernel fails writes that are under way then."""
        self.backups: dict[str, int] = {}
        self.ways: list[Callable[[LiveWorld], None]] = []
        """What the next rounds do."""
        self.serve: LiveWorld | None = self
        try:
            with told("the beginning"):
                self.command("init", str(root / "repo"))
                self.start()
                self.command("-q", "full", *self.source)
                self.take_new(-1)
        except BaseException:
            self.kill()
            raise

    # -- commands -------------------------------------------------------------------------------------------------

    @property
    def vm(self) -> Guest:
        """The guest, which was started."""
        assert self.guest
        return self.guest

    @property
    def source(self) -> list[str]:
        """As arguments of a backup."""
        return [f"qmp:{self.vm.monitor}", "--name", "vm"]

    def spawn(self, *argv: str, crash_at: str | None = None, log: str = "cmd") -> Child:
        """A command on this world's repository and state directory."""
        base = [] if argv[0] == "init" else ["-r", str(self.root / "repo")]
        return spawn(["--state-dir", str(self.root / "state"), *base, *argv], self.root / log, crash_at=crash_at)

    def command(self, *argv: str) -> str:
        """A command that must succeed; its stdout."""
        child = self.spawn(*argv)
        if child.wait(PATIENCE) != 0:
            raise LostError(f"incbak {' '.join(argv)} exited {child.status}: {child.err.read_text()[-500:]}")
        return child.out.read_text()

    # -- the VM ---------------------------------------------------------------------------------------------------

    def start(self, crash_at: str | None = None) -> None:
        """Start it under watch, boot, and let the guest write. A watch that is killed as it loads has a successor."""
        disks = [GuestDisk(n, i, i.suffix.lstrip("."), iothread=True) for n, i in self.images.items()]
        monitor = ["-S", "-qmp", f"unix:{self.run / 'watch'},server=on,wait=off"]
        self.guest = Guest(self.root / "guest", disks, arguments=monitor, boot_timeout=PATIENCE)
        if not self.attach("--start", crash_at=crash_at):
            self.outcomes.add("kills of watch")
            self.attach("--start")
        self.guest.wait_ready(1, PATIENCE)
        self.guest.acked["w"] = self.acked
        WRITES.start(self.guest, self.acked + 1)

    def attach(self, *options: str, crash_at: str | None = None) -> bool:
        """Start a watch, and wait until it watches; false when it ended before that."""
        argv = ("watch", f"qmp:{self.run / 'watch'}", "--name", "vm", "--once", *options)
        self.watch, self.armed = self.spawn(*argv, crash_at=crash_at, log="watch"), crash_at
        end = time.monotonic() + PATIENCE
        while not (self.watch.out.exists() and "vm: " in self.watch.out.read_text()):
            if self.watch.poll() is not None:
                self.look_at(self.watch, crash_at)
                return False
            if time.monotonic() > end:
                raise TimeoutError("watch neither watched nor ended")
            time.sleep(0.01)
        return True

    def watch_ended(self, *, good: tuple[int, ...] = (0,)) -> bool:
        """Wait for it; whether it was not killed on the way."""
        assert self.watch
        status = self.look_at(self.watch, self.armed, good=good)
        if status > 0 and status not in good:
            self.outcomes.add("saves that failed")
        return status != -signal.SIGKILL

    def kill_watch(self) -> None:
        """With SIGKILL."""
        assert self.watch
        self.watch.kill()
        self.outcomes.add("kills of watch")

    @staticmethod
    def look_at(child: Child, crash_at: str | None = None, *, good: tuple[int, ...] = (0,)) -> int:
        """The end of a command: no traceback, no error without a word, none killed but those that we kill."""
        status, errors = child.wait(PATIENCE), child.err.read_text()
        if TRACEBACK in errors:
            raise LostError(f"{child.argv}: {errors[-1500:]}")
        if status in good or (crash_at and status == -signal.SIGKILL):
            return status
        if status <= 0 or not errors.strip():
            raise LostError(f"{child.argv} exited {status}: {errors[-500:]}")
        return status

    def is_up(self) -> bool:
        """Whether QEMU is there."""
        return self.guest is not None and self.guest.process.poll() is None

    def note_acked(self) -> int:
        """What the guest has acknowledged so far."""
        if self.guest:
            self.acked = max(self.acked, self.guest.acked.get("w", -1))
        return self.acked

    def down(self) -> None:
        """QEMU has ended, or is killed now."""
        self.note_acked()
        if self.guest:
            self.guest.kill()
            self.note_acked()
            if self.guest.failures and not self.falling:
                raise LostError(f"the guest has seen errors: {self.guest.failures}")
        self.guest, self.falling = None, False

    def gone(self) -> None:
        """The end of the campaign."""
        self.kill()

    def kill(self) -> None:
        """End everything that was started."""
        if self.watch and self.watch.poll() is None:
            self.watch.kill()
        if self.guest:
            self.note_acked()
            self.guest.kill()
        self.guest = self.serve = None
        shutil.rmtree(self.run, ignore_errors=True)

    # -- backups --------------------------------------------------------------------------------------------------

    def take_new(self, acked: int, *, paused: bool = False) -> int:
        """Check every backup that was not seen before: it holds what was acknowledged before. How many there are."""
        count = 0
        for line in self.command("--json", "list").splitlines():
            entry = json.loads(line)
            if entry["id"] in self.backups:
                continue
            self.backups[entry["id"]] = acked
            count += 1
            out = self.restored(entry["id"])
            if paused:
                self._is_as_the_disks(entry["id"], out)
            for disk in entry["disks"]:
                self.outcomes.add("correct-after-full-read" if disk["reason"] else "correct")
                if disk["reason"]:
                    self.outcomes.reason(f"{disk['name']}:{disk['reason']}")
        return count

    def restored(self, ident: str) -> Path:
        """All disks of a backup, after their records were looked at."""
        out = self.root / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        self.command("-q", "restore", ident, str(out))
        with told(f"backup {ident}"):
            WRITES.check(out, self.backups[ident])
        return out

    def _is_as_the_disks(self, ident: str, out: Path) -> None:
        for name, image in self.images.items():
            if wrong := differing(content(out / f"{name}-dev.raw"), content_of(image)):
                raise LostError(f"backup {ident} of the paused VM is not its disk {name}: {wrong[:5]}")

    def backup(self) -> None:
        """The next incremental, with the guest writing or the VM paused."""
        paused = self.rng.random() < 0.5
        if paused:
            self.vm.qmp("stop", PATIENCE)
        acked = self.note_acked()
        for _ in range(3):
            child = self.spawn("-q", "incremental", *self.source)
            if self.look_at(child) == 0:
                break
            self.outcomes.add("refused")  # where the machine is too slow, the guest comes first
        else:
            raise LostError(f"no backup can be made: {child.err.read_text()[-500:]}")
        if self.take_new(acked, paused=paused) != 1:
            raise LostError("one backup was made, but not one is listed")
        if paused:
            self.vm.qmp("cont", PATIENCE)  # what was passed to a paused QEMU stays listed until something else is
        elif left := ours_in(self.vm):
            raise LostError(f"a backup has left in QEMU: {left}")
        self.goes_on()

    def goes_on(self) -> None:
        """The guest runs, writes, and has seen no error."""
        with told("the guest"):
            unharmed(self.vm, "w", PATIENCE)

    def verify_all(self) -> None:
        """Every backup ever made still restores to what it held."""
        for ident in self.backups:
            self.restored(ident)
            self.outcomes.add("old-backups-restored")
        self.command("-q", "check", "--read-data")


@contextmanager
def told(what: str) -> Iterator[None]:
    """What the tests' kit finds wrong is a loss."""
    try:
        yield
    except (AssertionError, ValueError, GuestFailed) as e:
        raise LostError(f"{what}: {e}") from e


def _point(rng: Random, *prefixes: str) -> str:
    points = sorted(p for p in durable.POINTS if p.startswith(prefixes))
    return f"{rng.choice(points)}:{rng.choice((1, 1, 1, 2, 3))}"


def live_round(world: LiveWorld) -> None:
    """Hurt something, recover by the ordinary commands, look."""
    if not world.ways:
        ways = [_runner_killed, _runner_killed, _shut_down, _qemu_killed, _watch_killed]
        world.ways = world.rng.sample(ways, len(ways))
    way = world.ways.pop()
    with told(way.__name__):
        way(world)
        if not world.is_up():
            world.down()
            crash = _point(world.rng, "watch.", "bitmap.", "durable.") if world.rng.random() < 0.3 else None
            world.start(crash)
        elif world.watch is None or world.watch.poll() is not None:
            world.attach()
    world.backup()


def _a_runner(world: LiveWorld, crash: str | None = None) -> Child:
    kind = world.rng.choice(("full", "incremental", "incremental"))
    return world.spawn("-q", kind, *world.source, "--speed-limit", "40M", crash_at=crash, log="runner")


def _runner_killed(world: LiveWorld) -> None:
    crash = _point(world.rng, "qemu.", "runner.", "durable.") if world.rng.random() < 0.6 else None
    acked = world.note_acked()
    runner = _a_runner(world, crash)
    kill_at = time.monotonic() + (PATIENCE / 2 if crash else world.rng.uniform(0, 2.5))
    while runner.poll() is None and time.monotonic() < kill_at:
        time.sleep(0.01)
    if runner.poll() is None:
        runner.kill()
    killed = runner.status == -signal.SIGKILL
    world.outcomes.add("kills of the runner" if killed else "runner done before the kill")
    if not killed and world.look_at(runner) != 0:
        world.outcomes.add("refused")
    world.goes_on()
    world.take_new(acked)


def _watch_killed(world: LiveWorld) -> None:
    world.kill_watch()
    world.goes_on()
    if not world.attach():
        raise LostError("a watch that comes later does not watch")


def _qemu_killed(world: LiveWorld) -> None:
    acked, rng = world.note_acked(), world.rng
    runner = _a_runner(world) if rng.random() < 0.5 else None
    if rng.random() < 0.2:
        world.kill_watch()
    time.sleep(rng.uniform(0, 2.5))
    world.down()
    world.outcomes.add("kills of QEMU")
    _over(world, runner, acked)
    if world.watch and world.watch.status is None:
        world.watch_ended(good=(1,))


def _over(world: LiveWorld, runner: Child | None, acked: int) -> None:
    """A backup that was under way when the VM ended: it is there and right, or it is not there."""
    if runner:
        if world.look_at(runner) != 0:
            world.outcomes.add("refused")
        world.take_new(acked)


def _shut_down(world: LiveWorld) -> None:
    """By the guest; watch may be killed as it saves, and then a second one saves, as long as QEMU is there."""
    rng, acked = world.rng, world.note_acked()
    crash = _point(rng, "watch.", "saved.", "bitmap.", "durable.") if rng.random() < 0.5 else None
    if crash:
        world.kill_watch()
        if not world.attach(crash_at=crash):
            world.attach()
    runner = _a_runner(world) if rng.random() < 0.3 else None
    with told("the guest"):
        assert world.vm.failures == []
    if rng.random() < 0.5:
        world.vm.stop_writer("w")
    world.falling = True
    world.vm.send("poweroff")
    if not world.watch_ended():
        world.outcomes.add("kills of watch")
        with suppress(subprocess.TimeoutExpired):
            world.vm.process.wait(3)
        if world.is_up():
            world.attach()
            world.watch_ended()
    if (status := world.vm.process.wait(PATIENCE)) != 0:
        raise LostError(f"QEMU exited {status} after a shutdown")
    world.outcomes.add("shutdowns")
    world.down()
    _over(world, runner, acked)

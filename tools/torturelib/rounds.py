"""One round per target: work, hurt, recover, compare."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from random import Random

from incbak import durable
from torturelib.children import Child
from torturelib.failing import fault_round
from torturelib.model import difference, read_state
from torturelib.pruning import prune_round
from torturelib.rot import rot_round
from torturelib.world import LostError, World

TRACEBACK = "Traceback (most recent call last)"


def _point(rng: Random, *prefixes: str) -> str:
    points = sorted(p for p in durable.POINTS if p.startswith(prefixes))
    return f"{rng.choice(points)}:{rng.choice((1, 1, 1, 2, 3, 5))}"


def _pause(world: World) -> None:
    """Now and then the victim is stopped for a while first."""
    if world.serve and world.rng.random() < 0.1:
        world.serve.kill(signal.SIGSTOP)
        time.sleep(0.02)
        world.serve.kill(signal.SIGCONT)


def serve_round(world: World) -> None:
    """Kill serve while the guest writes, perhaps with a backup running; twice or three times before recovery."""
    rng = world.rng
    for _ in range(rng.choice((1, 2, 3))):
        if world.serve is None:
            crash = _point(rng, "bitmap.", "serve.", "durable.") if rng.random() < 0.4 else None
            if not world.start(crash):
                world.gone()
                world.outcomes.add("kills of serve")
                continue
        _serve_kill(world)
    if world.serve is None:
        world.start()
    for _ in range(rng.randrange(4)):
        world.write()
    world.backup()
    end = rng.random()
    if end < 0.3:
        world.stop()
    elif end < 0.5:
        world.gone()
        world.outcomes.add("kills of serve")


def _serve_kill(world: World) -> None:
    rng = world.rng
    runner: Child | None = None
    low = world.model.acknowledged
    kill_at = time.monotonic() + rng.choice((0.0, 0.005, 0.02, 0.1)) * rng.random()
    if rng.random() < 0.4:
        kind = rng.choice(("full", "incremental", "incremental"))
        runner = world.spawn("-q", kind, f"qmp:{world.monitor}", log="runner")
        kill_at += 0.15 * rng.random()
    _pause(world)
    while time.monotonic() < kill_at and world.write():
        pass
    assert world.serve
    world.serve.kill()
    world.outcomes.add("kills of serve")
    if runner:
        _refused_or_done(world, runner)
        world.new_backups(low, len(world.model.writes))
    world.gone()


def _refused_or_done(world: World, runner: Child) -> None:
    status = runner.wait()
    errors = runner.err.read_text()
    if TRACEBACK in errors:
        raise LostError(f"the runner printed a traceback: {errors[-1500:]}")
    if status != 0:
        if status > 0 and not errors.strip():
            raise LostError(f"the runner exited {status} without a word")
        world.outcomes.add("refused")


def runner_round(world: World) -> None:
    """Kill the runner at a random moment or at a crash point while the guest writes; the next run must do."""
    rng = world.rng
    if world.serve is None:
        world.start()
    crash = rng.choice((None, None, world.step("incremental"), _point(rng, "runner.", "repo.", "durable.", "backup.")))
    low = world.model.acknowledged
    kind = rng.choice(("full", "incremental", "incremental", "incremental"))
    runner = world.spawn("-q", kind, f"qmp:{world.monitor}", crash_at=crash, log="runner")
    kill_at = time.monotonic() + (2.0 if crash else world.moment("incremental"))
    while runner.poll() is None and time.monotonic() < kill_at:
        if not world.write():
            raise LostError("a guest write failed while a runner was killed")
    if runner.poll() is None:
        runner.kill()
    world.outcomes.add("kills of the runner" if runner.status == -signal.SIGKILL else "runner done before the kill")
    world.new_backups(low, len(world.model.writes))
    world.backup()
    if rng.random() < 0.1:
        world.stop()
        world.start()


def restore_round(world: World) -> None:
    """Kill a restore; its target must not pass for a good one, and the next restore must do."""
    rng = world.rng
    if world.serve is None:
        world.start()
    if not world.backups or rng.random() < 0.1:
        for _ in range(20):
            world.write()
        world.backup()
    ident = rng.choice(sorted(world.backups))
    target = world.aside / "killed.raw"
    target.unlink(missing_ok=True)
    crash = rng.choice((None, None, world.step("restore"), _point(rng, "restore.", "durable.")))
    child = world.spawn("-q", "restore", ident, str(target), crash_at=crash, log="restore")
    if not crash:
        time.sleep(world.moment("restore"))
        if child.poll() is None:
            child.kill()
    killed = child.wait() == -signal.SIGKILL
    world.outcomes.add("kills of restore" if killed else "restore done before the kill")
    if target.exists() and (problem := difference(world.backups[ident], read_state(target))):
        raise LostError(f"a killed restore left a wrong file under the target's name: {problem}")
    if problem := difference(world.backups[ident], world.restore(ident)):
        raise LostError(f"the restore after a killed one is wrong: {problem}")
    world.outcomes.add("correct")


ROUNDS: dict[str, Callable[[World], None]] = {
    "serve": serve_round,
    "runner": runner_round,
    "restore": restore_round,
    "fault": fault_round,
    "rot": rot_round,
    "prune": prune_round,
}

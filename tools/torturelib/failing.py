"""Storage that fails: the n-th write, sync or rename of serve or of a runner gets EIO or ENOSPC, once or from then on.

The guest may see an error only where a write cannot be recorded nor its bitmap be made invalid; a run says what failed;
nothing is lost, and when the fault is gone the next backup is right.
"""

from __future__ import annotations

from random import Random

from incbak import durable
from torturelib.world import LostError, World

TRACEBACK = "Traceback (most recent call last)"


def fault_round(world: World) -> None:
    """One fault in serve or in a runner, then a sound backup."""
    if world.rng.random() < 0.5:
        _serve_fails(world)
    else:
        _runner_fails(world)
    if world.serve is None:
        world.start()
    for _ in range(world.rng.randrange(4)):
        world.write()
    world.backup()


def _fault(rng: Random, *prefixes: str) -> str:
    points = sorted(p for p in (*durable.POINTS, "durable.sync") if p.startswith(prefixes))
    code = rng.choice(("EIO", "ENOSPC"))
    return f"{rng.choice(points)}:{rng.choice((1, 1, 2, 3, 5))}{rng.choice(('', '', '+'))}:{code}"


def _serve_fails(world: World) -> None:
    rng = world.rng
    if world.serve:
        world.stop()
    if not world.start(fault_at=_fault(rng, "bitmap.", "serve.", "durable.")):
        world.outcomes.add("starts refused")
        world.gone()
        return
    low = world.model.acknowledged
    alive = True
    for step in range(rng.randrange(2, 40)):
        if alive and step % 16 == 7:
            _a_backup(world, None, low)
        if alive and not world.write():
            world.outcomes.add("guest writes refused")
            alive = False
    if alive and rng.random() < 0.5:
        assert world.serve
        if world.client:
            world.client.close()
        world.serve.kill(15)
        world.serve.wait()
        _look_at(world.serve.err.read_text())
    world.outcomes.add("faults in serve")
    world.gone()


def _runner_fails(world: World) -> None:
    rng = world.rng
    if world.serve is None:
        world.start()
    low = world.model.acknowledged
    for _ in range(rng.randrange(10)):
        if not world.write():
            raise LostError("a guest write failed while nothing was wrong")
    _a_backup(world, _fault(rng, "runner.", "repo.", "durable."), low)
    world.outcomes.add("faults in the runner")


def _a_backup(world: World, fault: str | None, low: int) -> None:
    """A run that may fail, loudly; what it leaves is a backup that is right, or none."""
    kind = world.rng.choice(("full", "incremental", "incremental"))
    runner = world.spawn("-q", kind, f"qmp:{world.monitor}", fault_at=fault, log="runner")
    status = runner.wait()
    said = runner.err.read_text()
    _look_at(said)
    fresh = world.new_backups(low, len(world.model.writes))
    if status == 0 and len(fresh) != 1:
        raise LostError(f"a {kind} with {fault} says it is done, and {len(fresh)} backups are new")
    if status != 0:
        if not said.strip():
            raise LostError(f"a {kind} with {fault} exited {status} without a word")
        world.outcomes.add("backups refused")


def _look_at(said: str) -> None:
    if TRACEBACK in said or "internal error" in said:
        raise LostError(f"an unexpected error: {said[-1500:]}")

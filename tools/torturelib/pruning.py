"""Prunes between and beside backups: killed at random moments and at every crash point, with storage that fails.

What is still listed must restore, whatever happened; what the policy keeps must be listed; what was removed is taken
from the books. A prune that is not disturbed must end well and leave no garbage behind once its grace is over.
"""

from __future__ import annotations

import signal
import time
from random import Random

from incbak import durable
from torturelib.children import Child
from torturelib.model import difference
from torturelib.world import LostError, World

TRACEBACK = "Traceback (most recent call last)"
_POINTS = ("prune.", "prune.", "prune.", "durable.", "repo.")
TRIES = 4
"""Prunes in a row, of which one is to meet its end."""
_ALLOWED = (0, 1, 11)
"""Exit codes of a prune: done, a write failed, a backup was running."""


def prune_round(world: World) -> None:
    """A few backups, a prune that is hurt, perhaps with a backup beside it, a sound prune, and one more backup."""
    rng = world.rng
    if world.serve is None:
        world.start()
    while len(world.backups) < 3 or rng.random() < 0.3:
        for _ in range(rng.randrange(1, 20)):
            world.write()
        world.backup()
    low = world.model.acknowledged
    beside = _beside(world) if rng.random() < 0.4 else None
    for _ in range(rng.choice((1, 2))):
        for _ in range(TRIES):
            if _hurt(world, beside is not None):
                break
    if beside:
        _ended(world, beside)
        world.new_backups(low, len(world.model.writes))
    if rng.random() < 0.5:
        _sound(world)
    world.backup()
    ident = rng.choice(sorted(world.backups))
    if problem := difference(world.backups[ident], world.restore(ident)):
        raise LostError(f"backup {ident} is listed after a prune and wrong: {problem}")
    world.outcomes.add("restores after prunes")


def _rules(rng: Random) -> list[str]:
    rules = ["--keep-last", str(rng.choice((1, 1, 2, 3)))]
    rules += rng.choice(([], ["--keep-hourly", "2"], ["--keep-within", "1h"]))
    return [
        *rules,
        "--grace",
        rng.choice(("0", "0", "0", "300ms", "1d")),
        "--repack-below",
        rng.choice(("0", "50", "100", "100")),
    ]


def _beside(world: World) -> Child:
    """A backup that runs while the prune does; half of them read everything."""
    if not world.write():
        raise LostError("a guest write failed while nothing was wrong")
    runner = world.spawn("-q", world.rng.choice(("full", "incremental")), f"qmp:{world.monitor}", log="runner")
    time.sleep(0.05 * world.rng.random())
    return runner


def _hurt(world: World, accompanied: bool) -> bool:
    """A prune that is to be killed, that meets failing storage, or that nothing happens to; whether it was killed."""
    rng = world.rng
    point = f"{rng.choice(_points(rng))}:{rng.choice((1, 1, 1, 1, 1, 2))}"
    how = rng.choice(("point", "point", "step", "step", "kill", "kill", "fault", "nothing"))
    code = rng.choice(("ENOSPC", "EIO"))
    child = world.spawn(
        "-q",
        "prune",
        *_rules(rng),
        *("--lock-wait", rng.choice(("0", "200ms"))),
        crash_at={"point": point, "step": world.step("prune")}.get(how),
        fault_at=f"{point}{rng.choice(('', '+'))}:{code}" if how == "fault" else None,
        log="prune",
    )
    if how == "kill":
        time.sleep(world.moment("prune"))
        if child.poll() is None:
            child.kill()
    status = child.wait()
    killed = status == -signal.SIGKILL and how in ("point", "step", "kill")
    said = child.err.read_text() if child.err.exists() else ""
    if killed:
        world.outcomes.add("kills of prune")
    elif TRACEBACK in said or "internal error" in said or status not in _ALLOWED:
        raise LostError(f"a prune exited {status}: {said[-1500:]}")
    elif status == 11 and not accompanied:
        raise LostError(f"a prune with nothing beside it waits for a lock: {said[-500:]}")
    else:
        world.outcomes.add("prunes with a backup beside them" if status == 11 else "prunes to their end")
    _forget(world)
    return killed


def _points(rng: Random) -> list[str]:
    prefix = rng.choice(_POINTS)
    return sorted(p for p in durable.POINTS if p.startswith(prefix))


def _ended(world: World, runner: Child) -> None:
    """A backup beside a prune is not disturbed by it."""
    if runner.wait() != 0:
        raise LostError(f"a backup beside a prune exited {runner.status}: {runner.err.read_text()[-1000:]}")
    world.outcomes.add("backups beside prunes")


def _forget(world: World) -> None:
    """Take what is not listed any more from the books; the newest that was known, or a newer one, must be there."""
    listed = {str(entry["id"]) for entry in world.listed()}
    newest = next(reversed(world.backups), None)
    if newest not in listed and not listed - world.backups.keys():
        raise LostError(f"the newest backup {newest} was pruned")
    gone = world.backups.keys() - listed
    world.outcomes.add("backups pruned", len(gone))
    for ident in gone:
        del world.backups[ident]


def _sound(world: World) -> None:
    """A prune to its end: all garbage goes, and nothing is condemned then."""
    world.command("-q", "prune", *_rules(world.rng)[:2], "--grace", "0", "--repack-below", "100")
    _forget(world)
    if left := [p for p in (world.repo / "condemned").iterdir() if not p.name.startswith(".")]:
        raise LostError(f"a prune without a grace left {len(left)} condemnations")
    world.command("-q", "check")
    world.outcomes.add("sound prunes")

"""What backup runs have in an engine: found by its names, and told apart into runs at work and dead ones.

A runner that is killed leaves its nodes and its filter in QEMU. The guest goes on, but a migration fails until they are
gone. The next run of the same repository removes them; where none is due, or the repository is gone, `remove` does.

A run is at work while it has a job that runs: a dead runner's job pauses with an error when its target is cut, or waits
to be finalized (see `incbak.engine.qemu_jobs`). A job that is paused without an error was paused by another program.
Between its first node and its job a run that lives looks like a dead one, so the caller of `remove` makes sure that
none lives: by the VM's lock in the repository, or by asking.
"""

from __future__ import annotations

import re

from incbak.engine.base import PREFIX, Engine, Leftover
from incbak.engine.session import Session

_RUN = re.compile(f"({PREFIX}-([0-9a-f]{{8}})-([0-9a-f]{{8}}))-.*")
_WORKING = {"created", "running", "ready", "standby", "waiting"}


async def find_leftovers(session: Session) -> list[Leftover]:
    """Return the runs that have nodes or jobs in QEMU, by name. Raises `EngineError`."""
    jobs = await session.execute("query-jobs")
    sound = {str(job["device"]) for job in await session.execute("query-block-jobs") if job["io-status"] == "ok"}
    nodes = await session.execute("query-named-block-nodes", {"flat": True})
    names = [str(node["node-name"]) for node in nodes]
    at_work = [j["id"] for j in jobs if j["status"] in _WORKING or (j["status"] == "paused" and j["id"] in sound)]
    working = {found[1] for job in at_work if (found := _RUN.fullmatch(job))}
    runs = {m[1]: m[2] for name in (*names, *(str(job["id"]) for job in jobs)) if (m := _RUN.fullmatch(name))}
    return [
        Leftover(run, repository, tuple(n for n in names if n.startswith(f"{run}-")), run in working)
        for run, repository in sorted(runs.items())
    ]


async def remove(engine: Engine, leftover: Leftover) -> list[str]:
    """Remove all that a dead run has left but its bitmaps, which may be those of a backup; say what was removed.

    The caller makes sure that the run is dead.
    """
    keep = {bitmap.name for _, bitmap in await engine.bitmaps()}
    return await engine.cleanup(f"{leftover.run}-", keep | {leftover.run})

"""A second bitmap of each backup that shows whether the disk was shorter meanwhile: one bit, at its last cluster.

QEMU cuts a disk's bitmaps with the disk, and marks nothing when the disk grows again: a disk that was shrunk and has
its old size again reads as zeroes where the bitmap says that nothing was written. So beside the bitmap there is one
that does not record and has only the last cluster marked. If the disk was cut by a cluster or more, that mark is gone:
see `incbak.engine.base.EngineDisk.was_cut`. A disk that was cut inside its last cluster is not noticed.

No QMP command sets a bit, so the bitmap is merged from one of a ``null-co`` node of the same size, into which a job has
written one cluster through a window. The nodes, all with the name of the run in front, are no guest's:

====  ==============================================================
Nn    ``null-co``, with the bitmap
Nw    a raw node on its last cluster
Ns    ``null-co``, the source of the job Ne
====  ==============================================================

The job is a mirror: in QEMU 7.2 the start of a backup job drains all nodes, also the guests'.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress

from incbak.engine.base import DiskPlan, end_mark_of
from incbak.engine.session import CommandFailed, EngineSilent, Session
from incbak.errors import EngineError

log = logging.getLogger(__name__)

_SECONDS = 30.0
_POLL = 0.005
_MARK = "end"


async def add_end_mark(session: Session, plan: DiskPlan, number: int, *, persistent: bool) -> None:
    """Give the disk of ``plan``, number ``number`` of its run, the end mark of its new bitmap.

    Where it cannot be made, the bitmap is used without one. Raises `EngineGone` and `EngineSilent`.
    """
    ident = f"{plan.run}-{number}"
    try:
        await _write_last_cluster(session, ident, plan)
        if not await _is_set(session, f"{ident}n"):  # without its bit it would say that the disk was cut
            log.warning("a cut of disk %s will not be noticed: the mark cannot be made", plan.disk.name)
            return
        one = {"node": plan.disk.node, "name": end_mark_of(plan.new_bitmap)}
        add = one | {"granularity": plan.granularity, "disabled": True, "persistent": persistent}
        await session.execute("block-dirty-bitmap-add", add)
        source = {"node": f"{ident}n", "name": _MARK}
        merge = {"node": one["node"], "target": one["name"], "bitmaps": [source]}
        await session.execute("block-dirty-bitmap-merge", merge)
    except CommandFailed as e:
        log.warning("a cut of disk %s will not be noticed: %s", plan.disk.name, e)
        with suppress(CommandFailed):  # it may be there, without its bit
            one = {"node": plan.disk.node, "name": end_mark_of(plan.new_bitmap)}
            await session.execute("block-dirty-bitmap-remove", one)
    finally:
        with suppress(EngineError):
            for letter in "wns":
                await session.try_execute("blockdev-del", {"node-name": ident + letter})


async def _write_last_cluster(session: Session, ident: str, plan: DiskPlan) -> None:
    size = plan.disk.size
    offset = (size - 1) // plan.granularity * plan.granularity
    length = size - offset
    await session.execute("blockdev-add", {"driver": "null-co", "node-name": f"{ident}n", "size": size})
    mark = {"node": f"{ident}n", "name": _MARK, "granularity": plan.granularity}
    await session.execute("block-dirty-bitmap-add", mark)
    window = {"driver": "raw", "node-name": f"{ident}w", "file": f"{ident}n", "offset": offset, "size": length}
    await session.execute("blockdev-add", window)
    source = {"driver": "null-co", "node-name": f"{ident}s", "size": length, "read-zeroes": True}
    await session.execute("blockdev-add", source)
    await _mirror(session, ident)


async def _mirror(session: Session, ident: str) -> None:
    job = {"job-id": f"{ident}e", "device": f"{ident}s", "target": f"{ident}w", "sync": "full", "auto-dismiss": False}
    await session.execute("blockdev-mirror", job)
    await _end(session, f"{ident}e")


async def _is_set(session: Session, node: str) -> bool:
    nodes = await session.execute("query-named-block-nodes", {"flat": True})
    marks = (b for n in nodes if n["node-name"] == node for b in n.get("dirty-bitmaps", ()))
    return any(b.get("name") == _MARK and b["count"] for b in marks)


async def _end(session: Session, job: str) -> None:
    """Wait until the mirror has written all, cancel it, which a mirror that is ready takes for its end; dismiss it."""
    deadline = asyncio.get_running_loop().time() + _SECONDS
    while asyncio.get_running_loop().time() < deadline:
        found = next((j for j in await session.execute("query-jobs") if j["id"] == job), None)
        if found is None:
            return
        if found["status"] == "ready":
            await session.try_execute("job-cancel", {"id": job})
        elif found["status"] == "concluded":
            await session.execute("job-dismiss", {"id": job})
            return
        await asyncio.sleep(_POLL)
    raise EngineSilent(f"job {job} did not end within {_SECONDS:g} s")

"""Waiting for block jobs over QMP: any engine's."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from incbak.engine.base import PREFIX, DiskResult, ProgressCallback
from incbak.engine.headway import LONG_STALL_SECONDS, Headway
from incbak.engine.session import CommandFailed, EngineSilent, Session
from incbak.errors import EngineError

_POLL = 0.5
JOB_CLUSTER = 65536  # of a QEMU backup job whose target is an NBD node
_ENDED = {"concluded", "null"}


async def wait_for_jobs(
    session: Session, jobs: Mapping[str, str], copied: ProgressCallback, *, speed: int = 0
) -> dict[str, DiskResult]:
    """Wait until all ``jobs`` (job id to disk) have concluded; dismiss them. Call it with ``auto-dismiss`` off.

    Raises `EngineSilent` when none of them gets on: jobs that are at it may make others wait.
    """
    results: dict[str, DiskResult] = {}
    headway = Headway(LONG_STALL_SECONDS, speed)
    headway.begin()
    events = session.listen("JOB_STATUS_CHANGE")
    try:
        while True:
            found = {job["id"]: job for job in await session.execute("query-jobs")}
            for ident, disk in jobs.items():
                if disk not in results:
                    await _look(session, found.get(ident), ident, disk, results, copied)
            if len(results) == len(jobs):
                return results
            headway.took(sum(job["current-progress"] for ident, job in found.items() if ident in jobs))
            if headway.stalled:
                raise EngineSilent(str(headway))
            try:
                async with asyncio.timeout(_POLL):
                    await events.get()
            except TimeoutError:
                continue
    finally:
        session.forget(events)


async def _look(
    session: Session,
    job: dict[str, Any] | None,
    ident: str,
    disk: str,
    results: dict[str, DiskResult],
    copied: ProgressCallback,
) -> None:
    if job is None:
        results[disk] = DiskResult(error="another program has removed the job of the backup")
        return
    copied(disk, job["current-progress"], job["total-progress"])
    if job["status"] in _ENDED:
        error = job.get("error")
        if error is None and job["current-progress"] != job["total-progress"]:
            error = "the job was cancelled"
        results[disk] = DiskResult(job["current-progress"], error)
        await session.execute("job-dismiss", {"id": ident})


async def without_padding(session: Session, target: str, size: int, result: DiskResult) -> DiskResult:
    """QEMU's jobs count the disk's last cluster whole, even where the disk ends in it: the bytes that really went.

    Whether that cluster was copied at all is known from how far the ``target`` node was written.
    """
    padding = -size % JOB_CLUSTER
    if not padding or result.error:
        return result
    stats = await session.execute("query-blockstats", {"query-nodes": True})
    reached = next((s["stats"]["wr_highest_offset"] for s in stats if s.get("node-name") == target), 0)
    return DiskResult(result.copied - padding) if reached >= size else result


async def refuse_beside_backup(session: Session) -> None:
    """Raise `EngineError` where a job of a backup is in the engine."""
    if ours := [job["id"] for job in await session.execute("query-jobs") if job["id"].startswith(f"{PREFIX}-")]:
        hint = "Run again when the backup has ended. Where none runs, the next backup removes what a dead one has left."
        raise EngineError(f"a backup is at work in the engine: job {ours[0][:80]}", hint=hint)


async def cancel_jobs(session: Session, prefix: str, timeout: float = 30.0) -> list[str]:
    """Cancel and dismiss every job whose id begins with ``prefix``; what was done, in words."""
    done: list[str] = []
    deadline = asyncio.get_running_loop().time() + timeout
    while asyncio.get_running_loop().time() < deadline:
        ours = [job for job in await session.execute("query-jobs") if job["id"].startswith(prefix)]
        if not ours:
            break
        for job in ours:
            try:
                if job["status"] in _ENDED:
                    await session.execute("job-dismiss", {"id": job["id"]})
                    done.append(f"job {job['id']}")
                else:
                    await session.execute("job-cancel", {"id": job["id"]})
            except CommandFailed:
                continue
        await asyncio.sleep(0.02)
    return done

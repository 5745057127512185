"""Backup jobs in a running QEMU, which must not end while QEMU drains.

A job that ends changes the block graph. If that happens inside somebody's drain of all nodes (``stop``, a reset), QEMU
7.2 with an I/O thread aborts or hangs (measured: two disks, targets cut off during ``system_reset``). So a job that is
done waits for ``job-finalize``, and one that meets an error pauses until it is cancelled: both are commands, and no
command runs inside a drain.

That it met one is told by its event, and by its ``io-status``; but ``cont``, by anybody, sets that to ``ok`` again, and
the job stays paused. So the event counts, also when it was heard late.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from incbak.engine.base import DiskResult, ProgressCallback
from incbak.engine.session import CommandFailed, Session

_POLL = 0.5
_SETTLE = 0.05
JOB_POLICY = {
    "auto-finalize": False,
    "auto-dismiss": False,
    "on-source-error": "stop",
    "on-target-error": "stop",
}


class CopyJob:
    """One job, begun with `JOB_POLICY` after this was made: it listens from then on."""

    def __init__(self, session: Session, ident: str, disk: str) -> None:
        self._session, self._ident, self._disk = session, ident, disk
        self._error: str | None = None
        self._events = session.listen("JOB_STATUS_CHANGE", "BLOCK_JOB_ERROR")

    async def wait(self, progress: ProgressCallback) -> DiskResult:
        """Until it is over; it is dismissed then."""
        try:
            while True:
                if result := await self._look(progress):
                    return result
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL):
                        self._hear([await self._events.get()])
        finally:
            self._session.forget(self._events)

    def _hear(self, events: Iterable[Mapping[str, Any]]) -> None:
        """The event of an error says which side failed."""
        for event in events:
            if event["event"] == "BLOCK_JOB_ERROR" and event["data"].get("device") == self._ident:
                self._error = self._error or _said(event["data"])

    async def _look(self, progress: ProgressCallback) -> DiskResult | None:
        job = next((j for j in await self._session.execute("query-jobs") if j["id"] == self._ident), None)
        if job is None:
            return DiskResult(error=self._error or "another program has removed the job of the backup")
        done, whole = job["current-progress"], job["total-progress"]
        progress(self._disk, done, whole)
        status = job["status"]
        self._hear(self._events.clear())
        try:
            if status == "concluded":
                await self._session.execute("job-dismiss", {"id": self._ident})
                error = self._error or job.get("error") or ("the job was cancelled" if done != whole else None)
                return DiskResult(done, error)
            if status == "pending":
                await self._session.execute("job-finalize", {"id": self._ident})
            elif self._error or await self._paused_by_error():
                self._error = self._error or "an I/O error"
                await self._session.execute("job-cancel", {"id": self._ident})
        except CommandFailed:
            await asyncio.sleep(_SETTLE)  # its state has changed meanwhile
        return None

    async def _paused_by_error(self) -> bool:
        jobs = await self._session.execute("query-block-jobs")
        return any(job["device"] == self._ident and job["io-status"] != "ok" for job in jobs)


def _said(data: Mapping[str, Any]) -> str:
    if data.get("operation") == "read":
        return "the point in time cannot be read"
    return "the target failed or is gone"

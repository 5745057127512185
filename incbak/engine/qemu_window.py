"""The time in which the VM is stopped for the point in time, and what may be resumed afterwards.

``cont`` is given only to a stop of our own: after ``stop`` the state is ``paused``. Any other state at the end is not
ours to change: in ``postmigrate`` a ``cont`` would start a second copy of a VM that has moved away. That a migration is
completed between the look and the ``cont`` is what `incbak.engine.qemu_migration` excludes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from incbak.durable import crash_point, declare
from incbak.engine.qemu_guard import Guard
from incbak.engine.run_state import RunState
from incbak.engine.session import Session
from incbak.errors import EngineError

declare("qemu.stopped")

WINDOW_COMMAND = 3.0


@asynccontextmanager
async def stopped(session: Session, guard: Guard) -> AsyncIterator[None]:
    """Stop the VM inside, and resume it afterwards if it ran before. Raises `EngineError` if it ran meanwhile."""
    if (await session.execute("query-status"))["running"]:
        guard.stopping()
        try:
            await session.execute("stop", timeout=WINDOW_COMMAND)
            crash_point("qemu.stopped")
            yield
        finally:
            await _resume(session)
            in_time = await guard.running()
        if not in_time:
            raise EngineError("the VM had to be resumed before all disks were set up")
        return
    yield
    if (await session.execute("query-status"))["running"]:
        raise EngineError("the VM was resumed by another program while its disks were set up")


async def _resume(session: Session) -> None:
    """Give ``cont`` to a stop of ours."""
    status = str((await session.execute("query-status", timeout=WINDOW_COMMAND))["status"])
    if status == RunState.PAUSED:
        await session.execute("cont", timeout=WINDOW_COMMAND)

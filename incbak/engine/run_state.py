"""QEMU's run states: one decision each, and a migration that is under way decides before them.

A VM that is not running can be backed up as long as the disks are still those of this QEMU: they stay as they were when
it stopped. It cannot be while QEMU hands its disks over or takes them from another host, or writes or
reads its whole state. What is not in the table is refused: a newer QEMU may have states of which nothing is known here.

===================  ==========  ==================================================================================
state                decision    why
===================  ==========  ==================================================================================
``running``          back up
``paused``           back up     by its owner; it stays so
``prelaunch``        back up     ``-S``, before the first instruction
``suspended``        back up     the guest sleeps (S3)
``io-error``         back up     the guest waits for its owner; what was written is there
``internal-error``   back up     the guest cannot go on; its disks are as it left them
``guest-panicked``   back up     as after a crash
``watchdog``         back up     as after a crash
``shutdown``         back up     with ``-no-shutdown``
``debug``            back up     a debugger stopped it
``inmigrate``        refuse      the disks are still the other QEMU's
``finish-migrate``   refuse      the disks are on their way
``postmigrate``      refuse      the VM has left, the content is stale; or its state is in a file
``save-vm``          refuse      a snapshot of the whole VM is being written, also by ``snapshot-save``
``restore-vm``       refuse      the disks are being reverted
``colo``             refuse      another host has the disks too
``preconfig``        refuse      there are no disks yet
anything else        refuse      unknown
===================  ==========  ==================================================================================

It is looked at before the run, around the point in time, while the jobs copy, and before the commit. A migration that
begins meanwhile wins: the jobs end, the filters go at once, and the run fails with `RunStateError`.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum

from incbak.engine.session import COMMAND_SECONDS, CommandFailed, EngineGone, EngineSilent, Session
from incbak.errors import RunStateError

_LOOK_SECONDS = 0.25


class RunState(StrEnum):
    """As ``query-status`` calls them."""

    RUNNING = "running"
    PAUSED = "paused"
    PRELAUNCH = "prelaunch"
    SUSPENDED = "suspended"
    IO_ERROR = "io-error"
    INTERNAL_ERROR = "internal-error"
    GUEST_PANICKED = "guest-panicked"
    WATCHDOG = "watchdog"
    SHUTDOWN = "shutdown"
    DEBUG = "debug"
    INMIGRATE = "inmigrate"
    FINISH_MIGRATE = "finish-migrate"
    POSTMIGRATE = "postmigrate"
    SAVE_VM = "save-vm"
    RESTORE_VM = "restore-vm"
    COLO = "colo"
    PRECONFIG = "preconfig"


_WAIT = "Run again when that is over."
_ELSEWHERE = "Back it up on the host where it runs; end this QEMU if nothing needs it any more."
_REFUSED = {
    RunState.INMIGRATE: ("it waits for a migration, its disks are still another QEMU's", "Back it up after that."),
    RunState.FINISH_MIGRATE: ("it is being migrated, its disks are on their way", "Back it up where it runs then."),
    RunState.POSTMIGRATE: ("it has moved away, the disks may have changed since", _ELSEWHERE),
    RunState.SAVE_VM: ("a snapshot of the whole VM is being written", _WAIT),
    RunState.RESTORE_VM: ("it is being reverted to a snapshot", _WAIT),
    RunState.COLO: ("another host has its disks too (COLO)", _ELSEWHERE),
    RunState.PRECONFIG: ("it is not configured yet", _WAIT),
}
_NO_MIGRATION = {"", "none", "completed", "failed", "cancelled"}  # what is unknown is a migration


@dataclass(frozen=True)
class Found:
    """The state of a VM that may be backed up."""

    status: RunState

    @property
    def running(self) -> bool:
        """Whether the guest's processors run."""
        return self.status is RunState.RUNNING

    @property
    def notes(self) -> tuple[str, ...]:
        """For the record."""
        return () if self.running else (f"the VM is not running ({self.status}), and stays so",)


def judge(status: str, migration: str) -> Found:
    """Return the state, if a backup may be made in it. Raises `RunStateError`.

    ``migration``: the status of ``query-migrate``, empty where there never was one.
    """
    state = RunState(status) if status in set(RunState) else None
    if why := _REFUSED.get(state) if state else None:
        raise RunStateError(f"the VM cannot be backed up in state {status}: {why[0]}", hint=why[1])
    if migration not in _NO_MIGRATION:
        text = f"the VM cannot be backed up while it is being migrated ({migration})"
        raise RunStateError(text, hint="Back it up where it runs when the migration is over.")
    if state is None:
        hint = "This incbak does not know the state; a newer one may."
        raise RunStateError(f"the VM cannot be backed up in state {status[:40]!r}", hint=hint)
    return Found(state)


async def check_run_state(session: Session, *, timeout: float = COMMAND_SECONDS) -> Found:
    """Ask QEMU. Raises `RunStateError`, or what `Session.execute` raises."""
    migration = await _migration(session, timeout)
    status = await session.execute("query-status", timeout=timeout)
    return judge(str(status["status"]), migration)


async def _migration(session: Session, timeout: float) -> str:
    try:
        return str((await session.execute("query-migrate", timeout=timeout)).get("status", ""))
    except CommandFailed:
        return ""  # built without migration


async def until_refused(session: Session) -> None:
    """Look again and again; raise `RunStateError` when no backup may be made any more. Return when QEMU is gone."""
    events = session.listen("MIGRATION", "STOP")  # QEMU tells of the first only where it was asked to
    try:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_SECONDS):
                    await events.get()
            try:
                await check_run_state(session)
            except EngineSilent:
                continue
            except EngineGone:
                return
    finally:
        session.forget(events)

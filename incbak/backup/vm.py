"""Which VM a command is about, and its lock in the repository."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from incbak.bitmap.format import NAME_LIMIT
from incbak.bitmap.names import unfit
from incbak.engine.base import Engine
from incbak.errors import LockedError, UsageError
from incbak.repo.repository import Repository


async def vm_name(engine: Engine, name: str | None) -> str:
    """What the VM is called: ``name``, or as the engine says. Raises `UsageError`."""
    vm = name or (await engine.describe()).vm
    if not vm:
        raise UsageError("the monitor does not say what the VM is called", hint="Name it with --name.")
    if len(vm.encode()) > NAME_LIMIT:
        raise UsageError(f"the VM's name is longer than {NAME_LIMIT} bytes", hint="Give a shorter one with --name.")
    return vm


def refuse_unfit(repo: Repository, name: str | None) -> None:
    """Raise `UsageError` for a name that no VM should get. One that has backups already goes on working."""
    if name and (why := unfit(name)) and not repo.backups(name):
        raise UsageError(f"not a name for a VM: {name[:200]!r}: {why}", hint="Use letters, digits, and . _ - .")


@asynccontextmanager
async def locked(repo: Repository, vm: str, wait: float) -> AsyncIterator[Any]:
    """The VM's lock, without holding up the event loop while it waits."""
    deadline = time.monotonic() + wait
    while True:
        lock = repo.vm_lock(vm)
        try:
            still_locked = lock.__enter__()
            break
        except LockedError:
            if time.monotonic() >= deadline:
                raise
        await asyncio.sleep(0.1)
    try:
        yield still_locked
    finally:
        lock.__exit__(None, None, None)

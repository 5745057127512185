"""Work that a cancellation must not tear: a commit, and what follows it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

T = TypeVar("T")


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Do ``work`` whole even if this task is cancelled meanwhile; the cancellation is forgotten only when it worked."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise
            cancelled = True
        except Exception:  # noqa: BLE001 - raised again below, from the task itself
            break
    if cancelled and (current := asyncio.current_task()):
        with suppress(AttributeError):
            current.uncancel()
    return task.result()

"""BLOCK_IO_ERROR: a guest's request that the disk failed, told to whoever listens on a monitor."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable

log = logging.getLogger(__name__)

EVERY = 1.0
"""Seconds in which one disk's errors of one kind are told once: a guest may try again without end."""


class IoErrors:
    """The errors of one disk. The guest gets each of them; what is told here is that there are some."""

    def __init__(self, disk: str, emit: Callable[[str, dict[str, object]], None]) -> None:
        self._disk, self._emit = disk, emit
        self._lock = threading.Lock()
        self._told: dict[str, float] = {}

    def tell(self, operation: str, error: OSError) -> None:
        """From any thread; ``operation`` is ``read`` or ``write``, as a flush and a discard are too."""
        now = time.monotonic()
        with self._lock:
            if operation in self._told and now < self._told[operation] + EVERY:
                return
            self._told[operation] = now
        log.error("disk %s: a guest's %s failed: %s", self._disk, operation, error)
        reason = os.strerror(error.errno) if error.errno else str(error)
        facts: dict[str, object] = {"device": self._disk, "node-name": self._disk, "operation": operation}
        facts |= {"action": "report", "nospace": error.errno == errno.ENOSPC, "reason": reason}
        self._emit("BLOCK_IO_ERROR", facts)

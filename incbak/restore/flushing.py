"""What is written goes to the storage while more is written, so that little is left for the sync in the end."""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor

from incbak import durable

STEP = 128 << 20
"""Bytes after which a sync is begun."""


class Flushing:
    """Syncs of one file in a thread of its own, one at a time. Safe for many threads.

    The first failure is final, as in `durable.sync_file`: the kernel tells of it once, and a later sync proves nothing.
    """

    def __init__(self, fd: int, what: str) -> None:
        self._fd, self._what = fd, what
        self._lock = threading.Lock()
        self._count = 0
        self._last: Future[None] | None = None
        self._thread = ThreadPoolExecutor(1, "flushing")

    def wrote(self, count: int) -> None:
        """So many bytes more. Raises `DurabilityError` when an earlier sync has failed."""
        with self._lock:
            self._count += count
            if self._count < STEP:
                return
            if self._last is None or self._last.done():
                self._raise()
                self._count = 0
                self._last = self._thread.submit(durable.sync_file, self._fd, self._what)

    def _raise(self) -> None:
        if self._last is not None:
            self._last.result()

    def finish(self) -> None:
        """Wait for the sync that is under way, if any. Raises `DurabilityError` when it failed, or one before it."""
        with self._lock:
            self._raise()

    def close(self) -> None:
        """No more syncs; the file may be closed now. Idempotent; raises nothing."""
        self._thread.shutdown(wait=True, cancel_futures=True)

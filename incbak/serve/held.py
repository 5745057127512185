"""Old content that a guest has overwritten and a job has yet to copy: in memory first, then in the scratch file.

A guest's write waits for neither as long as memory has room, which a thread of our own sees to. Where scratch fails
(full, or an error) the content stays in memory and nothing is lost; only when there is no room left is somebody told.
"""

from __future__ import annotations

import threading
from itertools import islice

from incbak.serve.scratch import Scratch

MEMORY = 16 << 20
"""Bytes of old content in memory, per job."""
_BATCH = 32
"""Clusters moved to scratch between two looks at the lock."""


class Held:
    """Clusters by number. The methods marked *locked* are called with ``changed`` held, the others without."""

    def __init__(self, scratch: Scratch, shift: int, changed: threading.Condition, memory: int = MEMORY) -> None:
        self._scratch, self._shift, self._changed, self._limit = scratch, shift, changed, memory
        self._memory: dict[int, memoryview] = {}
        self._on_scratch: dict[int, int] = {}
        self._reserved = 0
        self._closed = False
        self.error: OSError | None = None
        """Why scratch takes nothing at the moment."""

    def start(self) -> None:
        """Begin to move content from memory to scratch."""
        threading.Thread(target=self._main, name="scratch", daemon=True).start()

    # -- putting in -----------------------------------------------------------------------------------------------

    def has_room(self, count: int) -> bool:
        """Whether `reserve` would succeed now; needs no lock."""
        return not self._reserved or self._reserved + count <= self._limit

    def reserve(self, count: int) -> bool:
        """*Locked.* Room for ``count`` bytes, if there is any."""
        if not self.has_room(count):
            return False
        self._reserved += count
        return True

    def unreserve(self, count: int) -> None:
        """*Locked.* Give back what was reserved and is not put in."""
        self._reserved -= count

    def put(self, cluster: int, content: memoryview) -> None:
        """*Locked.* Keep what was reserved. Zeroes need not be put in: what is not here reads as zeroes."""
        if not self._memory:
            self._changed.notify_all()
        self._memory[cluster] = content

    # -- taking out -----------------------------------------------------------------------------------------------

    def read_into(self, first: int, count: int, buffer: memoryview) -> None:
        """The content of ``count`` clusters. Raises `OSError`."""
        with self._changed:
            there = {c: self._memory[c] for c in range(first, first + count) if c in self._memory}
        if len(there) < count:
            self._scratch.read_into(buffer, first << self._shift)
        for cluster, content in there.items():
            at = (cluster - first) << self._shift
            buffer[at : at + len(content)] = content

    def drop(self, first: int, count: int) -> int:
        """*Locked.* Let clusters go; returns the bytes that scratch may `Scratch.discard`."""
        for cluster in range(first, first + count) if self._memory else ():
            if (content := self._memory.pop(cluster, None)) is not None:
                self._reserved -= len(content)
        return sum(self._on_scratch.pop(c, 0) for c in range(first, first + count)) if self._on_scratch else 0

    def close(self) -> None:
        """*Locked.* Everything goes; the scratch file with the thread, once that is through with its write."""
        self._closed = True
        self._memory.clear()
        self._changed.notify_all()

    # -- moving to scratch ----------------------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            while (batch := self._next()) is not None:
                self._move(batch)
        finally:
            self._scratch.close()

    def _next(self) -> list[tuple[int, memoryview]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or (self._memory and self.error is None))
            return None if self._closed else sorted(islice(self._memory.items(), _BATCH))

    def _move(self, batch: list[tuple[int, memoryview]]) -> None:
        """Write a batch, and only then forget it: what the job took meanwhile is discarded again."""
        error: OSError | None = None
        moved: list[tuple[int, int]] = []
        try:
            for cluster, content in batch:
                self._scratch.write(content, cluster << self._shift)
                moved.append((cluster, len(content)))
        except OSError as e:
            error = e
        stale: list[tuple[int, int]] = []
        with self._changed:
            self.error = error
            for cluster, length in moved:
                if self._memory.pop(cluster, None) is None:
                    stale.append((cluster, length))
                else:
                    self._on_scratch[cluster] = length
                    self._reserved -= length
            self._changed.notify_all()
        for cluster, length in stale:
            self._scratch.discard(cluster << self._shift, length, length)

"""From clusters to blobs: threads hash, look up, compress and store, with a bound on the bytes in flight."""

from __future__ import annotations

import os
import queue
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from incbak.errors import BackupError, IncbakError, text_of
from incbak.repo.writer import Writer

IN_FLIGHT = 48 << 20
"""Bytes of clusters that may wait or be worked on."""

Digests = NDArray[np.uint8]
Done = Callable[[int, Digests, int], None]
"""Takes the first cluster, the digests of the clusters from there on (zero for zeroes), and the bytes newly stored."""
Unchanged = Callable[[int, Digests], "NDArray[np.bool_] | None"]
"""Which of the digests stand at the same place in the base; ``None`` where there is none."""


class Pipeline:
    """Workers of one backup run. The first failure stops it, and is raised by every later call."""

    def __init__(self, writer: Writer, cluster_size: int, *, threads: int | None = None) -> None:
        self.writer, self.cluster_size = writer, cluster_size
        self._queue: queue.SimpleQueue[tuple[int, memoryview, Unchanged, Done] | None] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._bytes = 0
        self._failure: BaseException | None = None
        count = threads or os.cpu_count() or 1
        self._threads = [threading.Thread(target=self._work, name="pipeline", daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, first: int, clusters: memoryview, unchanged: Unchanged, done: Done) -> None:
        """Take whole clusters (the last may be short) from cluster ``first`` on; the buffer is the pipeline's now.

        Waits while too much is in flight. Raises `BackupError` after a failure.
        """
        size = len(clusters)
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._bytes or self._bytes + size <= IN_FLIGHT)
            self._raise()
            self._bytes += size
        self._queue.put((first, clusters, unchanged, done))

    def drain(self) -> None:
        """Wait until all that was submitted is done. Raises `BackupError` after a failure."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or not self._bytes)
            self._raise()

    def close(self) -> None:
        """End the threads; what is not done is dropped. Idempotent; raises nothing."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    @property
    def failure(self) -> BaseException | None:
        """Why it stopped, if it did."""
        return self._failure

    def _raise(self) -> None:
        if isinstance(self._failure, IncbakError):
            raise self._failure
        if self._failure:
            raise BackupError(f"cannot store the backup: {text_of(self._failure)}") from self._failure

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            first, clusters, unchanged, done = item
            try:
                if not self._failure:
                    self._batch(first, clusters, unchanged, done)
            except BaseException as e:  # noqa: BLE001 - whatever it is, the run fails with it, in the caller's thread
                self._failure = self._failure or e
            finally:
                with self._changed:
                    self._bytes -= len(clusters)
                    self._changed.notify_all()
                del item, clusters

    def _batch(self, first: int, clusters: memoryview, unchanged: Unchanged, done: Done) -> None:
        step = self.cluster_size
        digests = self.writer.seal.digests(clusters, step)
        known = unchanged(first, digests)
        if known is None or not known.all():
            wanted = digests.any(axis=1)
            rows = np.flatnonzero(wanted if known is None else wanted & ~known)
            rows = rows[~self.writer.have(digests[rows])] if len(rows) else rows
            add = self.writer.add_content
            stored = sum(add(digests[i].tobytes(), clusters[i * step : (i + 1) * step]) for i in rows.tolist())
        else:
            stored = 0
        done(first, digests, stored)

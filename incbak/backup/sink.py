"""The sink of one disk: takes a job's writes in any order and alignment, and ends with the root of the disk's tree."""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from incbak.backup.partial import Partials
from incbak.backup.pipeline import Digests, Pipeline
from incbak.bitmap import bits as kernels
from incbak.errors import BackupError, IncbakError
from incbak.repo import blob
from incbak.repo.record import DiskRecord
from incbak.repo.repository import Repository
from incbak.repo.tree import TreeReader, TreeUpdate, clusters_in
from incbak.repo.writer import Writer

_ZERO_BATCH = 1 << 18


@dataclass
class Counts:
    """Bytes: received in writes, received as zeroes, newly stored. ``flushes``: how often the peer flushed."""

    written: int = 0
    zeroed: int = 0
    stored: int = 0
    flushes: int = 0

    @property
    def received(self) -> int:
        """All bytes that came, as content or as zeroes."""
        return self.written + self.zeroed


class DiskSink:
    """Where one disk's clusters go. Safe for many threads until `finish`.

    ``full``: every byte must come, and the tree starts from nothing; else it starts from ``base``. With a base, in
    both cases, clusters that are what they were there are neither looked up nor stored.
    """

    def __init__(
        self,
        repo: Repository,
        writer: Writer,
        pipeline: Pipeline,
        name: str,
        size: int,
        base: DiskRecord | None,
        full: bool,
    ) -> None:
        self.name, self.size, self.full = name, size, full
        self.cluster_size = repo.cluster_size
        self.clusters = clusters_in(size, self.cluster_size)
        self.counts = Counts()
        self._pipeline = pipeline
        self._update: TreeUpdate = repo.update(writer, None if full else base, size)
        usable = base is not None and base.size == size and writer.trusts_bases
        self._base: TreeReader | None = repo.tree(base) if base is not None and usable else None
        self._repo = repo
        self._base_record = None if full else base
        self._lock = threading.Lock()
        self._base_lock = threading.Lock()
        self._covered = np.zeros(kernels.bytes_for(self.clusters), dtype=np.uint8)
        self._partials = Partials(self.cluster_size, size)
        self._flying = 0
        self._idle = threading.Condition(self._lock)

    @property
    def changed(self) -> int:
        """Bytes of clusters whose content differs from the tree that this one started from."""
        return min(self._update.changed * self.cluster_size, self.size)

    # -- taking ---------------------------------------------------------------------------------------------------

    def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        """Content of the disk. The caller may reuse ``data`` at once, unless it gives it away (``owned``).

        Waits when too much is in flight. Raises `IncbakError` when the backup cannot go on.
        """
        length, step = len(data), self.cluster_size
        if length == 0:
            return
        self._check(offset, length)
        with self._lock:
            self.counts.written += length
        head = -offset % step
        end = offset + length
        whole_end = end if end == self.size else end - end % step
        if head >= length or offset + head >= whole_end:
            self._partial(offset, data)
            return
        if head:
            self._partial(offset, data[:head])
        if whole_end < end:
            self._partial(whole_end, data[whole_end - offset :])
        whole = data[head : whole_end - offset]
        self._whole((offset + head) // step, whole if owned else memoryview(bytes(whole)))

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes; costs no memory, whatever the length."""
        if length <= 0:
            return
        self._check(offset, length)
        with self._lock:
            self.counts.zeroed += length
        step, end = self.cluster_size, offset + length
        first = -(-offset // step)
        last = self.clusters if end == self.size else end // step
        if first >= last:
            self._partial(offset, memoryview(bytes(length)))
            return
        if offset < first * step:
            self._partial(offset, memoryview(bytes(first * step - offset)))
        if last * step < end:
            self._partial(last * step, memoryview(bytes(end - last * step)))
        self._zeroes(first, last)

    def flush(self) -> None:
        """The peer says that all is sent. Raises what went wrong so far."""
        self._pipeline.drain()
        self.counts.flushes += 1

    def _check(self, offset: int, length: int) -> None:
        if offset < 0 or offset + length > self.size:
            raise BackupError(f"disk {self.name}: the job wrote past the end of the disk")

    def _whole(self, first: int, data: memoryview) -> None:
        last = first + -(-len(data) // self.cluster_size) - 1
        self._cover(first, last)
        with self._lock:
            self._flying += 1
        try:
            self._pipeline.submit(first, data, self._unchanged, self._done)
        except BaseException:
            self._landed()
            raise

    def _cover(self, first: int, last: int) -> None:
        """These clusters come now; one that came before is waited for, so that the later one counts."""
        with self._lock:
            if kernels.any_in_range(self._covered, first, last):
                while not self._idle.wait_for(lambda: not self._flying, 0.1) and not self._pipeline.failure:
                    pass
            self._partials.forget(first, last)
            kernels.set_range(self._covered, first, last)

    def _zeroes(self, first: int, last: int) -> None:
        with self._lock:
            again = kernels.any_in_range(self._covered, first, last - 1)
        self._cover(first, last - 1)
        if self.full and not again:
            return
        for start in range(first, last, _ZERO_BATCH):
            numbers = np.arange(start, min(start + _ZERO_BATCH, last), dtype=np.int64)
            with self._lock:
                self._update.set(numbers, np.zeros((len(numbers), blob.DIGEST), dtype=np.uint8))

    def _partial(self, offset: int, data: memoryview) -> None:
        """Parts of clusters; what completes one sends it on its way."""
        for number, whole in self._partials.add(offset, data):
            self._whole(number, memoryview(whole))

    def _unchanged(self, first: int, digests: Digests) -> NDArray[np.bool_] | None:
        if self._base is None:
            return None
        with self._base_lock:
            before = self._base.digests(first, len(digests))
        return np.asarray((before == digests).all(axis=1))

    def _done(self, first: int, digests: Digests, stored: int) -> None:
        with self._lock:
            self._update.set(np.arange(first, first + len(digests), dtype=np.int64), digests)
            self.counts.stored += stored
        self._landed()

    def _landed(self) -> None:
        with self._lock:
            self._flying -= 1
            if not self._flying:
                self._idle.notify_all()

    # -- the end --------------------------------------------------------------------------------------------------

    def finish(self) -> bytes:
        """The root of the tree, its pages stored.

        Raises `BackupError` when the peer never flushed or, for a full, when a byte never came. A cluster of which an
        incremental sent only a part is completed from the base.
        """
        if not self.counts.flushes:
            raise BackupError(f"disk {self.name}: the job ended without a flush")
        for number, parts in self._partials.rest():
            if kernels.any_in_range(self._covered, number, number):
                raise BackupError(f"disk {self.name}: a part of cluster {number} came again after all of it")
            if self.full or self._base_record is None:
                raise BackupError(f"disk {self.name}: a part of cluster {number} never came")
            self._whole(number, memoryview(self._completed(number, parts)))
        self._pipeline.drain()
        if self.full and (came := kernels.count(self._covered)) != self.clusters:
            raise BackupError(f"disk {self.name}: {self.clusters - came} of {self.clusters} clusters never came")
        return self._update.finish()

    def _completed(self, number: int, parts: list[tuple[int, bytes]]) -> bytes:
        """A cluster of the base with ``parts`` laid over it."""
        assert self._base_record
        size = min(self.cluster_size, self.size - number * self.cluster_size)
        digest = self._repo.tree(self._base_record).digests(number, 1)[0].tobytes()
        data = bytearray(size if digest == blob.ZERO_DIGEST else self._repo.reader().read(digest))
        for at, part in parts:
            data[at : at + len(part)] = part
        return bytes(data)


class SinkExport:
    """The sink as an NBD export: writes, zeroes and flushes; nothing can be read."""

    read_only = False
    multi_conn = False
    description = "a backup in the making"

    def __init__(self, sink: DiskSink) -> None:
        self.sink, self.name, self.size = sink, sink.name, sink.size

    def contexts(self) -> list[str]:
        """None."""
        return []

    def open(self) -> SinkDevice:
        """One connection."""
        return SinkDevice(self.sink)


class SinkDevice:
    """See `incbak.nbd.export.Device`. A failure of the backup reaches the job as an I/O error."""

    read_only = False

    def __init__(self, sink: DiskSink) -> None:
        self.sink, self.size = sink, sink.size

    def may_block(self, offset: int, length: int) -> bool:
        """Never to a worker: waiting in the connection's thread is the backpressure."""
        return False

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        """Refused."""
        raise OSError(errno.EPERM, "a sink cannot be read")

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Refused."""
        raise OSError(errno.EPERM, "a sink cannot be read")

    def write(self, buf: memoryview, offset: int) -> None:
        """Into the sink."""
        try:
            self.sink.write(offset, buf)
        except IncbakError as e:
            raise OSError(errno.EIO, str(e)) from e

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Into the sink."""
        try:
            self.sink.write_zeroes(offset, length)
        except IncbakError as e:
            raise OSError(errno.EIO, str(e)) from e

    def trim(self, offset: int, length: int) -> None:
        """Nothing: a discarded range is no content."""

    def cache(self, offset: int, length: int) -> None:
        """Nothing."""

    def flush(self) -> None:
        """Into the sink."""
        try:
            self.sink.flush()
        except IncbakError as e:
            raise OSError(errno.EIO, str(e)) from e

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        """There are no contexts."""
        return [(length, 0)]

    def close(self) -> None:
        """Nothing."""

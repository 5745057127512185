"""A disk as it was at one instant, to be read for as long as somebody keeps it: what QEMU calls image fleecing.

It is the copy-before-write of a backup without the job: old content stays in scratch, nothing is ever let go, and a
client of an export reads each cluster from wherever it is. It costs scratch as the guest overwrites the disk, within
the limit of all jobs together; where that is reached, or a read of old content fails, the point in time is lost: its
scratch is given back, its readers get errors, and the guest goes on.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from contextlib import suppress

from incbak.serve.cbw import CHUNK, CopyBeforeWrite
from incbak.serve.exports import AddedExport, ExportSpec
from incbak.serve.gate import DrainTimeoutError
from incbak.serve.regrain import all_bits
from incbak.serve.scratch import Budget, Scratch
from incbak.serve.tracker import TrackedDisk

GRANULARITY = 65536
_END_DRAIN = 30.0


class PointInTime:
    """`prepare` beside the guest, `begin` and perhaps `retreat` with the disk drained, `close` in the end."""

    def __init__(self, name: str, tracked: TrackedDisk, budget: Budget) -> None:
        """Raises `DiskError` when there can be no scratch file."""
        self.name, self.tracked, self.size = name, tracked, tracked.size
        self._lock = threading.Lock()
        self._readers, self._over = 0, False
        self._copy = CopyBeforeWrite(tracked.disk, GRANULARITY, Scratch(budget, self.size), on_break=self.discard)
        self._copy.prepare()

    def begin(self) -> None:
        """This is the instant. The disk is drained; it is refreshed afterwards by the caller."""
        self._copy.begin(all_bits(self.size, GRANULARITY))
        self.tracked.attach(self._copy)

    def retreat(self) -> None:
        """Undo `begin`; the disk is drained."""
        self.tracked.detach(self._copy)

    def discard(self) -> None:
        """Nothing can be read any more, and scratch is given back, once who reads now has been told."""
        with self._lock:
            self._over = True
            unread = not self._readers
        if unread:
            self._copy.close()

    def close(self) -> None:
        """Be gone, once nobody reads it. A guest's write that does not end leaves no more than a name behind."""
        self.discard()
        with suppress(DrainTimeoutError), self.tracked.gate.drained(_END_DRAIN):
            self.retreat()
            old = self.tracked.refresh()
            del old

    @property
    def lost(self) -> str:
        """Why it cannot be read, or nothing."""
        return str(self._copy.broken.strerror) if self._copy.broken else ""

    def read_into(self, buf: memoryview, offset: int) -> None:
        """The content as it was. Raises `OSError`: it is lost, or cannot be read now."""
        with self._lock:
            if self._over:
                raise OSError(errno.EIO, f"point in time {self.name} is lost")
            self._readers += 1
        try:
            self._read(buf, offset)
        finally:
            with self._lock:
                self._readers -= 1
                last = self._over and not self._readers
            if last:
                self._copy.close()

    def _read(self, buf: memoryview, offset: int) -> None:
        end = offset + len(buf)
        while offset < end:
            cluster = offset // GRANULARITY
            run = self._copy.claim_at(cluster, min(CHUNK, end - cluster * GRANULARITY))
            start = run.first * GRANULARITY
            content = memoryview(bytearray(min(run.end * GRANULARITY, self.size) - start))
            try:
                self._copy.read_into(run, content)
            finally:
                self._copy.put_back(run)
            piece = content[offset - start :][: end - offset]
            buf[: len(piece)] = piece
            buf, offset = buf[len(piece) :], offset + len(piece)


class PointExport(AddedExport):
    """A point in time under a name of its own; read-only."""

    def __init__(self, point: PointInTime, spec: ExportSpec, gone: Callable[[AddedExport], None]) -> None:
        super().__init__(point.tracked, spec, gone)
        self.point = point
        self.description = spec.description or f"disk {point.tracked.name} at one instant"

    @property
    def size(self) -> int:
        """That of the disk at the instant."""
        return self.point.size

    @property
    def node(self) -> str:
        """Of the point in time, not of the disk."""
        return self.point.name

    def device(self) -> _PointDevice:
        """One connection's way in."""
        return _PointDevice(self)


class _PointDevice:
    """See `incbak.nbd.export.Device`. Nothing is told of holes: they may be filled meanwhile."""

    read_only = True

    def __init__(self, export: PointExport) -> None:
        self._export = export
        self.size = export.size
        self.read_into = export.point.read_into

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        """A cluster may be claimed."""
        return False

    def may_block(self, offset: int, length: int) -> bool:
        """There are no writes."""
        return True

    def write(self, buf: memoryview, offset: int) -> None:
        """Refused before."""
        raise PermissionError

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Refused before."""
        raise PermissionError

    def trim(self, offset: int, length: int) -> None:
        """Refused before."""
        raise PermissionError

    def cache(self, offset: int, length: int) -> None:
        """A hint."""

    def flush(self) -> None:
        """Nothing is written."""

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        """All data."""
        return [(length, 0)]

    def close(self) -> None:
        """The connection is gone."""
        self._export.left()

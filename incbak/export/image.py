"""A disk of a backup that can be read at random: decoded clusters are kept, and reading ahead follows a reader."""

from __future__ import annotations

import errno
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.extents import StatusExtent
from incbak.repo import blob
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository

log = logging.getLogger(__name__)

CACHE = 64 << 20
"""Bytes of decoded clusters that are kept for each disk."""
AHEAD = 1 << 20
"""Bytes read beyond a request that goes on where an earlier one ended."""
_ENDS = 16
_FIRST_WINDOW, _LARGEST_WINDOW = 64, 1 << 14
"""Clusters whose digests are looked at in one step."""


class BackupImage:
    """One disk of one backup. Safe for many threads. What is damaged raises `OSError` (EIO), and is logged."""

    read_only = True

    def __init__(self, repo: Repository, record: Record, disk: DiskRecord) -> None:
        self.name, self.size, self._cluster = disk.name, disk.size, record.cluster_size
        self._what = f"disk {disk.name} of backup {record.id[:8]}"
        self._reader = repo.reader()
        self._tree = repo.tree(disk, record.cluster_size)
        self._tree_lock, self._cache_lock = threading.Lock(), threading.Lock()
        self._cache: OrderedDict[bytes, bytes | memoryview] = OrderedDict()
        self._ends: OrderedDict[int, None] = OrderedDict()

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``. Raises `OSError` for damage."""
        end = offset + len(buf)
        first, last = offset // self._cluster, (end - 1) // self._cluster
        digests = self._digests(first, last + 1 - first)
        missing = [d for d in dict.fromkeys(digests) if d != blob.ZERO_DIGEST and not self._kept(d)]
        goes_on = self._goes_on(offset, end)
        fetched = self._fetch(missing, self._behind(last) if goes_on else []) if missing else {}
        for number, digest in enumerate(digests, first):
            start = number * self._cluster
            at, stop = max(start, offset), min(start + self._cluster, end)
            part = buf[at - offset : stop - offset]
            if digest == blob.ZERO_DIGEST:
                part[:] = bytes(len(part))
            else:
                content = fetched.get(digest) or self._kept(digest) or self._fetch([digest], [])[digest]
                part[:] = content[at - start : stop - start]

    def extents(self, offset: int, length: int) -> Iterator[StatusExtent]:
        """The range in stretches of zeroes and of data, by the tree alone; neighbours differ.

        It is looked at in windows that grow, since many clients want to know of the first stretch only.
        """
        end = offset + length
        start, was = offset, None
        for zero, upto in self._runs(offset, end):
            if was is not None and zero != was:
                yield StatusExtent(start, offset - start, zero=was, hole=was)
                start = offset
            was, offset = zero, upto
        if was is not None:
            yield StatusExtent(start, end - start, zero=was, hole=was)

    def _runs(self, offset: int, end: int) -> Iterator[tuple[bool, int]]:
        """(zero, where it ends) of each run in each window."""
        window = _FIRST_WINDOW
        while offset < end:
            first = offset // self._cluster
            count = min(-(-end // self._cluster) - first, window)
            window = min(2 * window, _LARGEST_WINDOW)
            zero = self._zeroes(first, count)
            edges = [0, *(np.flatnonzero(np.diff(zero)) + 1).tolist(), count]
            for start, stop in pairwise(edges):
                offset = min((first + stop) * self._cluster, end)
                yield bool(zero[start]), offset

    def _digests(self, first: int, count: int) -> list[bytes]:
        try:
            with self._tree_lock:
                return [row.tobytes() for row in self._tree.digests(first, count)]
        except DamagedError as e:
            raise self._damaged(e) from e

    def _zeroes(self, first: int, count: int) -> NDArray[np.bool_]:
        """Which of these clusters are zero."""
        try:
            with self._tree_lock:
                return ~np.asarray(self._tree.digests(first, count).any(axis=1))
        except DamagedError as e:
            raise self._damaged(e) from e

    def _goes_on(self, offset: int, end: int) -> bool:
        """Whether a request begins where an earlier one ended."""
        with self._cache_lock:
            found = self._ends.pop(offset, 0) is None
            self._ends[end] = None
            if len(self._ends) > _ENDS:
                self._ends.popitem(last=False)
            return found

    def _behind(self, last: int) -> list[bytes]:
        """What to read ahead: the clusters behind ``last``."""
        count = min(AHEAD // self._cluster, -(-self.size // self._cluster) - last - 1)
        digests = self._digests(last + 1, count) if count > 0 else []
        return [d for d in dict.fromkeys(digests) if d != blob.ZERO_DIGEST and not self._kept(d)]

    def _kept(self, digest: bytes) -> bytes | memoryview | None:
        with self._cache_lock:
            if (found := self._cache.get(digest)) is not None:
                self._cache.move_to_end(digest)
            return found

    def _fetch(self, wanted: list[bytes], ahead: list[bytes]) -> dict[bytes, bytes | memoryview]:
        """Read, verify and keep; damage among what is only read ahead is left for whoever asks for it."""
        both = list(dict.fromkeys([*wanted, *ahead]))
        rows = np.frombuffer(b"".join(both), dtype=np.uint8).reshape(-1, blob.DIGEST)
        found: dict[bytes, bytes | memoryview] = {}
        for row, content in self._reader.read_many(rows):
            if not isinstance(content, DamagedError):
                found[both[row]] = content
            elif both[row] in wanted:
                raise self._damaged(content) from content
        with self._cache_lock:
            self._cache.update(found)
            while len(self._cache) * self._cluster > CACHE:
                self._cache.popitem(last=False)
        return found

    def _damaged(self, error: DamagedError) -> OSError:
        log.error("%s: %s", self._what, error)
        return OSError(errno.EIO, f"{self._what}: {error}")

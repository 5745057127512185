"""A disk in the order of its bytes, for a pipe: each piece is verified before it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from incbak.errors import DamagedError
from incbak.events import Progress, Reporter, silent
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT, page_of
from incbak.restore.restore import Restored

_BATCH = 64
"""Clusters that are read at once."""
_ZEROES = bytes(1 << 20)

Out = Callable[[bytes | memoryview], None]


def stream_disk(repo: Repository, record: Record, disk: DiskRecord, out: Out, *, report: Reporter = silent) -> Restored:
    """Pass every byte of ``disk`` to ``out``, from the first to the last, zeroes too.

    Raises `DamagedError` at the first cluster that does not verify, when all before it are out; what ``out`` raises.
    """
    done, at = Restored(disk.name, disk.size), 0
    for offset, content in _clusters(repo, record, disk):
        _zeroes(offset - at, out)
        out(content)
        at = offset + len(content)
        done.written += len(content)
        report(Progress(disk.name, at, disk.size))
    _zeroes(disk.size - at, out)
    report(Progress(disk.name, disk.size, disk.size))
    return done


def _clusters(repo: Repository, record: Record, disk: DiskRecord) -> Iterator[tuple[int, bytes | memoryview]]:
    """The clusters that are not zero, with their offsets, in their order."""
    tree, reader, step = repo.tree(disk, record.cluster_size), repo.reader(), record.cluster_size
    for number, digest in tree.leaves():
        page = page_of(digest, reader.read(digest))
        rows = np.flatnonzero(page.any(axis=1))
        if rows.size and number * FANOUT + int(rows[-1]) >= tree.clusters:
            raise DamagedError(f"disk {disk.name}: its tree reaches beyond the end of the disk")
        for start in range(0, rows.size, _BATCH):
            batch = rows[start : start + _BATCH]
            found = dict(reader.read_many(np.ascontiguousarray(page[batch])))
            for row, cluster in enumerate((batch + number * FANOUT).tolist()):
                yield cluster * step, _checked(found[row], disk, cluster, min(step, disk.size - cluster * step))


def _checked(
    content: bytes | memoryview | DamagedError, disk: DiskRecord, cluster: int, length: int
) -> bytes | memoryview:
    if isinstance(content, DamagedError):
        raise DamagedError(f"disk {disk.name}: cluster {cluster}: {content}", hint="What was written is not all of it.")
    if len(content) != length:
        raise DamagedError(f"disk {disk.name}: cluster {cluster} has {len(content)} bytes")
    return content


def _zeroes(count: int, out: Out) -> None:
    for start in range(0, count, len(_ZEROES)):
        out(_ZEROES[: min(len(_ZEROES), count - start)])

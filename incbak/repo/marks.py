"""What the listed backups need of what is stored.

Marking walks the trees of backups, a shared subtree once, and of a page only what differs from the page at its place in
a backup that is marked. It keeps one byte per blob of the index: no object per cluster, 17 MB for a disk of 1 TiB.
Digests are looked up sorted and many at a time, so that a large index is read from one end to the other.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.repo import blob
from incbak.repo.index import Digests, Index, prefixes
from incbak.repo.pack import ENTRY
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import TreeReader

_BATCH = 1 << 18
"""Digests that are looked up at once: 8 MiB."""
_ROWS = 1 << 20


def _place(record: Record, disk: DiskRecord) -> tuple[str, str, int, int]:
    """Trees of one place have the same shape."""
    return record.vm, disk.name, disk.size, record.cluster_size


class Marks:
    """Marks on the index as it is now; packs that are condemned hold nothing. One thread."""

    def __init__(self, repo: Repository) -> None:
        self._repo = repo
        self._index = Index(repo.storage)
        self._needed = [np.zeros(len(f), dtype=bool) for f in self._index.files]
        self._seen: set[bytes] = set()
        self._roots: dict[tuple[str, str, int, int], bytes] = {}
        """Of the backup that was marked last: by VM, disk, size and cluster size."""
        self._waiting: list[NDArray[np.uint8]] = []
        self._count = 0
        self.marked: set[str] = set()
        """The ids of the backups whose whole content is marked, and was found."""

    def mark(self, record: Record) -> None:
        """Mark all pages and clusters of a backup.

        Raises `DamagedError` naming the backup when a page cannot be read, or something is in no pack that stays.
        """
        if record.id in self.marked:
            return
        try:
            for disk in record.disks:
                tree = self._repo.tree(disk, record.cluster_size)
                self._below(tree, tree.root, self._roots.get(_place(record, disk), blob.ZERO_DIGEST), tree.depth - 1)
            self._look_up()
        except DamagedError as e:
            self._seen.clear()  # what lies below the pages seen in vain has not been marked
            self._waiting, self._count = [], 0
            hint = "Run: incbak check --read-data"
            raise DamagedError(f"backup {record.id[:8]} of {record.vm} is not whole: {e}", hint=hint) from e
        self.marked.add(record.id)
        self._roots.update({_place(record, disk): bytes.fromhex(disk.root) for disk in record.disks})

    def _below(self, tree: TreeReader, digest: bytes, marked: bytes, level: int) -> None:
        """A page and all below it, but for what is the same at the same place below the page ``marked``."""
        key = digest + bytes([level])
        if digest in (marked, blob.ZERO_DIGEST) or key in self._seen:
            return
        self._seen.add(key)
        page, before = tree.page(digest), tree.page(marked)
        rows = np.flatnonzero((page != before).any(axis=1) & page.any(axis=1))
        self._add(np.frombuffer(digest, dtype=np.uint8).reshape(1, -1))
        if level == 0:
            self._add(page[rows])
            return
        for row in rows.tolist():
            self._below(tree, page[row].tobytes(), before[row].tobytes(), level - 1)

    def _add(self, digests: NDArray[np.uint8]) -> None:
        self._waiting.append(digests)
        self._count += len(digests)
        if self._count >= _BATCH:
            self._look_up()

    def _look_up(self) -> None:
        if not self._waiting:
            return
        digests = np.concatenate(self._waiting)
        self._waiting, self._count = [], 0
        keys = prefixes(digests)
        order = np.argsort(keys)
        digests, keys = digests[order], keys[order]
        found = np.zeros(len(digests), dtype=bool)
        for file, needed in zip(self._index.files, self._needed, strict=True):
            rows = file.find(digests, keys, lasting=True)
            needed[rows[rows >= 0]] = True
            found |= rows >= 0
            file.let_go()
        if not found.all():
            self._look_further(digests[~found])

    def _look_further(self, digests: Digests) -> None:
        """What is not in the index as it was may have been stored since."""
        self._repo.index.refresh()
        if missing := int((~self._repo.index.have(digests, lasting=True)).sum()):
            raise DamagedError(f"{missing} of its clusters or pages are in no pack")

    def needed(self, digests: Digests) -> NDArray[np.bool_]:
        """Which of the digests a marked backup needs. Shape (n,)."""
        keys = prefixes(digests)
        found = np.zeros(len(digests), dtype=bool)
        for file, needed in zip(self._index.files, self._needed, strict=True):
            rows = file.find(digests, keys, lasting=True)
            found |= (rows >= 0) & needed[rows] if len(needed) else False
        return found

    def weights(self) -> dict[str, int]:
        """The bytes needed of each pack that the index names and that is not condemned; 0: nothing is."""
        found: dict[str, int] = {}
        for file, needed in zip(self._index.files, self._needed, strict=True):
            sums = np.zeros(len(file.names))
            for start in range(0, len(file), _ROWS):
                places = file.places[start : start + _ROWS][needed[start : start + _ROWS]]
                places = places[places["pack"] < len(sums)]
                sizes = places["stored"].astype(np.float64) + ENTRY.itemsize
                sums += np.bincount(places["pack"], weights=sizes, minlength=len(sums))
            file.let_go()
            for name, size in zip(file.names, sums.tolist(), strict=True):
                if name not in self._index.condemned.packs:
                    found[name] = found.get(name, 0) + int(size)
        return found

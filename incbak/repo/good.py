"""Which backups of a VM must stay, whatever a policy says: the last good one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from incbak.errors import DamagedError
from incbak.repo.blob import ZERO_DIGEST
from incbak.repo.index import REBUILD
from incbak.repo.record import DiskRecord, NotWholeError, Record, not_whole
from incbak.repo.repository import Repository
from incbak.repo.tree import Page, TreeReader

_ROWS = 1 << 18
"""Digests that are looked up at once: 8 MiB."""


def last_good(
    repo: Repository, records: Sequence[Record], noted: Collection[str], going: Sequence[Record]
) -> tuple[list[str], dict[str, NotWholeError]]:
    """The newest of ``records`` that no check has noted as damaged and that is whole beside those that go.

    Where that one lacks a disk, the newest with all of them too. Also, by their ids, what is wrong with others that
    were looked at.
    """
    found: list[Record] = []
    broken: dict[str, NotWholeError] = {}
    for record in reversed(records):
        if record.id in noted or (found and record.incomplete):
            continue
        try:
            check_beside(repo, record, going)
        except NotWholeError as e:
            broken[record.id] = e
            continue
        found.append(record)
        if not record.incomplete:
            break
    return [r.id for r in found], broken


def check_beside(repo: Repository, record: Record, going: Sequence[Record]) -> None:
    """Look at all pages, and for the clusters that they name, which any of ``going`` has not the same at their places.

    What they all have the same is not better kept by keeping them. Raises `DamagedError` naming the backup.
    """
    try:
        for disk in record.disks:
            look = _Look(repo, repo.tree(disk, record.cluster_size))
            for other in going:
                look.beside(_same_disk(other, disk) if other.cluster_size == record.cluster_size else None)
            look.finish()
    except DamagedError as e:
        raise not_whole(record, str(e), e.hint) from e


def _same_disk(record: Record, disk: DiskRecord) -> bytes | None:
    """The root of the tree of the same disk, if it has the same shape."""
    found = record.disk(disk.name)
    return bytes.fromhex(found.root) if found and found.size == disk.size else None


_TIMES = 4
"""How often a leaf is compared; the last time all its clusters are looked up, and then it is done."""


class _Look:
    """Raises `DamagedError` at what is not whole."""

    def __init__(self, repo: Repository, tree: TreeReader) -> None:
        self._index, self._tree = repo.index, tree
        self._seen: set[tuple[bytes, bytes]] = set()
        self._leaves: dict[bytes, int] = {}
        self._waiting: list[Page] = []
        self._count = 0

    def beside(self, root: bytes | None) -> None:
        """All but what is the same as below ``root``."""
        self._below(self._tree.root, root if root is not None else ZERO_DIGEST, self._tree.depth - 1)

    def _below(self, digest: bytes, other: bytes, level: int) -> None:
        if digest in (ZERO_DIGEST, other):
            return
        if level == 0:
            self._leaf(digest, other)
            return
        if (digest, other) in self._seen:
            return
        self._seen.add((digest, other))
        page, before = self._tree.page(digest), self._page(other)
        for row in np.flatnonzero((page != before).any(axis=1)).tolist():
            self._below(page[row].tobytes(), before[row].tobytes(), level - 1)

    def _leaf(self, digest: bytes, other: bytes) -> None:
        times = self._leaves.get(digest, 0)
        if times < _TIMES:
            self._leaves[digest] = times + 1
            page = self._tree.page(digest)
            rows = page.any(axis=1)
            if times + 1 < _TIMES:
                rows &= (page != self._page(other)).any(axis=1)
            self._add(page[rows])

    def _page(self, digest: bytes) -> Page:
        """Of a backup that goes: where it cannot be read it has nothing."""
        try:
            return self._tree.page(digest)
        except DamagedError:
            return self._tree.page(ZERO_DIGEST)

    def _add(self, clusters: Page) -> None:
        self._waiting.append(clusters)
        self._count += len(clusters)
        if self._count >= _ROWS:
            self.finish()

    def finish(self) -> None:
        """Look up the clusters that wait."""
        if self._waiting:
            wanted = np.concatenate(self._waiting)
            if lost := {digest.tobytes() for digest in wanted[~self._index.have(wanted, lasting=True)]}:
                hint = REBUILD if self._index.doubt else ""
                raise DamagedError(f"{len(lost)} of its clusters are in no pack", hint=hint)
        self._waiting, self._count = [], 0

"""The Merkle tree of a disk: pages of `FANOUT` digests, each page a blob under its own digest, up to one root.

A leaf page holds the digests of `FANOUT` clusters, 64 MiB of disk at 64 KiB clusters. A digest of zeroes stands for a
cluster of zeroes, and for a page of nothing but such: neither is stored. The last pages are filled up with zeroes. The
depth follows from the number of clusters, so a root and a size are all that a record needs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.repo import blob
from incbak.repo.blob import DIGEST, ZERO_DIGEST
from incbak.repo.spool import spool_file

FANOUT = 1024
PAGE = FANOUT * DIGEST
_CACHE = 64
_COMPACT = 1 << 18
"""Pending cluster digests after which pages are made, to bound memory: 10 MiB."""

Page = NDArray[np.uint8]
"""Shape (FANOUT, 32)."""
Fetch = Callable[[bytes], "bytes | memoryview"]
Store = Callable[[bytes], bytes]
"""Takes a page's bytes, stores them, returns their digest."""


def depth_of(clusters: int) -> int:
    """How many levels of pages a disk of so many clusters has; at least one."""
    depth, reach = 1, FANOUT
    while reach < clusters:
        depth, reach = depth + 1, reach * FANOUT
    return depth


def _empty() -> Page:
    return np.zeros((FANOUT, DIGEST), dtype=np.uint8)


def page_of(digest: bytes, data: bytes | memoryview) -> Page:
    """A page from its bytes. Raises `DamagedError` when they are none."""
    if len(data) != PAGE:
        raise DamagedError(f"page {digest.hex()} has {len(data)} bytes")
    return np.frombuffer(data, dtype=np.uint8).reshape(FANOUT, DIGEST)


class TreeReader:
    """The tree below ``root``. Raises `DamagedError` for a page that is missing or wrong. One thread."""

    def __init__(self, fetch: Fetch, root: bytes, clusters: int) -> None:
        self._fetch, self.root, self.clusters, self.depth = fetch, root, clusters, depth_of(clusters)
        self._pages: OrderedDict[bytes, Page] = OrderedDict()

    def page(self, digest: bytes) -> Page:
        """One page; the zero digest gives a page of zeroes."""
        if digest == ZERO_DIGEST:
            return _empty()
        if (found := self._pages.get(digest)) is None:
            found = self._pages[digest] = page_of(digest, self._fetch(digest))
            if len(self._pages) > _CACHE:
                self._pages.popitem(last=False)
        return found

    def leaf_digest(self, leaf: int) -> bytes:
        """The digest of the leaf page with that number."""
        digest = self.root
        for level in range(self.depth - 1, 0, -1):
            if digest == ZERO_DIGEST:
                return digest
            digest = self.page(digest)[leaf // FANOUT ** (level - 1) % FANOUT].tobytes()
        return digest

    def leaf(self, number: int) -> Page:
        """A leaf page: the digests of clusters ``number * FANOUT`` on."""
        return self.page(self.leaf_digest(number))

    def digests(self, first: int, count: int) -> NDArray[np.uint8]:
        """The digests of ``count`` clusters from ``first`` on. Shape (count, 32)."""
        parts = []
        while count > 0:
            leaf, row = divmod(first, FANOUT)
            parts.append(self.leaf(leaf)[row : row + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def leaves(self) -> Iterator[tuple[int, bytes]]:
        """(number, digest) of every leaf page that is not zero, in order."""
        yield from self._below(self.root, self.depth - 1, 0)

    def _below(self, digest: bytes, level: int, first: int) -> Iterator[tuple[int, bytes]]:
        if digest == ZERO_DIGEST:
            return
        if level == 0:
            yield first, digest
            return
        page = self.page(digest)
        for i in np.flatnonzero(page.any(axis=1)).tolist():
            yield from self._below(page[i].tobytes(), level - 1, first + i * FANOUT ** (level - 1))

    def pages(
        self, seen: set[bytes], on_damage: Callable[[bytes, DamagedError], None] | None = None
    ) -> Iterator[tuple[bytes, int, Page]]:
        """(digest, level, page) of every page not in ``seen``, which grows; level 0 is a leaf.

        With ``on_damage``, a damaged page is told to it and passed over.
        """
        yield from self._pages_below(self.root, self.depth - 1, seen, on_damage)

    def _pages_below(
        self, digest: bytes, level: int, seen: set[bytes], on_damage: Callable[[bytes, DamagedError], None] | None
    ) -> Iterator[tuple[bytes, int, Page]]:
        key = digest + bytes([level])
        if digest == ZERO_DIGEST or key in seen:
            return
        seen.add(key)
        try:
            page = self.page(digest)
        except DamagedError as e:
            if on_damage is None:
                raise
            on_damage(digest, e)
            return
        yield digest, level, page
        if level:
            for i in np.flatnonzero(page.any(axis=1)).tolist():
                yield from self._pages_below(page[i].tobytes(), level - 1, seen, on_damage)


def differing(a: TreeReader, b: TreeReader) -> Iterator[tuple[int, int]]:
    """(first cluster, count) of the runs that differ between two trees of the same depth; equal pages are not read."""
    run_first = run_end = -1
    for first, count in _differing(a, b, a.root, b.root, a.depth - 1, 0):
        if first != run_end:
            if run_end > run_first:
                yield run_first, run_end - run_first
            run_first = first
        run_end = first + count
    if run_end > run_first:
        yield run_first, run_end - run_first


def _differing(
    a: TreeReader, b: TreeReader, left: bytes, right: bytes, level: int, first: int
) -> Iterator[tuple[int, int]]:
    if left == right:
        return
    x, y = a.page(left), b.page(right)
    changed = np.flatnonzero((x != y).any(axis=1)).tolist()
    for i in changed:
        if level == 0:
            yield first + i, 1
        else:
            below = first + i * FANOUT**level
            yield from _differing(a, b, x[i].tobytes(), y[i].tobytes(), level - 1, below)


class _Spool:
    """Leaf pages in the making, in an unlinked file: what is not in a durable pack yet cannot be read from there."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._slots: dict[int, int] = {}

    def put(self, leaf: int, page: Page) -> None:
        """Keep a page; raises `OSError`."""
        if self._file is None:
            self._file = spool_file()
        self._file.seek(self._slots.setdefault(leaf, len(self._slots)) * PAGE)
        self._file.write(page.tobytes())

    def get(self, leaf: int) -> Page | None:
        """The page that was put last, a copy."""
        if self._file is None or leaf not in self._slots:
            return None
        self._file.seek(self._slots[leaf] * PAGE)
        return np.frombuffer(bytearray(self._file.read(PAGE)), dtype=np.uint8).reshape(FANOUT, DIGEST)

    def leaves(self) -> list[int]:
        """The numbers of all pages here."""
        return list(self._slots)


class TreeUpdate:
    """A new tree from a base and the clusters that were read. Work grows with the leaves touched, not with the disk.

    Without a base, clusters that are never set are zero. Setting a cluster twice: the later one counts. One thread.
    Pages that ``store`` was given are never fetched again.
    """

    def __init__(self, fetch: Fetch, store: Store, base: bytes | None, clusters: int) -> None:
        self._base = TreeReader(fetch, base if base is not None else ZERO_DIGEST, clusters)
        self._store = store
        self.clusters, self.depth = clusters, self._base.depth
        self._numbers: list[NDArray[np.int64]] = []
        self._digests: list[NDArray[np.uint8]] = []
        self._pending = 0
        self._leaves: dict[int, bytes] = {}
        self._spool = _Spool()
        self.changed = 0
        """Clusters set to another digest than they had in the base."""

    def set(self, numbers: NDArray[np.int64], digests: NDArray[np.uint8]) -> None:
        """Cluster ``numbers[i]`` has ``digests[i]``. Shapes (n,) and (n, 32)."""
        self._numbers.append(numbers)
        self._digests.append(digests)
        self._pending += len(numbers)
        if self._pending >= _COMPACT:
            self._apply(keep_partial=True)

    def _apply(self, *, keep_partial: bool) -> None:
        """Make the leaf pages that are pending; with ``keep_partial`` leave the last, which is likely to grow."""
        if not self._pending:
            return
        numbers, digests = np.concatenate(self._numbers), np.concatenate(self._digests)
        order = np.argsort(numbers, kind="stable")
        numbers, digests = numbers[order], digests[order]
        leaves, starts = np.unique(numbers // FANOUT, return_index=True)
        ends = np.append(starts[1:], len(numbers))
        keep = len(numbers)
        for leaf, start, end in zip(leaves.tolist(), starts.tolist(), ends.tolist(), strict=True):
            if keep_partial and len(leaves) > 1 and end == len(numbers) and end - start < FANOUT:
                keep = start
                break
            self._leaf(leaf, numbers[start:end] - leaf * FANOUT, digests[start:end], last=not keep_partial)
        self._numbers, self._digests, self._pending = [], [], 0
        if keep < len(numbers):
            self._numbers, self._digests, self._pending = [numbers[keep:]], [digests[keep:]], len(numbers) - keep

    def _leaf(self, leaf: int, rows: NDArray[np.int64], digests: NDArray[np.uint8], *, last: bool) -> None:
        """Change a leaf. It is stored when it is not likely to change again: whole, or at the end (``last``)."""
        page = self._spool.get(leaf)
        if page is None:
            page = np.array(self._base.leaf(leaf))
        before = page[rows]
        page[rows] = digests
        self.changed += int((before != page[rows]).any(axis=1).sum())
        self._leaves.pop(leaf, None)
        if not last:
            self._spool.put(leaf, page)
        if last or len(rows) >= FANOUT:
            self._leaves[leaf] = self._put(page)

    def _put(self, page: Page) -> bytes:
        return self._store(page.tobytes()) if page.any() else ZERO_DIGEST

    def finish(self) -> bytes:
        """Store what is pending and all pages above; the root."""
        self._apply(keep_partial=False)
        for leaf in self._spool.leaves():
            if leaf not in self._leaves and (page := self._spool.get(leaf)) is not None:
                self._leaves[leaf] = self._put(page)
        changed = self._leaves
        for level in range(1, self.depth):
            above: dict[int, dict[int, bytes]] = {}
            for number, digest in changed.items():
                above.setdefault(number // FANOUT, {})[number % FANOUT] = digest
            changed = {number: self._inner(level, number, children) for number, children in above.items()}
        return changed.get(0, self._base.root)

    def _inner(self, level: int, number: int, children: dict[int, bytes]) -> bytes:
        page = np.array(self._base.page(self._digest_at(level, number)))
        rows = np.fromiter(children, dtype=np.int64, count=len(children))
        page[rows] = np.frombuffer(b"".join(children.values()), dtype=np.uint8).reshape(-1, DIGEST)
        return self._put(page)

    def _digest_at(self, level: int, number: int) -> bytes:
        """The base's page ``number`` of ``level``."""
        digest = self._base.root
        for above in range(self.depth - 1, level, -1):
            if digest == ZERO_DIGEST:
                return digest
            digest = self._base.page(digest)[number // FANOUT ** (above - level - 1) % FANOUT].tobytes()
        return digest


def clusters_in(size: int, cluster: int) -> int:
    """How many clusters a disk of ``size`` bytes has."""
    return -(-size // cluster)


__all__ = ["FANOUT", "PAGE", "TreeReader", "TreeUpdate", "blob", "clusters_in", "depth_of", "differing", "page_of"]

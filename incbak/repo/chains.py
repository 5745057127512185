"""How often each digest begins to stand somewhere, in the trees of a disk's backups one after another.

A *chain* is the backups of one disk, oldest first. At each place of the tree, a page's or a cluster's, the digests of
the chain follow one another in runs of equal ones. A digest is counted once for every run of it, at any place; zeroes
are not. So one that any tree of the chain has is counted, and one that none has is not; and when backups join a chain
or leave it, it is counted anew only where they differ from their neighbours: whole subtrees that make no difference
are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.repo.blob import ZERO_DIGEST
from incbak.repo.index import Digests
from incbak.repo.tree import Page, TreeReader

_AT_ONCE = 1 << 19
"""Digests of pages below one page, of all trees, that are held: 16 MiB."""


@dataclass(frozen=True)
class Link:
    """One tree of a chain, or what it has at a place: a digest, and the id of the backup."""

    digest: bytes
    owner: str


BEFORE = Link(ZERO_DIGEST, "")
"""What stood everywhere before the first backup."""
Tell = Callable[[Digests, int], None]
"""Takes digests and by how much each of them counts more."""


class BrokenError(DamagedError):
    """A page of the tree of ``owner`` cannot be read."""

    def __init__(self, owner: str, cause: DamagedError) -> None:
        super().__init__(str(cause), hint=cause.hint)
        self.owner = owner


class DisorderError(Exception):
    """Two chains have the same backups in another order, or with other trees."""


def stretches(old: Sequence[Link], new: Sequence[Link]) -> Iterator[tuple[list[Link], list[Link]]]:
    """Where two chains differ, each from the link before to the one behind, if there is one.

    Raises `DisorderError`.
    """
    both = {link.owner for link in old} & {link.owner for link in new}
    stays = [link for link in old if link.owner in both]
    if stays != [link for link in new if link.owner in both]:
        raise DisorderError
    for number, (ours, theirs) in enumerate(zip(_parts(old, both), _parts(new, both), strict=True)):
        if ours or theirs:
            before, behind = stays[number - 1] if number else BEFORE, stays[number : number + 1]
            yield [before, *ours, *behind], [before, *theirs, *behind]


def _parts(chain: Sequence[Link], stays: set[str]) -> list[list[Link]]:
    parts: list[list[Link]] = [[]]
    for link in chain:
        if link.owner in stays:
            parts.append([])
        else:
            parts[-1].append(link)
    return parts


def count_anew(tree: TreeReader, old: Sequence[Link], new: Sequence[Link], tell: Tell) -> None:
    """Tell how the counts change when ``new`` takes the place of ``old``; both begin with the same link.

    ``tree`` is any of the trees. What is the same at several places below one page, or as a page above the leaves
    anywhere, is looked at once. Raises `BrokenError`.
    """
    level = _Level()
    level.add(old, new, 1)
    for height in range(tree.depth - 1, 0, -1):
        below = _Level()
        for before, after, times in level.all():
            _pages(before, after, times, tell)
            leaves = _Level()
            for ours, theirs in _children(tree, before, after):
                (below if height > 1 else leaves).add(ours, theirs, times)
            _leaves(tree, leaves, tell)
        level = below
    if tree.depth == 1:
        _leaves(tree, level, tell)


class _Level:
    """Places at one height where two chains differ, and how many there are of each kind."""

    def __init__(self) -> None:
        self._places: dict[tuple[tuple[bytes, ...], tuple[bytes, ...]], tuple[list[Link], list[Link]]] = {}
        self._times: dict[tuple[tuple[bytes, ...], tuple[bytes, ...]], int] = {}

    def add(self, old: Sequence[Link], new: Sequence[Link], times: int) -> None:
        """So many more places that have this in the two chains."""
        ours, theirs = _runs(old), _runs(new)
        key = tuple(link.digest for link in ours), tuple(link.digest for link in theirs)
        if key[0] != key[1]:
            self._places[key] = ours, theirs
            self._times[key] = self._times.get(key, 0) + times

    def all(self) -> Iterator[tuple[list[Link], list[Link], int]]:
        """Each kind once, with its number."""
        for key, (old, new) in self._places.items():
            yield old, new, self._times[key]


def _pages(old: Sequence[Link], new: Sequence[Link], times: int, tell: Tell) -> None:
    for chain, sign in ((old, -times), (new, times)):
        digests = b"".join(link.digest for link in chain[1:] if link.digest != ZERO_DIGEST)
        tell(np.frombuffer(digests, dtype=np.uint8).reshape(-1, 32), sign)


def _children(tree: TreeReader, old: Sequence[Link], new: Sequence[Link]) -> Iterator[tuple[list[Link], list[Link]]]:
    """What the two chains have at the places below, where that may differ."""
    rows = _differing(tree, old, new)
    step = max(_AT_ONCE // (len(old) + len(new)), 1)
    for start in range(0, len(rows), step):
        some = rows[start : start + step]
        ours, theirs = ([(_page(tree, link)[some], link.owner) for link in chain] for chain in (old, new))
        for number in range(len(some)):
            yield (
                [Link(page[number].tobytes(), owner) for page, owner in ours],
                [Link(page[number].tobytes(), owner) for page, owner in theirs],
            )


def _leaves(tree: TreeReader, level: _Level, tell: Tell) -> None:
    for old, new, times in level.all():
        _pages(old, new, times, tell)
        rows = _differing(tree, old, new)
        for chain, sign in ((old, -times), (new, times)):
            _clusters(tree, chain, rows, sign, tell)


def _runs(chain: Sequence[Link]) -> list[Link]:
    """The first link of each run of equal digests."""
    return [link for number, link in enumerate(chain) if not number or link.digest != chain[number - 1].digest]


def _differing(tree: TreeReader, old: Sequence[Link], new: Sequence[Link]) -> NDArray[np.int64]:
    """The rows of the page that may make a difference: not those that are the same in all links but the first, which
    both chains have; unless one is only that.
    """
    page = _words(_page(tree, new[-1]))
    found = np.zeros(len(page), dtype=bool)
    for link in {link.digest: link for link in (*old[1:], *new[1:])}.values():
        found |= (_words(_page(tree, link)) != page).any(axis=1)
    if len(old) == 1:
        found |= (_words(_page(tree, old[0])) != page).any(axis=1)
    return np.flatnonzero(found)


def _clusters(tree: TreeReader, chain: Sequence[Link], rows: NDArray[np.int64], times: int, tell: Tell) -> None:
    before = _page(tree, chain[0])[rows]
    for link in chain[1:]:
        page = _page(tree, link)[rows]
        words = _words(page)
        tell(page[(words != _words(before)).any(axis=1) & words.any(axis=1)], times)
        before = page


def _words(page: Page) -> NDArray[np.uint64]:
    """The same in larger pieces, which are compared sooner. Shape (n, 4)."""
    return page.view(np.uint64)


def _page(tree: TreeReader, link: Link) -> Page:
    try:
        return tree.page(link.digest)
    except DamagedError as e:
        raise BrokenError(link.owner, e) from e

"""What the listed backups need of what is stored, kept from one prune to the next.

Each key, the beginning of a digest, has a count, which `chains` defines: it is 0 where no backup of the chains has
such a page or cluster. Work grows with what joins the chains or leaves them. It says only what backups need that were
whole when they were counted, so a file that is older than the last prune is as true as the latest.

What was kept is not believed where it could be doubted: when it does not verify; when a pack is not there or not
named any more, or one was condemned that it does not know; when what left the chains, or stands beside that, cannot
be read; when a count would be less than nothing. Then all is counted anew from the listed backups, as it is where
nothing was kept.

The bytes needed of each pack are kept too. They serve to choose packs; whether a chosen one may go, its own table and
the counts decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.events import Progress, Reporter, silent
from incbak.repo import needs_file
from incbak.repo.chains import BEFORE, BrokenError, DisorderError, Link, count_anew, stretches
from incbak.repo.counts import MOST, Counts, Keys, Numbers, Tally, laid_over, ranges
from incbak.repo.index import REBUILD, Digests, IndexFile, prefixes
from incbak.repo.needs_file import Chain, Manifest
from incbak.repo.pack import ENTRY
from incbak.repo.record import DiskRecord, Record, not_whole, order
from incbak.repo.repository import Repository
from incbak.repo.tree import TreeReader, clusters_in

_ROWS = 1 << 18

Place = tuple[str, str, int, int]
"""VM, disk, size, cluster size: trees of one place have the same shape."""


class _DoubtError(Exception):
    """What was kept does not fit to what is there."""


def _place(record: Record, disk: DiskRecord) -> Place:
    return record.vm, disk.name, disk.size, record.cluster_size


def _chains(records: Iterable[Record]) -> dict[Place, list[Link]]:
    """The chains that these backups make; in their order, which is that of the repository."""
    found: dict[Place, list[Link]] = {}
    for record in sorted(records, key=order):
        for disk in record.disks:
            found.setdefault(_place(record, disk), []).append(Link(bytes.fromhex(disk.root), record.id))
    return found


class Needs:
    """Of the backups that `count` was given last. One thread."""

    def __init__(self, repo: Repository, report: Reporter = silent, *, anew: bool = False) -> None:
        """``anew``: believe nothing that was kept."""
        self._repo, self._report = repo, report
        self._saved = Manifest(needs_file.VERSION, 0)
        self._counted: dict[Place, list[Link]] = {}
        self._layers: list[Counts] = []
        """The latest first; none: nothing is known."""
        self._packs: dict[str, int] = {}
        if not anew and (kept := needs_file.load(repo.storage)):
            self._saved, counts = kept
            self._layers.append(counts)
            self._packs.update(self._saved.packs)
            for c in self._saved.chains:
                links = [Link(bytes.fromhex(root), owner) for owner, root in c.links]
                self._counted[c.vm, c.disk, c.size, c.cluster_size] = links
        self.counted: frozenset[str] = frozenset()
        """The ids of the backups that `count` was given."""

    def _forget(self) -> None:
        self._counted, self._layers, self._packs = {}, [], {}

    def count(self, records: Sequence[Record]) -> None:
        """From now on these backups are meant.

        Raises `DamagedError` naming a backup when a page that is new cannot be read, or something that was not needed
        yet is in no pack that stays; then it says nothing any more.
        """
        self._repo.index.refresh()
        wanted = _chains(records)
        try:
            self._doubt()
            self._change(wanted, records)
        except (_DoubtError, BrokenError, DisorderError):
            self._forget()
            try:
                self._change(wanted, records)
            except BrokenError as e:
                raise not_whole(next(r for r in records if r.id == e.owner), str(e), self._way_out()) from e
        self.counted = frozenset(r.id for r in records)

    def _doubt(self) -> None:
        """Raises `_DoubtError` unless all packs that were looked at are there and named, and no others condemned."""
        index = self._repo.index
        named = {name for file in index.files for name in file.names}
        if not (self._layers and index.complete and self._packs.keys() <= named):
            raise _DoubtError
        if not index.condemned.packs <= set(self._saved.condemned):
            raise _DoubtError

    def _change(self, wanted: dict[Place, list[Link]], records: Sequence[Record]) -> None:
        tally = Tally()
        places = list(dict.fromkeys((*self._counted, *wanted)))
        for number, place in enumerate(places):
            self._report(Progress("", number, len(places), "looking through", "disks"))
            tree = self._tree(place)
            for old, new in stretches(self._counted.get(place, []), wanted.get(place, [])):
                count_anew(tree, old, new, tally.add)
        layer, missing = Counts(), list[Keys]()
        packs = self._with_new_packs()
        for keys, changes in tally.sums():
            before = self._of(keys)
            after = np.where(before == MOST, MOST, np.minimum(before + changes, MOST))
            if len(after) and after.min() < 0:
                raise _DoubtError
            fresh = keys[(before == 0) & (after > 0)]
            missing.append(fresh[~self._weigh(packs, fresh, 1)])
            self._weigh(packs, keys[(before > 0) & (after == 0)], -1)
            layer.append(keys, after)
        if any(map(len, missing)):
            raise self._in_no_pack(records, np.concatenate(missing))
        self._layers.insert(0, layer)
        self._packs, self._counted = packs, wanted

    def _tree(self, place: Place) -> TreeReader:
        return TreeReader(self._repo.reader().read, BEFORE.digest, clusters_in(*place[2:]))

    def _of(self, keys: Keys) -> Numbers:
        """The counts of sorted keys."""
        found = np.full(len(keys), -1, dtype=np.int64)
        for layer in self._layers:
            open_ = np.flatnonzero(found < 0)
            found[open_] = layer.of(keys[open_])
        return np.maximum(found, 0)

    # -- packs ----------------------------------------------------------------------------------------------------

    def _weigh(self, packs: dict[str, int], keys: Keys, sign: int) -> NDArray[np.bool_]:
        """Content with these keys is needed (1), or is not any more (-1); which of it is in packs that stay."""
        found = np.zeros(len(keys), dtype=bool)
        for file in self._repo.index.files:
            rows, which = file.matches(keys)
            numbers, sizes = file.packs_and_sizes(rows)
            sound = numbers < len(file.names)
            which, numbers, sizes = which[sound], numbers[sound], sizes[sound]
            found[which[file.lasting[numbers]]] = True
            _add(packs, file, numbers, sizes, sign)
        return found

    def _with_new_packs(self) -> dict[str, int]:
        """The bytes needed of each pack that the index names."""
        files = self._repo.index.files
        packs = {name: self._packs.get(name, 0) for file in files for name in file.names}
        for file in files:
            unknown = np.array([name not in self._packs for name in file.names], dtype=bool)
            for start in range(0, len(file) if self._layers and unknown.any() else 0, _ROWS):
                places = file.places[start : start + _ROWS]
                numbers = places["pack"].copy()
                rows = np.flatnonzero(numbers < len(unknown))
                rows = rows[unknown[numbers[rows]]]
                rows = rows[self._of(file.keys[start : start + _ROWS][rows]) > 0]
                _add(packs, file, numbers[rows], places["stored"][rows], 1)
        return packs

    def weights(self) -> dict[str, int]:
        """The bytes needed of each pack that the index names and that is not condemned; 0: nothing is."""
        self._packs = self._with_new_packs()
        condemned = self._repo.index.condemned.packs
        return {name: size for name, size in self._packs.items() if name not in condemned}

    def needed(self, digests: Digests) -> NDArray[np.bool_]:
        """Which of the digests a backup that was counted needs. Shape (n,)."""
        keys = prefixes(digests)
        order = np.argsort(keys)
        found = np.zeros(len(keys), dtype=bool)
        found[order] = self._of(keys[order]) > 0
        return found

    # -- from one prune to the next -------------------------------------------------------------------------------

    def save(self) -> None:
        """Keep what was counted, unless it is what was kept. Raises `DurabilityError`."""
        self.weights()
        chains = tuple(
            Chain(*place, tuple((link.owner, link.digest.hex()) for link in links))
            for place, links in sorted(self._counted.items())
        )
        condemned = tuple(sorted(self._repo.index.condemned.packs))
        fresh = Manifest(needs_file.VERSION, self._saved.serial + 1, chains, self._packs, condemned)
        if (chains, self._packs, condemned) != (self._saved.chains, self._saved.packs, self._saved.condemned):
            needs_file.save(self._repo.storage, fresh, self.all())
            self._saved = fresh

    def all(self) -> Iterator[tuple[Keys, Numbers]]:
        """Every key that is needed, in order, with its count; in stretches."""
        for first, last in ranges(sum(map(len, self._layers))):
            found = np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
            for layer in reversed(self._layers):
                found = laid_over(found, layer.between(first, last))
            keys, counts = found
            stays = counts > 0
            if stays.any():
                yield keys[stays], counts[stays]

    # -- what is wrong --------------------------------------------------------------------------------------------

    def _way_out(self) -> str:
        """Return what to do where something is not found."""
        return REBUILD if self._repo.index.doubt else ""

    def _in_no_pack(self, records: Sequence[Record], lost: Keys) -> DamagedError:
        """Says whose it is."""
        for record in records:
            hits = set[int]()

            def look(digests: Digests, _times: int, hits: set[int] = hits) -> None:
                keys = prefixes(digests)
                hits.update(keys[np.isin(keys, lost)].tolist())

            for disk in record.disks:
                link = Link(bytes.fromhex(disk.root), record.id)
                count_anew(self._tree(_place(record, disk)), [BEFORE], [BEFORE, link], look)
            if hits:
                return not_whole(record, f"{len(hits)} of its clusters or pages are in no pack", self._way_out())
        raise AssertionError("what is counted is in a backup")


def _add(
    packs: dict[str, int], file: IndexFile, numbers: NDArray[np.uint32], stored: NDArray[np.uint32], sign: int
) -> None:
    sizes = stored.astype(np.float64) + ENTRY.itemsize
    sums = np.bincount(numbers, weights=sizes, minlength=len(file.names)) if len(numbers) else np.zeros(0)
    for number in np.flatnonzero(sums).tolist():
        packs[file.names[number]] += sign * int(sums[number])

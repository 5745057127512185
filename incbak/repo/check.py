"""Checking a repository: every problem names the object and the backups that it touches."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np

from incbak.errors import DamagedError, DurabilityError, FormatTooNewError
from incbak.events import Reporter, silent
from incbak.repo import pack
from incbak.repo.damage import Damage, notes, replace_notes
from incbak.repo.ids import ids, is_id, new_id
from incbak.repo.index import REBUILD, IndexFile, encode, stored
from incbak.repo.reader import digests_array
from incbak.repo.reading import PackRead, read_packs, save
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.tree import Page
from incbak.repo.verified import Coverage, LastCheck, Verified

_LEAVES = 256
"""Leaf pages whose clusters are looked up at once: 8 MiB of digests."""


@dataclass(frozen=True)
class Problem:
    """``what`` is wrong, in words that name the object; ``backups`` that cannot be restored whole because of it.

    ``harmless``: nothing is lost by it: a damaged copy of what is whole elsewhere, a file that is not ours.
    """

    what: str
    backups: tuple[str, ...] = ()
    harmless: bool = False


@dataclass
class Report:
    """What a check found and how much it looked at; ``coverage``: what was ever read."""

    coverage: Coverage
    problems: list[Problem] = field(default_factory=list)
    backups: int = 0
    packs: int = 0
    blobs: int = 0
    bytes_read: int = 0
    packs_read: int = 0
    damaged: set[bytes] = field(default_factory=set)
    """Digests whose content is not there or wrong."""
    broken: list[str] = field(default_factory=list)
    """Packs without a table."""
    hint: str = "The next backup stores anew what it can."

    @property
    def serious(self) -> list[Problem]:
        """Those that are to be mended."""
        return [p for p in self.problems if not p.harmless]


class NotNotedError(DurabilityError):
    """What a check found cannot be noted in the repository; it is in ``report``."""

    def __init__(self, report: Report, cause: DurabilityError) -> None:
        what = f"what was found cannot be noted, so the next backup does not know of it: {cause}"
        super().__init__(what, hint=cause.hint)
        self.report = report


def check(
    repo: Repository,
    *,
    read_data: bool = False,
    fraction: float = 1.0,
    seed: int | None = None,
    max_duration: float | None = None,
    clock: Callable[[], float] = time.time,
    report: Reporter = silent,
) -> Report:
    """Look at config, packs, index, records and trees; with ``read_data`` at every blob of a ``fraction`` of the packs.

    Packs that were never read come first, then those that were read longest ago (`verified`); after ``max_duration``
    seconds of reading data no other pack is begun. What is found damaged is noted in the repository, so that the next
    backup stores it again; raises `NotNotedError` where it cannot be. Every check reads again what is noted (`damage`),
    also one that reads no other data. Backups are listed before the index is read, so one that is committed meanwhile
    does not look damaged.
    """
    verified = Verified(repo.storage, clock)
    found = Report(verified.coverage())
    before, known = notes(repo.storage), repo.damage()
    records = repo.backups()
    repo.index.refresh()
    for name, why in repo.index.why.items():
        what = f"index {name} does not verify ({why}); make it anew with: incbak check --rebuild-index"
        found.problems.append(Problem(what))
    for why in repo.index.condemned.unknown.values():
        found.problems.append(Problem(f"{why}; until then backups store everything anew; mend it with: incbak prune"))
    _strays(repo, found)
    _large_indexes(repo, found)
    packs, suspects = _packs(repo, found)
    chosen = sorted(packs) if read_data else []
    if chosen and fraction < 1:
        chosen = random.Random(seed).sample(chosen, max(1, round(len(chosen) * fraction)))
    if suspects:
        weights = {name: int(entries["stored"].sum()) for name, entries in suspects.items()}
        _judge(repo, found, read_packs(repo, weights, suspects.__getitem__, None, report))
    turns = {name: packs[name] for name in verified.in_turn(chosen)}
    reads = read_packs(repo, turns, _table_of(repo), verified, report, duration=max_duration, clock=clock)
    bad = _judge(repo, found, reads)
    whole = read_data and found.packs_read == len(packs) + len(suspects)
    if not whole:
        _look_again(repo, known.digests, found)
    affected = _backups(repo, records, found)
    _doubt(repo, found)
    for name in found.broken:
        verified.add(name, clock(), verified.look(name), whole=False)
    doubtful = set() if whole else known.backups & {r.id for r in records}
    try:
        _note(repo, found, known, affected | doubtful, before if whole else list(known.names))
    except NotNotedError:
        _unknown_notes(known, found, set())
        raise
    _unknown_notes(known, found, set(before) if whole else set())
    if not read_data:
        if found.broken:
            save(verified, report)
        return found
    for each in bad:
        verified.add(each.name, each.at, each.file, whole=False)
    verified.last = LastCheck(clock(), found.bytes_read, found.packs_read, len(found.serious))
    save(verified, report)
    found.coverage = verified.coverage()
    return found


def _note(repo: Repository, found: Report, known: Damage, backups: set[str], old: list[str]) -> None:
    """Note what was found in the place of the ``old`` notes, unless one of them says just that."""
    if (
        found.damaged == set(known.digests)
        and backups == set(known.backups)
        and old == list(known.names)
        and len(old) <= 1
    ):
        return
    try:
        replace_notes(repo.storage, found.damaged, backups, old)
    except DurabilityError as e:
        raise NotNotedError(found, e) from e


def _doubt(repo: Repository, found: Report) -> None:
    """Where something is missing that may only not be found, say so."""
    missing = bool(found.damaged) or any(p.backups for p in found.problems)
    if missing and repo.index.unnamed:
        what = f"{len(repo.index.unnamed)} packs are there that no index names"
        found.problems.append(Problem(f"{what}; bring back what is in them with: incbak check --rebuild-index"))
    if repo.index.damaged or (missing and repo.index.unnamed):
        found.hint = REBUILD


def _unknown_notes(known: Damage, found: Report, replaced: Collection[str]) -> None:
    """Tell which notes cannot be read; those that were ``replaced`` by what a check of everything found do no harm."""
    for name, why in known.unknown.items():
        if name in replaced:
            then = "all was read again, so it was replaced"
        else:
            then = "until all is read again backups store everything anew: incbak check --read-data"
        found.problems.append(Problem(f"{why}; {then}", harmless=name in replaced))


def _strays(repo: Repository, found: Report) -> None:
    for kind in ("packs", "index", "backups"):
        for name in sorted(repo.storage.list(kind)):
            if not is_id(name):
                what = f"{name[:100]!r} in {kind} is no file of a repository, and is passed over"
                found.problems.append(Problem(what, harmless=True))


def _large_indexes(repo: Repository, found: Report) -> None:
    for file in repo.index.files:
        try:
            IndexFile(file.name, stored(repo.storage, file.name), verify=True, seal=repo.seal)
        except FileNotFoundError:
            continue
        except DamagedError as e:
            found.problems.append(Problem(f"{e}; make it anew with: incbak check --rebuild-index"))


def _packs(repo: Repository, found: Report) -> tuple[dict[str, int], dict[str, pack.Entries]]:
    """The bytes of blobs in all packs that have a table; missing and broken packs are problems.

    Tables are not kept: those of a large repository would fill the memory. Of a pack whose own table is broken, the
    second one tells what the index looks for there: all of it is suspect. Condemned packs may be there or not, and hold
    nothing that counts.
    """
    there = ids(repo.storage.list("packs"))
    for name in sorted(_named(repo) - there.keys()):
        if not _pruned(repo, name):
            found.problems.append(Problem(f"pack {name} is missing"))
    packs, suspects = {}, {}
    for name, size in sorted(there.items()):
        if name in repo.index.condemned.packs:
            continue
        try:
            table = pack.read_table(repo.storage, name, size)
            packs[name] = int(table["stored"].sum())
            found.packs += 1
            found.blobs += len(table)
        except (DamagedError, OSError) as e:
            if _pruned(repo, name):
                continue
            cannot = f"pack {name} cannot be read: {e.strerror}" if isinstance(e, OSError) else str(e)
            if not size and name not in _named(repo):
                found.problems.append(Problem(f"{cannot}; nothing is looked for in it", harmless=True))
                continue
            found.problems.append(Problem(cannot))
            found.broken.append(name)
            if len(entries := _indexed(repo, name)):
                suspects[name] = entries
    return packs, suspects


def _table_of(repo: Repository) -> Callable[[str], pack.Entries]:
    sizes = repo.storage.list("packs")
    return lambda name: pack.read_table(repo.storage, name, sizes.get(name, 0))


def _named(repo: Repository) -> set[str]:
    return {name for file in repo.index.files for name in file.names}


def _pruned(repo: Repository, name: str) -> bool:
    """Whether a pack is gone because a prune that ran meanwhile removed it."""
    if name in repo.storage.list("packs"):
        return False
    repo.index.refresh()
    return name in repo.index.condemned.packs or name not in _named(repo)


def _indexed(repo: Repository, name: str) -> pack.Entries:
    """What the index says of one pack, in the order of the offsets."""
    parts = [np.zeros(0, dtype=pack.ENTRY)]
    for file in repo.index.files:
        if name in file.names and file.usable[number := file.names.index(name)]:
            parts.append(file.entries()[file.numbers() == number])
    entries = np.concatenate(parts)
    return entries[np.argsort(entries["offset"], kind="stable")]


def _judge(repo: Repository, found: Report, reads: Iterator[PackRead]) -> list[PackRead]:
    """Read these packs; a digest that another place still holds whole is not damaged.

    Returns those in which something is: they are not marked yet.
    """
    suspects: list[tuple[str, bytes]] = []
    bad: list[PackRead] = []
    for each in reads:
        found.bytes_read += each.size
        found.packs_read += 1
        suspects += [(each.name, digest) for digest in each.bad]
        if each.bad:
            bad.append(each)
    reader = repo.reader()
    pruned = {name for name in {name for name, _ in suspects} if _pruned(repo, name)}
    for name, digest in suspects:
        if name in pruned:
            continue
        try:
            reader.read(digest)
            what = f"blob {digest.hex()} in pack {name} is damaged; another copy is whole, so a prune drops it"
            found.problems.append(Problem(what, harmless=True))
        except DamagedError:
            found.damaged.add(digest)
            found.problems.append(Problem(f"blob {digest.hex()} in pack {name} is damaged"))
    return bad


def _look_again(repo: Repository, known: frozenset[bytes], found: Report) -> None:
    """What earlier checks found damaged: a check of a part must not call well what it could know."""
    digests = sorted(known - found.damaged)
    if not digests:
        return
    reader = repo.reader()
    for digest, there in zip(digests, repo.index.have(digests_array(digests), lasting=True), strict=True):
        try:
            if there:  # else nobody needs it, or it is found missing below
                reader.read(digest)
        except DamagedError:
            found.damaged.add(digest)
            found.problems.append(Problem(f"blob {digest.hex()} is damaged, as an earlier check has found"))


def _backups(repo: Repository, records: list[Record], found: Report) -> set[str]:
    """Walk every tree: pages readable, clusters present and not damaged. The ids of the backups that are hurt."""
    hurt: set[str] = set()
    seen: set[bytes] = set()
    for name, why in sorted(repo.unreadable.items()):
        found.problems.append(Problem(why, (name,)))
    for record in records:
        before = set(found.damaged)
        problem = _one_backup(repo, record, seen, found)
        if problem and record.id not in repo.storage.list("backups"):
            found.damaged = before  # pruned meanwhile
            continue
        found.backups += 1
        if problem:
            hurt.add(record.id)
            found.problems.append(Problem(problem, (record.id,)))
    return hurt


def _one_backup(repo: Repository, record: Record, seen: set[bytes], found: Report) -> str | None:
    """What is wrong with one backup; pages seen whole in earlier ones are not read again."""
    for disk in record.disks:
        trail: set[bytes] = set(seen)
        tree = repo.tree(disk, record.cluster_size)
        missing = 0
        pages: list[DamagedError] = []

        def note(digest: bytes, error: DamagedError, pages: list[DamagedError] = pages) -> None:
            found.damaged.add(digest)
            pages.append(error)

        waiting: list[Page] = []
        for _digest, level, page in tree.pages(trail, note):
            if level == 0:
                waiting.append(page[page.any(axis=1)])
                if len(waiting) == _LEAVES:
                    missing += _missing(repo, waiting, found)
        missing += _missing(repo, waiting, found)
        if pages:
            return f"disk {disk.name} of backup {record.id[:8]}: {pages[0]}"
        if missing:
            return f"disk {disk.name} of backup {record.id[:8]}: {missing} clusters are missing or damaged"
        seen |= trail
    return None


def _missing(repo: Repository, waiting: list[Page], found: Report) -> int:
    """How many of the clusters that these leaves name are not there or damaged; ``waiting`` is emptied."""
    rows = np.concatenate(waiting) if waiting else np.zeros((0, 32), dtype=np.uint8)
    waiting.clear()
    lost = ~repo.index.have(rows)
    found.damaged.update(row.tobytes() for row in rows[lost])
    if not found.damaged:
        return 0
    return sum(row.tobytes() in found.damaged for row in rows)


def rebuild_index(repo: Repository) -> int:
    """Make the index anew from the packs' own tables; the number of blobs. The old files go when the new are durable.

    Call it with the repository's lock held exclusively. Raises `FormatTooNewError`, with nothing changed.
    """
    repo.index.refresh()
    old = list(ids(repo.storage.list("index")))
    total = 0
    packs: list[tuple[str, int]] = []
    parts: list[pack.Entries] = []
    for name, size in sorted(ids(repo.storage.list("packs")).items()):
        try:
            parts.append(pack.read_table(repo.storage, name, size))
        except FormatTooNewError:
            raise
        except (DamagedError, OSError):
            continue
        packs.append((name, size))
        total += len(parts[-1])
        if sum(map(len, parts)) > 1 << 20:
            _write(repo, packs, parts)
            packs, parts = [], []
    _write(repo, packs, parts)
    for name in old:
        repo.storage.remove("index", name)
    repo.index.refresh()
    return total


def _write(repo: Repository, packs: list[tuple[str, int]], parts: list[pack.Entries]) -> None:
    if parts:
        numbers = np.repeat(np.arange(len(parts), dtype=np.uint32), [len(p) for p in parts])
        repo.storage.write("index", new_id(), encode(packs, numbers, np.concatenate(parts), repo.seal))

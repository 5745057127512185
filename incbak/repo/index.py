"""The index: which blob lies where. Sorted numpy arrays; those of large files are read in pieces (`columns`).

::

    0     128    header: magic "INCBAKIX", version, blobs n, packs m, BLAKE3 of the rest (32), zero, its own BLAKE3
    128   24 m   packs: name 16, size 8
    ...   8 n    the first 8 bytes of each digest as a number, sorted
    ...   44 n   the rest of the digest 24, pack number 4, offset 4, stored 4, raw 4, codec 1, zero 3

Digests whose first 8 bytes are equal stand side by side and are stepped over. Several files make up the index; a blob
may stand in more than one. Names are random; files are immutable; one that vanished was merged into another.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError, FormatTooNewError, StorageError
from incbak.repo.columns import Column, Data, StoredBytes, column, near, span
from incbak.repo.condemned import Condemned, read_condemned
from incbak.repo.ids import ids
from incbak.repo.mapping import opened
from incbak.repo.pack import ENTRY, Entries
from incbak.repo.seal import PLAIN, Seal
from incbak.repo.storage.base import Storage

VERSION = 1
MAGIC = b"INCBAKIX"
_HEAD = struct.Struct("<8sIIQ32s")
_HEAD_SIZE, _CHECKSUM = 128, 16
PACK = np.dtype([("name", "V16"), ("size", "<u8")])
PLACE = np.dtype(
    [
        ("rest", "V24"),
        ("pack", "<u4"),
        ("offset", "<u4"),
        ("stored", "<u4"),
        ("raw", "<u4"),
        ("codec", "u1"),
        ("zero", "V3"),
    ]
)
VERIFY_UP_TO = 64 << 20
"""Files up to this size are verified when they are opened; larger ones by `check` only, since blobs verify anyway."""
_ROWS = 1 << 16
"""Rows that are read at once where all are looked at."""
_FEWER = 16
"""So many times more rows than keys are searched, rather than gone through."""
_MUCH = 16 << 20
"""Bytes of new files from which on it pays to open them by several threads."""
_SAMPLE = 8
"""Digests by which it is judged which file they are in."""
_SAMPLED = 1 << 10
"""Digests from which on that is done."""
SORTED = 1 << 12
"""Digests from which on it pays to look them up in their order."""

REBUILD = "Run: incbak check --rebuild-index"
"""The way out of all that is wrong with the index: packs have tables of their own."""

Digests = NDArray[np.uint8]
"""Shape (n, 32)."""


def prefixes(digests: Digests) -> NDArray[np.uint64]:
    """The first 8 bytes of each digest as a big-endian number."""
    return np.ascontiguousarray(digests[:, :8]).view(">u8").ravel().astype(np.uint64)


def encode(packs: list[tuple[str, int]], numbers: NDArray[np.uint32], entries: Entries, seal: Seal = PLAIN) -> bytes:
    """An index file of ``entries``, the i-th of which lies in ``packs[numbers[i]]``."""
    count, packs_end = len(entries), _HEAD_SIZE + len(packs) * PACK.itemsize
    digests = np.frombuffer(entries["digest"].tobytes(), dtype=np.uint8).reshape(-1, 32)
    keys = prefixes(digests)
    order = np.argsort(keys, kind="stable")
    made = bytearray(packs_end + count * (keys.itemsize + PLACE.itemsize))  # filled in place: it may be large
    table = np.array([(bytes.fromhex(name), size) for name, size in packs], dtype=PACK)
    made[_HEAD_SIZE:packs_end] = table.tobytes()
    np.frombuffer(made, dtype="<u8", count=count, offset=packs_end)[:] = keys[order]
    places = np.frombuffer(made, dtype=PLACE, count=count, offset=packs_end + count * keys.itemsize)
    places["rest"] = np.ascontiguousarray(digests[order, 8:]).view("V24").ravel()
    places["pack"] = numbers[order]
    for field in ("offset", "stored", "raw", "codec"):
        places[field] = entries[field][order]
    head = _HEAD.pack(MAGIC, VERSION, len(packs), count, seal.check(memoryview(made)[_HEAD_SIZE:]))
    head = head.ljust(_HEAD_SIZE - _CHECKSUM, b"\0")
    made[:_HEAD_SIZE] = head + seal.check(head)[:_CHECKSUM]
    return bytes(made)


class IndexFile:
    """One file. Raises `DamagedError` naming it when it does not verify, or later cannot be read."""

    def __init__(self, name: str, data: Data, *, verify: bool | None = None, seal: Seal = PLAIN) -> None:
        self.name = name
        raw = data[:_HEAD_SIZE].tobytes()
        if len(raw) < _HEAD_SIZE or seal.check(raw[:-_CHECKSUM])[:_CHECKSUM] != raw[-_CHECKSUM:]:
            raise DamagedError(f"the header of index {name} does not verify", hint=REBUILD)
        magic, version, packs, count, digest = _HEAD.unpack_from(raw)
        if magic != MAGIC or version > VERSION:
            raise FormatTooNewError(f"index {name} is of version {version}", hint="Use a newer incbak.")
        if len(data) != _HEAD_SIZE + packs * PACK.itemsize + count * (8 + PLACE.itemsize):
            raise DamagedError(f"index {name} has a wrong size", hint=REBUILD)
        if (len(data) <= VERIFY_UP_TO if verify is None else verify) and _checked(data, seal) != digest:
            raise DamagedError(f"index {name} does not match its digest", hint=REBUILD)
        at = _HEAD_SIZE
        self.packs = data[at : at + packs * PACK.itemsize].view(PACK)
        at += packs * PACK.itemsize
        self.keys = column(data, np.dtype("<u8"), count, at)
        self.places = column(data, PLACE, count, at + 8 * count)
        self.names = [bytes(n).hex() for n in self.packs["name"]]
        self._sizes = self.packs["size"].tolist()
        if isinstance(data, StoredBytes):
            data.error = StorageError  # it was whole: what fails from now on says nothing of its content
        self.usable = np.ones(packs, dtype=bool)
        self.lasting = self.usable

    def __len__(self) -> int:
        return len(self.keys)

    def only_packs(self, there: dict[str, int], condemned: Condemned) -> None:
        """Believe only in packs that exist with their size: others hold nothing to build on (faults rows 24, 25).

        Of these only the ``lasting`` ones are built on: not condemned, where all that is condemned is known.
        """
        self.usable = np.array([there.get(n) == s for n, s in zip(self.names, self._sizes, strict=True)], dtype=bool)
        stays = [n not in condemned.packs and not condemned.unknown for n in self.names]
        self.lasting = self.usable & np.array(stays, dtype=bool)

    def find(self, digests: Digests, keys: NDArray[np.uint64], *, lasting: bool = False) -> NDArray[np.int64]:
        """For each digest its row, or -1; with ``lasting`` only in packs that are not condemned. Shape (n,)."""
        packs = self.lasting if lasting else self.usable
        rows = np.full(len(digests), -1, dtype=np.int64)
        ours = near(self.keys, len(keys))
        at = ours.searchsorted(keys)
        open_ = np.flatnonzero(at < len(ours))
        rest = np.ascontiguousarray(digests[:, 8:]).view("V24").ravel()
        while len(open_):
            open_ = open_[ours[at[open_]] == keys[open_]]
            places = self.places[at[open_]]
            hit = places["rest"] == rest[open_]
            hit &= places["pack"] < len(packs)
            if len(packs):
                hit &= packs[np.minimum(places["pack"], len(packs) - 1)]
            rows[open_[hit]] = at[open_[hit]]
            open_ = open_[~hit]
            at[open_] += 1
            open_ = open_[at[open_] < len(ours)]
        return rows

    def matches(self, keys: NDArray[np.uint64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The rows, in any pack, whose digest begins as one of ``keys`` says, and as which; these sorted, each once."""
        if not len(keys):
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        first, end = (
            int(self.keys.searchsorted(keys[:1], "left")[0]),
            int(self.keys.searchsorted(keys[-1:], "right")[0]),
        )
        if end - first < _FEWER * len(keys):
            ours = self.keys[first:end]
            at = np.searchsorted(keys, ours)
            hit = np.flatnonzero(keys[at] == ours)
            return first + hit, at[hit]
        ours = near(self.keys, len(keys))
        starts, ends = ours.searchsorted(keys, "left"), ours.searchsorted(keys, "right")
        counts = ends - starts
        which = np.repeat(np.arange(len(keys)), counts)
        return starts[which] + np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts), which

    def rows(self, digest: bytes, key: int) -> Iterator[int]:
        """Every row of one digest: a file that was merged or made anew may have copies in several packs."""
        for row in range(*span(self.keys, np.uint64(key))):
            place = self.places[row]
            if (
                place["rest"].tobytes() == digest[8:]
                and place["pack"] < len(self.usable)
                and self.usable[place["pack"]]
            ):
                yield row

    def entries(self, start: int = 0, end: int | None = None) -> Entries:
        """Every blob (of these rows) as in a pack's table, in the order of `places`."""
        start, end, _ = slice(start, end).indices(len(self))
        entries = np.zeros(max(end - start, 0), dtype=ENTRY)
        for at in range(start, end, _ROWS):
            to = min(at + _ROWS, end)
            part, places = entries[at - start : to - start], self.places[at:to]
            keys = np.asarray(self.keys[at:to]).astype(">u8").view(np.uint8).reshape(-1, 8)
            rest = np.frombuffer(places["rest"].tobytes(), dtype=np.uint8).reshape(-1, 24)
            part["digest"] = np.ascontiguousarray(np.concatenate([keys, rest], axis=1)).view("V32").ravel()
            for field in ("offset", "stored", "raw", "codec"):
                part[field] = places[field]
        return entries

    def packs_and_sizes(self, rows: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
        """Of the blobs in these rows the number of the pack, as `numbers`, and the bytes stored."""
        if isinstance(self.places, Column):
            pack, size = self.places.fields(rows, "pack", "stored")
            return pack, size
        return self.places["pack"][rows], self.places["stored"][rows]

    def numbers(self, start: int = 0, end: int | None = None) -> NDArray[np.uint32]:
        """Of every blob (of these rows) the number of its pack; one that is damaged may be of none."""
        start, end, _ = slice(start, end).indices(len(self))
        parts = [self.places[at : min(at + _ROWS, end)]["pack"].copy() for at in range(start, end, _ROWS)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


def _checked(data: Data, seal: Seal) -> bytes:
    """What proves the body, which is not held in memory as a whole."""
    checker = seal.checker()
    body = data.pieces(_HEAD_SIZE) if isinstance(data, StoredBytes) else (memoryview(data[_HEAD_SIZE:]),)  # type: ignore[arg-type]
    for piece in body:
        checker.update(piece)
    return checker.digest()


class Place:
    """Where one blob lies."""

    __slots__ = ("codec", "offset", "pack", "raw", "stored")

    def __init__(self, pack: str, offset: int, stored: int, raw: int, codec: int) -> None:
        self.pack, self.offset, self.stored, self.raw, self.codec = pack, offset, stored, raw, codec


class Index:
    """All index files of a repository; `refresh` takes in new ones."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.files: list[IndexFile] = []
        self.why: dict[str, str] = {}
        """Files that were left out, and why: those that are `damaged`."""
        self._there: dict[str, int] = {}
        self._unnamed: frozenset[str] | None = None
        self.condemned = Condemned()
        self._latest: IndexFile | None = None
        self._likely_names: frozenset[str] = frozenset()
        self.refresh()

    def refresh(self) -> None:
        """Read the folder again. A damaged file is noted in `damaged` and left out. Raises `FormatTooNewError`.

        A pack that was pruned is found condemned, or not named: the index is looked at again behind what is condemned,
        since a prune removes a pack first, then what names it, then the condemnation.
        """
        known = {f.name: f for f in self.files}
        for _ in range(8):
            names = ids(self._storage.list("index"))
            try:
                files = self._opened(names, known)
            except FileNotFoundError:
                continue
            packs = ids(self._storage.list("packs"))
            condemned = read_condemned(self._storage)
            if {f.name for f in files} <= self._storage.list("index").keys():
                break
        else:
            raise DamagedError("the index changes faster than it can be read")
        for file in files:
            file.only_packs(packs, condemned)
        self.files, self.condemned = files, condemned
        self.why = {name: why for name, why in self.why.items() if name in names}
        self._there, self._unnamed = packs, None
        self._latest = None

    def stale(self) -> bool:
        """Whether index files came or went since the last `refresh`."""
        return {f.name for f in self.files} != ids(self._storage.list("index")).keys() - set(self.damaged)

    @property
    def complete(self) -> bool:
        """Whether every pack that is named is there, but for condemned ones, and every file of the index verifies."""
        if self.damaged or self.condemned.unknown:
            return False
        lost = {name for f in self.files for name, there in zip(f.names, f.usable.tolist(), strict=True) if not there}
        return lost <= self.condemned.packs

    def entries_of(self, pack: str) -> Entries:
        """What the index says of one pack, there or not."""
        parts = [np.zeros(0, dtype=ENTRY)]
        for file in self.files:
            if pack in file.names:
                parts.append(file.entries()[file.numbers() == file.names.index(pack)])
        return np.concatenate(parts)

    @property
    def damaged(self) -> list[str]:
        """Files that do not verify or cannot be read, and are left out."""
        return list(self.why)

    @property
    def unnamed(self) -> frozenset[str]:
        """Packs that are there and that no index file names: a run was killed, or files of the index are lost."""
        if self._unnamed is None:
            named = {name for f in self.files for name in f.names}
            self._unnamed = frozenset(self._there.keys() - named - self.condemned.packs)
        return self._unnamed

    @property
    def doubt(self) -> str:
        """Why content may be there that is not found, in words; empty when there is no reason. See `REBUILD`."""
        if self.damaged:
            return next(iter(self.why.values()))
        return f"{len(self.unnamed)} packs are there that no index names" if self.unnamed else ""

    def _opened(self, names: Mapping[str, int], known: Mapping[str, IndexFile]) -> list[IndexFile]:
        """These files, but for damaged ones. Much that is new is verified by all processors."""
        new = [name for name in names if name not in known]
        if sum(names[name] for name in new) > _MUCH:
            with ThreadPoolExecutor(os.cpu_count() or 1, "index") as threads:
                found = dict(zip(new, threads.map(self._open, new), strict=True))
        else:
            found = {name: self._open(name) for name in new}
        every = (known.get(name) or found.get(name) for name in names)
        return [file for file in every if file is not None]

    def _open(self, name: str) -> IndexFile | None:
        try:
            return IndexFile(name, stored(self._storage, name), seal=self._storage.seal)
        except FormatTooNewError:
            raise
        except DamagedError as e:
            self.why[name] = str(e)
            return None

    def have(self, digests: Digests, *, lasting: bool = False) -> NDArray[np.bool_]:
        """Which of the digests are stored in packs that exist; with ``lasting``, in some that are not condemned."""
        keys = prefixes(digests)
        found = np.zeros(len(digests), dtype=bool)
        many = len(digests) >= SORTED
        order = np.argsort(keys) if many else np.arange(len(keys))
        digests, keys = digests[order], keys[order]
        for file in self._likely(digests, keys):
            here = file.find(digests, keys, lasting=lasting) >= 0
            if here.any():
                found[order[here]] = True
                order, digests, keys = order[~here], digests[~here], keys[~here]
            if not len(order):
                break
        return found

    def _likely(self, digests: Digests, keys: NDArray[np.uint64]) -> list[IndexFile]:
        """All files, those first in which most of a sample is: what is looked up together was often stored together.

        And often in the order in which it is looked up. So those that were likely the last time are asked first, and no
        more files once all of the sample is found.
        """
        files = self.files  # another thread may put other ones in their place
        if len(keys) < _SAMPLED:
            return files
        step = len(keys) // _SAMPLE
        digests, keys = digests[::step], keys[::step]
        hits: dict[str, int] = {}
        for file in sorted(files, key=lambda file: file.name not in self._likely_names):
            missing = file.find(digests, keys) < 0
            if not missing.all():
                hits[file.name] = len(keys) - int(np.count_nonzero(missing))
                digests, keys = digests[missing], keys[missing]
            if not len(keys):
                break
        self._likely_names = frozenset(hits)
        return sorted(files, key=lambda file: -hits.get(file.name, 0))

    def locate(self, digests: Digests) -> list[Place | None]:
        """One place for each digest, or ``None``."""
        keys = prefixes(digests)
        places: list[Place | None] = [None] * len(digests)
        for file in self.files:
            rows = file.find(digests, keys)
            hits = np.flatnonzero(rows >= 0)
            taken = file.places[rows[hits]]
            columns = (hits.tolist(), *(taken[f].tolist() for f in ("pack", "offset", "stored", "raw", "codec")))
            for i, pack, offset, stored, raw, codec in zip(*columns, strict=True):
                if places[i] is None:
                    places[i] = Place(file.names[pack], offset, stored, raw, codec)
        return places

    def places(self, digest: bytes) -> Iterator[Place]:
        """Every place where a blob lies; the next is looked for when it is asked for."""
        wanted = np.frombuffer(digest, dtype=np.uint8).reshape(1, 32)
        key = int(prefixes(wanted)[0])
        for file in sorted(self.files, key=lambda file: file is not self._latest):
            for row in file.rows(digest, key):
                self._latest = file
                p = file.places[row]
                yield Place(file.names[p["pack"]], *(int(p[f]) for f in ("offset", "stored", "raw", "codec")))


def stored(storage: Storage, name: str) -> Data:
    """The bytes of an index file, those of a large one when they are asked for. Raises `FileNotFoundError`,
    `DamagedError`."""
    return opened(storage, "index", name, REBUILD)

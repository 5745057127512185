"""Few index files instead of many: every backup adds one, and each look-up looks into all."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import suppress

import numpy as np

from incbak import durable
from incbak.errors import DamagedError, LockedError
from incbak.repo.ids import ids, new_id
from incbak.repo.index import IndexFile, encode, stored
from incbak.repo.seal import Seal
from incbak.repo.storage.base import Storage

FILES = 32
"""Merge when there are more files than this."""
BLOBS = 1 << 20
"""Merge at most so many blobs into one file: 150 MiB of memory at the peak."""
_LOCK = "index.lock"
"""Held by whoever replaces index files: what one has read and writes anew, another must not have changed meanwhile."""
_WAIT = 60.0

durable.declare("prune.index-written")


def merge_small(storage: Storage) -> None:
    """Merge the smallest files into one; the old ones go only after the new one is durable.

    A backup's own new file is never touched, since it was not listed when this began. A file that does not verify is
    left for `check`. Does nothing while another process replaces index files.
    """
    if len(storage.list("index")) > FILES:
        with suppress(LockedError), storage.lock(_LOCK, exclusive=True, wait=0):
            _merge(storage)


def _merge(storage: Storage) -> None:
    sizes = ids(storage.list("index"))
    chosen: list[IndexFile] = []
    total = 0
    for name in sorted(sizes, key=lambda n: sizes[n]):
        with suppress(FileNotFoundError, DamagedError):
            file = _file(storage, name, verify=True)
            if total + len(file) > BLOBS:
                break
            chosen.append(file)
            total += len(file)
    if len(chosen) < 2:
        return
    storage.write("index", new_id(), _merged(chosen, storage.seal))
    for file in chosen:
        storage.remove("index", file.name)


def _file(storage: Storage, name: str, *, verify: bool) -> IndexFile:
    return IndexFile(name, stored(storage, name), verify=verify, seal=storage.seal)


def _merged(files: list[IndexFile], seal: Seal) -> bytes:
    packs: dict[tuple[str, int], int] = {}
    parts, numbers = [], []
    for file in files:
        ours = zip(file.names, file.packs["size"].tolist(), strict=True)
        table = np.array([packs.setdefault(p, len(packs)) for p in ours], dtype=np.uint32)
        pack = file.numbers()
        sound = pack < len(table)
        parts.append(file.entries()[sound])
        numbers.append(table[pack[sound]])
    return encode(list(packs), np.concatenate(numbers), np.concatenate(parts), seal)


def drop_packs(storage: Storage, packs: Collection[str]) -> None:
    """Take ``packs`` out of the index: each file that names one is written anew without it, before the old one goes.

    Raises `LockedError` when somebody else replaces index files for a minute.
    """
    with storage.lock(_LOCK, exclusive=True, wait=_WAIT):
        for name in sorted(ids(storage.list("index"))):
            with suppress(FileNotFoundError, DamagedError):
                if not set(_file(storage, name, verify=False).names) & set(packs):
                    continue
                _write_without(storage, _file(storage, name, verify=True), packs)
                durable.crash_point("prune.index-written")
                storage.remove("index", name)


def _write_without(storage: Storage, file: IndexFile, packs: Collection[str]) -> None:
    stays = np.array([name not in packs for name in file.names], dtype=bool)
    numbers = np.cumsum(stays, dtype=np.uint32) - 1
    table = [
        p for p, kept in zip(zip(file.names, file.packs["size"].tolist(), strict=True), stays, strict=True) if kept
    ]
    for start in range(0, len(file), BLOBS):
        pack = file.numbers(start, start + BLOBS)
        rows = np.flatnonzero(pack < len(stays))
        rows = rows[stays[pack[rows]]]
        if len(rows):
            entries = file.entries(start, start + BLOBS)[rows]
            storage.write("index", new_id(), encode(table, numbers[pack[rows]], entries, storage.seal))

"""Few index files instead of many: every backup adds one, and each look-up looks into all."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from incbak.errors import DamagedError
from incbak.repo.ids import new_id
from incbak.repo.index import IndexFile, encode, mapped
from incbak.repo.storage.base import Storage

FILES = 32
"""Merge when there are more files than this."""
BLOBS = 1 << 20
"""Merge at most so many blobs into one file: 150 MiB of memory at the peak."""


def merge_small(storage: Storage) -> None:
    """Merge the smallest files into one; the old ones go only after the new one is durable.

    Two processes that do this at once leave the same blobs in two files, which is harmless; a backup's own new file
    is never touched, since it was not listed when this began. A file that does not verify is left for `check`.
    """
    sizes = storage.list("index")
    if len(sizes) <= FILES:
        return
    chosen: list[IndexFile] = []
    total = 0
    for name in sorted(sizes, key=lambda n: sizes[n]):
        with suppress(FileNotFoundError, DamagedError):
            file = IndexFile(name, mapped(storage, name), verify=True)
            if total + len(file) > BLOBS:
                break
            chosen.append(file)
            total += len(file)
    if len(chosen) < 2:
        return
    storage.write("index", new_id(), _merged(chosen))
    for file in chosen:
        storage.remove("index", file.name)


def _merged(files: list[IndexFile]) -> bytes:
    packs: dict[tuple[str, int], int] = {}
    parts, numbers = [], []
    for file in files:
        ours = zip(file.names, file.packs["size"].tolist(), strict=True)
        table = np.array([packs.setdefault(p, len(packs)) for p in ours], dtype=np.uint32)
        sound = file.places["pack"] < len(table)
        parts.append(file.entries()[sound])
        numbers.append(table[file.places["pack"][sound]])
    return encode(list(packs), np.concatenate(numbers), np.concatenate(parts))

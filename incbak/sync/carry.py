"""Bringing content from one repository to another, and saying how it is called there."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from incbak.repo.index import Digests
from incbak.repo.reader import BlobReader
from incbak.repo.seal import Seal
from incbak.repo.writer import Writer


class Carry(Protocol):
    """Safe for many threads."""

    def __call__(self, digests: Digests) -> Digests:
        """Have the target store this content of the source; the digests there. Shapes (n, 32); zero stays zero.

        Raises `DamagedError` when the source does not have it whole, `BackupError`, `DurabilityError`.
        """


def carrier(reader: BlobReader, seal: Seal, writer: Writer) -> Carry:
    """From the repository with that ``reader`` and ``seal`` to the one of ``writer``."""
    return _AsStored(reader, writer) if same_names(seal, writer.seal) else _Anew(reader, writer)


def same_names(one: Seal, other: Seal) -> bool:
    """Whether content has the same digest, and is stored in the same way, in both."""
    return not one.encrypted and not other.encrypted


class _AsStored:
    """What the target lacks is copied as it is, verified on the way."""

    def __init__(self, reader: BlobReader, writer: Writer) -> None:
        self._reader, self._writer = reader, writer

    def __call__(self, digests: Digests) -> Digests:
        wanted = np.unique(digests[digests.any(axis=1)], axis=0)
        missing = wanted[~self._writer.have(wanted)] if len(wanted) else wanted
        for row, place, stored in self._reader.stored_many(missing):
            self._writer.add(missing[row].tobytes(), place.codec, bytes(stored), place.raw)
        return digests


class _Anew:
    """Content is opened, and closed under the target's key."""

    def __init__(self, reader: BlobReader, writer: Writer) -> None:
        self._reader, self._writer = reader, writer

    def __call__(self, digests: Digests) -> Digests:
        found = np.zeros_like(digests)
        wanted = np.flatnonzero(digests.any(axis=1))
        for row, data in self._reader.read_many(digests[wanted]):
            if isinstance(data, Exception):
                raise data
            found[wanted[row]] = np.frombuffer(self._writer.add_new(data), dtype=np.uint8)
        return found

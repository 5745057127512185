"""Reading blobs: every one is verified against its digest; another copy is tried before it is called damaged."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from incbak.errors import DamagedError
from incbak.repo import blob
from incbak.repo.index import REBUILD, Digests, Index, Place
from incbak.repo.storage.base import Storage

_GAP = 64 << 10
"""Blobs of one pack are read together when no more than this lies between them."""
_RUN = 4 << 20

_Found = tuple[Place, bytes | memoryview, bytes | memoryview]
"""Where a blob lies, its content, and how it is stored there."""


class BlobReader:
    """Reads blobs by digest. Safe for many threads. ``limit``: no blob may be larger, in bytes, decoded."""

    def __init__(self, storage: Storage, index: Index, limit: int) -> None:
        self._storage, self._index, self.limit = storage, index, limit
        self._seal = storage.seal

    def read(self, digest: bytes) -> bytes | memoryview:
        """One blob. Raises `DamagedError` naming the digest and the pack."""
        return self._anywhere(digest)[1]

    def _anywhere(self, digest: bytes) -> _Found:
        try:
            return self._whole(digest)
        except DamagedError:
            if not self._index.stale():
                raise
        self._index.refresh()  # a prune may have moved it since
        return self._whole(digest)

    def stored(self, digest: bytes, *, besides: Collection[str] = ()) -> tuple[Place, bytes | memoryview]:
        """One blob as it is stored, verified, from a pack that is not one of ``besides``. Raises as `read`."""
        place, _data, stored = self._whole(digest, besides)
        return place, stored

    def _whole(self, digest: bytes, besides: Collection[str] = ()) -> _Found:
        failure: DamagedError | None = None
        for place in self._index.places(digest):
            if place.pack in besides:
                continue
            try:
                stored = self._fetch(place)
                return place, self._verified(digest, place, stored), stored
            except DamagedError as e:
                failure = e
        raise failure or self._not_there(digest)

    def _not_there(self, digest: bytes) -> DamagedError:
        what = f"blob {digest.hex()} is not in the repository"
        if doubt := self._index.doubt:
            return DamagedError(f"{what}, as far as the index says; {doubt}", hint=REBUILD)
        return DamagedError(what, hint="Run: incbak check --read-data")

    def _fetch(self, place: Place) -> bytes:
        return self._range(place.pack, place.offset, place.stored)

    def _range(self, pack: str, offset: int, length: int) -> bytes:
        if length > blob.MAX_BLOB + _RUN:
            raise DamagedError(f"pack {pack}: a blob of {length} bytes cannot be")
        try:
            return self._storage.read_range("packs", pack, offset, length)
        except OSError as e:
            raise DamagedError(f"pack {pack} cannot be read: {e.strerror}") from e

    def _verified(self, digest: bytes, place: Place, stored: bytes | memoryview) -> bytes | memoryview:
        if place.raw > self.limit:
            raise DamagedError(f"blob {digest.hex()} in pack {place.pack} claims {place.raw} bytes")
        try:
            data = self._seal.decode(digest, place.codec, stored, place.raw)
        except DamagedError as e:
            raise DamagedError(f"blob {digest.hex()} in pack {place.pack}: {e}") from e
        if self._seal.digest(data) != digest:
            raise DamagedError(
                f"blob {digest.hex()} in pack {place.pack} does not match its digest",
                hint="Run: incbak check --read-data",
            )
        return data

    def read_many(self, digests: Digests) -> Iterator[tuple[int, bytes | memoryview | DamagedError]]:
        """(row, content) of each digest, in the order in which they lie; damage comes in the place of content.

        Neighbours in a pack are read with one call; every blob is verified.
        """
        for row, found in self._many(digests):
            yield row, found if isinstance(found, DamagedError) else found[1]

    def stored_many(self, digests: Digests) -> Iterator[tuple[int, Place, bytes | memoryview]]:
        """As `read_many`: (row, place, how it is stored there), verified. Raises `DamagedError`."""
        for row, found in self._many(digests):
            if isinstance(found, DamagedError):
                raise found
            yield row, found[0], found[2]

    def _many(self, digests: Digests) -> Iterator[tuple[int, _Found | DamagedError]]:
        places = self._index.locate(digests)
        order = sorted(
            (i for i, place in enumerate(places) if place is not None),
            key=lambda i: (places[i].pack, places[i].offset),  # type: ignore[union-attr]
        )
        for i, place in enumerate(places):
            if place is None:
                yield i, self._again(digests[i].tobytes())
        start = 0
        while start < len(order):
            end = self._run_end(places, order, start)
            yield from self._run(digests, places, order[start:end])
            start = end

    @staticmethod
    def _run_end(places: list[Place | None], order: list[int], start: int) -> int:
        first = places[order[start]]
        assert first
        reach, end = first.offset + first.stored, start + 1
        while end < len(order):
            place = places[order[end]]
            assert place
            if (
                place.pack != first.pack
                or place.offset > reach + _GAP
                or place.offset + place.stored > first.offset + _RUN
            ):
                break
            reach = max(reach, place.offset + place.stored)
            end += 1
        return end

    def _run(
        self, digests: Digests, places: list[Place | None], rows: list[int]
    ) -> Iterator[tuple[int, _Found | DamagedError]]:
        run = [(row, place) for row in rows if (place := places[row])]
        base = run[0][1].offset
        reach = max(place.offset + place.stored for _, place in run)
        try:
            data = memoryview(self._range(run[0][1].pack, base, reach - base))
        except DamagedError:
            data = memoryview(b"")
        for row, place in run:
            digest = digests[row].tobytes()
            stored = data[place.offset - base : place.offset - base + place.stored]
            try:
                yield row, (place, self._verified(digest, place, stored), stored)
            except DamagedError:
                yield row, self._again(digest)

    def _again(self, digest: bytes) -> _Found | DamagedError:
        """Look at every place where it lies, in files that may have come since."""
        try:
            return self._anywhere(digest)
        except DamagedError as e:
            return e


def digests_array(digests: list[bytes]) -> Digests:
    """A list of digests as the array that the index takes."""
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, blob.DIGEST)

"""Parts of clusters on their way to whole ones: in memory up to a bound, then in a bounded, unlinked spool file."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Iterator
from typing import IO

from incbak.errors import BackupError
from incbak.extents import Extent, merge, total

MEMORY = 32 << 20
SPOOL = 4 << 30


class Partials:
    """Collects parts; a cluster is whole when every byte of it came. Later bytes replace earlier ones. Thread safe."""

    def __init__(self, cluster_size: int, size: int, *, memory: int = MEMORY, spool: int = SPOOL) -> None:
        self._step, self._size, self._memory, self._spool_limit = cluster_size, size, memory, spool
        self._lock = threading.Lock()
        self._came: dict[int, list[Extent]] = {}
        self._held: dict[int, bytearray] = {}
        self._spooled: dict[int, int] = {}
        self._free: list[int] = []
        self._spool: IO[bytes] | None = None
        self._slots = 0

    def add(self, offset: int, data: memoryview) -> Iterator[tuple[int, bytes]]:
        """Take a part of any length; yields (cluster number, content) of each cluster that it completes."""
        position = 0
        while position < len(data):
            number, at = divmod(offset + position, self._step)
            piece = data[position : position + self._step - at]
            position += len(piece)
            with self._lock:
                whole = self._take(number, at, piece)
            if whole is not None:
                yield number, whole

    def _length(self, number: int) -> int:
        return min(self._step, self._size - number * self._step)

    def _take(self, number: int, at: int, piece: memoryview) -> bytes | None:
        held = self._load(number)
        held[at : at + len(piece)] = piece
        self._came[number] = merge([*self._came.get(number, []), Extent(at, len(piece))])
        if total(self._came[number]) == self._length(number):
            self._drop(number)
            return bytes(held)
        self._save(number, held)
        return None

    def _load(self, number: int) -> bytearray:
        if number in self._held:
            return self._held[number]
        if number in self._spooled:
            assert self._spool
            self._spool.seek(self._spooled[number] * self._step)
            return bytearray(self._spool.read(self._length(number)))
        return bytearray(self._length(number))

    def _save(self, number: int, held: bytearray) -> None:
        if number in self._held or (number not in self._spooled and (len(self._held) + 1) * self._step <= self._memory):
            self._held[number] = held
            return
        if self._spool is None:
            self._spool = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as this object
        if number not in self._spooled:
            if not self._free and (self._slots + 1) * self._step > self._spool_limit:
                raise BackupError("the engine sends too many parts of clusters", hint="Use smaller clusters.")
            self._spooled[number] = self._free.pop() if self._free else self._slots
            self._slots = max(self._slots, self._spooled[number] + 1)
        try:
            self._spool.seek(self._spooled[number] * self._step)
            self._spool.write(held)
            self._spool.flush()
        except OSError as e:
            raise BackupError(f"cannot spool parts of clusters: {e.strerror}", hint="Free space in TMPDIR.") from e

    def _drop(self, number: int) -> None:
        self._came.pop(number, None)
        self._held.pop(number, None)
        if (slot := self._spooled.pop(number, None)) is not None:
            self._free.append(slot)

    def forget(self, first: int, last: int) -> None:
        """Whole content of these clusters came: parts of them that came before are of no more use."""
        with self._lock:
            few = last - first < len(self._came)
            for number in range(first, last + 1) if few else [n for n in self._came if first <= n <= last]:
                self._drop(number)

    def rest(self) -> list[tuple[int, list[tuple[int, bytes]]]]:
        """What is still in parts: (cluster number, [(offset within it, content)])."""
        with self._lock:
            found = []
            for number in sorted(self._came):
                held = self._load(number)
                found.append((number, [(e.offset, bytes(held[e.offset : e.end])) for e in self._came[number]]))
            return found

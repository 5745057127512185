"""Tables in large files, read piece by piece: what the storage cannot read is an error, at any time.

A page of a mapping that cannot be read is a signal that ends the process without a word, also when all of the file
could be read before: the system drops pages, and sectors fail later. So nothing is mapped. A `Column` looks like the
sorted array that it is in the file, as far as the index needs it, and reads

- all of it for a moment, where most of it would be read anyway;
- once and for good, where it is looked into again and again with a few keys, and `IN_MEMORY` allows it;
- else the blocks of 4 KiB that the keys are in, found by a sample of the column.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError, IncbakError

IN_MEMORY = 64 << 20
"""Bytes of columns that are kept, of all index files together."""
_BLOCK = 512
"""Rows from one sample to the next."""
_SINGLE = 4
"""Keys that are too few to keep a column for them."""
MANY = 1 << 12
"""Keys of which there are so many that the next time they are others."""
_ROWS_A_READ = 2000
"""Rows that are read in the time of one small read."""
_STEP = 1 << 14
"""Rows that are read at once."""
_PIECE = 256 << 10
"""Bytes that are read at once, where all are looked at: the cache of a processor has room for them."""

_kept = 0
_lock = threading.RLock()  # what a finalizer takes may be held by the same thread


class StoredBytes:
    """A file that is open for reading; slices of it are read when they are asked for. Safe for many threads.

    ``error``: what is raised where it cannot be read; `DamagedError` while it is looked at whether it can be used.
    """

    def __init__(self, fd: int, kind: str, name: str, hint: str = "") -> None:
        """Owns ``fd``."""
        self._fd, self._what, self._hint = fd, f"{kind} {name}", hint
        self.error: type[IncbakError] = DamagedError
        self._size = os.fstat(fd).st_size
        weakref.finalize(self, os.close, fd)

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> NDArray[np.uint8]:
        start, end, _ = part.indices(self._size)
        return self.read(start, max(end - start, 0), np.dtype(np.uint8))

    def read(self, offset: int, count: int, kind: np.dtype[Any]) -> NDArray[Any]:
        """``count`` records at ``offset``. Raises ``error`` naming the file."""
        found = np.empty(count, dtype=kind)
        self.read_into(_bytes_of(found), offset)
        return found

    def pieces(self, start: int) -> Iterator[memoryview]:
        """Yield all from ``start`` on; each piece is valid until the next one. Raises ``error`` naming the file."""
        buffer = memoryview(bytearray(min(_PIECE, max(self._size - start, 0))))
        for at in range(start, self._size, _PIECE):
            piece = buffer[: self._size - at]
            self.read_into(piece, at)
            yield piece

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer. Raises ``error`` naming the file."""
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise self.error(f"{self._what} cannot be read: {e.strerror}", hint=self._hint) from e
            if not count:
                raise self.error(f"{self._what} is cut off", hint=self._hint)
            done += count


class Column:
    """``count`` records of one type, one after the other in a file. Safe for many threads."""

    def __init__(self, source: StoredBytes, kind: np.dtype[Any], count: int, offset: int) -> None:
        self._source, self.dtype, self._count, self._offset = source, kind, count, offset
        self._sample: NDArray[Any] | None = None
        self._whole: NDArray[Any] | None = None

    def __len__(self) -> int:
        return self._count

    def near(self, number: int) -> NDArray[Any] | Column:
        """Return what is quickest where so many rows are looked for at once; both can be used alike."""
        if self._whole is None and _SINGLE < number < MANY:
            self._keep()
        if self._whole is not None:
            return self._whole
        return self[:] if number * _ROWS_A_READ >= self._count else self

    def _keep(self) -> None:
        global _kept
        size = self._count * self.dtype.itemsize
        if _kept + size > IN_MEMORY:
            return
        whole = self[:]
        with _lock:
            if self._whole is None and _kept + size <= IN_MEMORY:
                _kept += size
                self._whole = whole
                weakref.finalize(self, _forget, size)

    def searchsorted(self, wanted: NDArray[Any], side: Any = "left") -> NDArray[np.int64]:
        """As that of a sorted array."""
        if self._whole is not None:
            return self._whole.searchsorted(wanted, side)
        if self._sample is None:
            self._sample = self._sampled()
        blocks = np.maximum(self._sample.searchsorted(wanted, side) - 1, 0)
        found = np.zeros(len(wanted), dtype=np.int64)
        for block in np.unique(blocks).tolist() if self._count else ():
            ours = np.flatnonzero(blocks == block)
            found[ours] = block * _BLOCK + self[block * _BLOCK : (block + 1) * _BLOCK].searchsorted(wanted[ours], side)
        return found

    def span(self, key: Any) -> tuple[int, int]:
        """The rows, from the first to behind the last, that are ``key``; of a sorted column, by one read mostly."""
        if self._whole is not None:
            return int(self._whole.searchsorted(key, "left")), int(self._whole.searchsorted(key, "right"))
        if self._sample is None:
            self._sample = self._sampled()
        first = max(int(self._sample.searchsorted(key, "left")) - 1, 0) * _BLOCK
        block = self[first : first + _BLOCK]
        start, end = int(block.searchsorted(key, "left")), int(block.searchsorted(key, "right"))
        if end < len(block) or first + end >= self._count:
            return first + start, first + end
        return first + start, int(self.searchsorted(np.array([key], dtype=self.dtype), "right")[0])

    def _sampled(self) -> NDArray[Any]:
        """The first row of each block."""
        parts = [self[start : start + _STEP][::_BLOCK] for start in range(0, self._count, _STEP)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=self.dtype)

    def __getitem__(self, rows: Any) -> Any:
        """A row, a slice without steps, or rows by an array of numbers. Raises `IndexError`, or as `StoredBytes`."""
        if self._whole is not None:
            return self._whole[rows]
        if isinstance(rows, slice):
            start, end, _ = rows.indices(self._count)
            return self._source.read(self._at(start), max(end - start, 0), self.dtype)
        if isinstance(rows, np.ndarray):
            return self._rows(rows)
        if not 0 <= rows < self._count:
            raise IndexError(rows)
        return self._source.read(self._at(rows), 1, self.dtype)[0]

    def fields(self, rows: NDArray[np.int64], *names: str) -> list[NDArray[Any]]:
        """Of these rows only some fields, each as an array."""
        if self._whole is not None or not self._dense(rows):
            found = self[rows]
            return [found[name] for name in names]
        fields = [np.empty(len(rows), dtype=self.dtype[name]) for name in names]
        for part, ours, here in self._pieces(rows):
            for name, field in zip(names, fields, strict=True):
                field[ours] = part[name][here]
        return fields

    def _dense(self, rows: NDArray[np.int64]) -> bool:
        """Whether it is quicker to read all of it than these rows one by one."""
        return len(rows) * _ROWS_A_READ >= self._count * self.dtype.itemsize // 8

    def _pieces(self, rows: NDArray[np.int64]) -> Iterator[tuple[NDArray[Any], NDArray[np.int64] | slice, Any]]:
        """Pieces of the column in which any of the rows are; which of the rows these are; and where in the piece.

        A piece is valid until the next one.
        """
        ordered = bool((rows[1:] >= rows[:-1]).all())
        order = np.zeros(0, dtype=np.int64) if ordered else np.argsort(rows, kind="stable")
        rows = rows if ordered else rows[order]
        buffer = np.empty(min(_STEP, self._count), dtype=self.dtype)
        for start in range(0, self._count, _STEP):
            first, end = np.searchsorted(rows, (start, start + _STEP)).tolist()
            if first < end:
                which = slice(first, end) if ordered else order[first:end]
                piece = buffer[: self._count - start]
                self._source.read_into(_bytes_of(piece), self._at(start))
                yield piece, which, rows[first:end] - start

    def _rows(self, rows: NDArray[np.int64]) -> NDArray[Any]:
        found = np.empty(len(rows), dtype=self.dtype)
        if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < self._count:
            raise IndexError("row")
        if not self._dense(rows):
            size = self.dtype.itemsize
            into = _bytes_of(found)
            for number, row in enumerate(rows.tolist()):
                self._source.read_into(into[number * size : (number + 1) * size], self._at(row))
            return found
        for part, ours, here in self._pieces(rows):
            found[ours] = part[here]
        return found

    def _at(self, row: int) -> int:
        return self._offset + row * self.dtype.itemsize


Data = NDArray[np.uint8] | StoredBytes


def column(data: Data, kind: np.dtype[Any], count: int, offset: int) -> Any:
    """Return what can be used as an array of that many records."""
    if isinstance(data, StoredBytes):
        return Column(data, kind, count, offset)
    return np.frombuffer(data, dtype=kind, count=count, offset=offset)


def span(keys: Any, key: np.uint64) -> tuple[int, int]:
    """As `Column.span`, also of an array."""
    if isinstance(keys, Column):
        return keys.span(key)
    return int(keys.searchsorted(key, "left")), int(keys.searchsorted(key, "right"))


def near(keys: Any, number: int) -> Any:
    """As `Column.near`, also of an array."""
    return keys.near(number) if isinstance(keys, Column) else keys


def _bytes_of(array: NDArray[Any]) -> memoryview:
    return memoryview(array.view(np.uint8)) if len(array) else memoryview(b"")  # type: ignore[arg-type]


def _forget(size: int) -> None:
    global _kept
    with _lock:
        _kept -= size

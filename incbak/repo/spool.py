"""Room for what is too much for memory: an unlinked file, gone with the process."""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DurabilityError

_IN_MEMORY = 16 << 20
"""Bytes of arrays that stay in memory."""


def spool_file() -> IO[bytes]:
    """An unlinked file to write and read; in ``/var/tmp``, since ``/tmp`` may itself be memory. Raises `OSError`."""
    directory = None if os.environ.get("TMPDIR") or not os.path.isdir("/var/tmp") else "/var/tmp"
    return tempfile.TemporaryFile(dir=directory)


class Spool:
    """Arrays that are written once: in memory while they are few, then in a file, mapped."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._size = 0

    def put(self, array: NDArray[Any]) -> NDArray[Any]:
        """The same array, to be kept from now on. Raises `DurabilityError`."""
        self._size += array.nbytes
        if self._size <= _IN_MEMORY or not len(array):
            return array
        try:
            if self._file is None:
                self._file = spool_file()
            at = self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as e:
            what = f"cannot write a temporary file: {e.strerror}"
            raise DurabilityError(what, hint="Free space in /var/tmp, or name another folder in TMPDIR.") from e
        return np.memmap(self._file, dtype=array.dtype, mode="r", offset=at, shape=array.shape)


def let_go(array: NDArray[Any]) -> None:
    """Of a mapped array nothing need stay in this process; the system may keep it."""
    if isinstance(array, np.memmap):
        array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

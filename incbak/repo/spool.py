"""Room for what is too much for memory: an unlinked file, gone with the process."""

from __future__ import annotations

import os
import tempfile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DurabilityError, StorageError
from incbak.repo.columns import Column, StoredBytes

_IN_MEMORY = 16 << 20
"""Bytes of arrays that stay in memory."""
_HINT = "Free space in /var/tmp and look at its storage, or name another directory in TMPDIR."


def spool_file() -> IO[bytes]:
    """An unlinked file to write and read; in ``/var/tmp``, since ``/tmp`` may itself be memory. Raises `OSError`."""
    directory = None if os.environ.get("TMPDIR") or not os.path.isdir("/var/tmp") else "/var/tmp"
    return tempfile.TemporaryFile(dir=directory)


class Spool:
    """Arrays that are written once: in memory while they are few, then in a file."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._stored: StoredBytes | None = None
        self._size = 0

    def put(self, array: NDArray[Any]) -> NDArray[Any] | Column:
        """Return what has the content of ``array`` from now on. Raises `DurabilityError`."""
        self._size += array.nbytes
        if self._size <= _IN_MEMORY or not len(array):
            return array
        try:
            if self._file is None or self._stored is None:
                self._file = spool_file()
                self._stored = StoredBytes(os.dup(self._file.fileno()), "temporary", "file", _HINT)
                self._stored.error = StorageError
            at = self._file.seek(0, os.SEEK_END)
            self._file.write(np.ascontiguousarray(array).data)
            self._file.flush()
        except OSError as e:
            what = f"cannot write a temporary file: {e.strerror}"
            raise DurabilityError(what, hint=_HINT) from e
        return Column(self._stored, array.dtype, len(array), at)

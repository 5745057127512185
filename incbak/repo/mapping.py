"""Reading files that are large: index files piece by piece (`columns`), others mapped.

Nothing is mapped before all of it could be read.

A page of a mapping that the storage cannot read is no error but a signal that ends the process. So a file is read once
with ``pread``, where it is an error, and what is small stays in memory. A large one is mapped after that: what was read
is in the cache of the system then, and only a sector that fails later, after its page was dropped, still ends the
process.
"""

from __future__ import annotations

import os

import numpy as np
from numpy.typing import NDArray

from incbak.errors import DamagedError
from incbak.repo.columns import StoredBytes
from incbak.repo.storage.base import Storage

IN_MEMORY = 1 << 20
_LARGEST = 1 << 34
_PIECE = 1 << 20


def opened(storage: Storage, kind: str, name: str, hint: str = "") -> NDArray[np.uint8] | StoredBytes:
    """As `readable`, of a file that is never mapped: a large one is read when slices of it are asked for."""
    try:
        path = storage.path(kind, name)
        if path is None:
            return readable(storage, kind, name)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        found = StoredBytes(fd, kind, name, hint)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise DamagedError(f"{kind} {name} cannot be read: {e.strerror}") from e
    if not len(found):
        raise DamagedError(f"{kind} {name} is empty")
    return found if len(found) > IN_MEMORY else found[:]


def readable(storage: Storage, kind: str, name: str) -> NDArray[np.uint8]:
    """The bytes of a file. Raises `FileNotFoundError`; `DamagedError` for one that is empty or cannot be read."""
    try:
        data = _readable(storage, kind, name)
    except FileNotFoundError:
        raise
    except OSError as e:
        raise DamagedError(f"{kind} {name} cannot be read: {e.strerror}") from e
    if not len(data):
        raise DamagedError(f"{kind} {name} is empty")
    return data


def _readable(storage: Storage, kind: str, name: str) -> NDArray[np.uint8]:
    path = storage.path(kind, name)
    if path is None:
        return np.frombuffer(storage.read(kind, name, _LARGEST), dtype=np.uint8)
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb", buffering=0) as file:
        size = os.fstat(file.fileno()).st_size
        piece = bytearray(min(size, _PIECE) + 1)
        count = file.readinto(piece) or 0
        if count == size <= IN_MEMORY:
            return np.frombuffer(bytes(piece[:count]), dtype=np.uint8)
        while file.readinto(piece):
            pass
        return np.memmap(file, dtype=np.uint8, mode="r")

"""Reading files that are large: piece by piece (`columns`), and small ones at once. Nothing is mapped.

A page of a mapping that the storage cannot read is no error but a signal that ends the process.
"""

from __future__ import annotations

import os

import numpy as np

from incbak.errors import DamagedError, StorageError
from incbak.repo.columns import Data, StoredBytes
from incbak.repo.storage.base import LACKING, Storage, hint_for

IN_MEMORY = 1 << 20
_LARGEST = 1 << 34


def opened(storage: Storage, kind: str, name: str, hint: str = "") -> Data:
    """Return the bytes of a file, those of a large one when slices of it are asked for.

    Raises `FileNotFoundError`; `DamagedError` for one that is empty or cannot be read.
    """
    found: Data
    try:
        path = storage.path(kind, name)
        if path is None:
            found = np.frombuffer(storage.read(kind, name, _LARGEST), dtype=np.uint8)
        else:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            found = StoredBytes(fd, kind, name, hint)
    except FileNotFoundError:
        raise
    except OSError as e:
        if e.errno in LACKING:
            raise StorageError(f"{kind} {name} cannot be read: {e.strerror}", hint=hint_for(e)) from e
        raise DamagedError(f"{kind} {name} cannot be read: {e.strerror}") from e
    if not len(found):
        raise DamagedError(f"{kind} {name} is empty")
    return found if len(found) > IN_MEMORY else found[:]

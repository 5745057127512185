"""Where a repository keeps its files: the interface, with what each method must do.

Files are immutable: they appear whole and durable, are read, and are removed. A *kind* is a flat folder. Names are
checked by the caller (`ids.is_id`) and never come from outside unchecked.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path

from incbak.repo.seal import Seal

LATER = ("pins", "condemned", "verified", "drills", "keys", "needs", "removed")
KINDS = ("packs", "index", "backups", "damaged", "locks", *LATER)
"""Kinds that an older repository may lack: there are none of these files, and the first one makes the folder."""


LACKING = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})
"""What this process lacks: such an error says nothing of a file."""


def hint_for(error: OSError) -> str:
    """Return what to do where a file cannot be opened or read."""
    if error.errno == errno.ENOMEM:
        return "Free memory, or raise the limits of this process: ulimit -v, or MemoryMax= in a systemd unit."
    if error.errno in LACKING:
        return "Raise the limits of this process: ulimit -n, or LimitNOFILE= in a systemd unit."
    return "Look at the storage, and at the permissions."


class Stream(ABC):
    """A file being written; nobody sees it before `commit`."""

    @abstractmethod
    def append(self, pieces: Iterable[bytes | memoryview]) -> int:
        """Write all pieces at the end; the file's size afterwards. Raises `DurabilityError`: then `abort`."""

    @abstractmethod
    def commit(self, name: str) -> None:
        """The file is durable under ``name`` when this returns. Raises `DurabilityError`; called once."""

    @abstractmethod
    def abort(self) -> None:
        """Forget the file; idempotent; does nothing after `commit`."""


class Storage(ABC):
    """Safe for many threads and many processes. Small files of the kinds in `SEALED` are closed by ``seal`` when they
    are written and opened when they are read; all others are as the caller gives them."""

    seal: Seal

    @abstractmethod
    def list(self, kind: str) -> dict[str, int]:
        """Names and sizes of the committed files of a kind. Complete for what was committed before the call.

        What has a name there and is no plain file is listed too, with the size 0: it cannot be read, and is not absent.
        """

    @abstractmethod
    def read(self, kind: str, name: str, limit: int) -> bytes:
        """A whole file. Raises `FileNotFoundError`, or `DamagedError` if it is larger than ``limit`` bytes, or does not
        open with the seal."""

    @abstractmethod
    def read_range(self, kind: str, name: str, offset: int, length: int) -> bytes:
        """Up to ``length`` bytes; fewer only at the file's end. Raises `FileNotFoundError`, `OSError`."""

    @abstractmethod
    def path(self, kind: str, name: str) -> Path | None:
        """A local path to map into memory; ``None`` where the storage has none and the file must be read."""

    @abstractmethod
    def write(self, kind: str, name: str, data: bytes) -> None:
        """A small durable file. Raises `FileExistsError` when the name is taken, `DurabilityError`."""

    @abstractmethod
    def stream(self, kind: str) -> Stream:
        """A new file of unknown size. Raises `DurabilityError`."""

    @abstractmethod
    def remove(self, kind: str, name: str) -> None:
        """Gone durably; no error when it was not there."""

    @abstractmethod
    def remove_all(self, kind: str, names: Iterable[str]) -> None:
        """As `remove`, for many at once; needs no space."""

    @abstractmethod
    def settle(self) -> None:
        """Let what was removed make room, as far as the storage can be told to. Never raises."""

    @abstractmethod
    def lock(self, name: str, *, exclusive: bool, wait: float) -> AbstractContextManager[None]:
        """Hold a lock that dies with this process. Raises `LockedError` after ``wait`` seconds."""

    @abstractmethod
    def close(self) -> None:
        """Release what is open."""

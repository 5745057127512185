"""An engine as the runner sees it: what serves a VM's disks and can push a point in time of them to targets.

The runner decides what is read (`DiskPlan`); an engine knows how its kind of process does it. One engine object serves
one run. Whatever an engine leaves behind carries our prefix in its name, so that the next run finds and removes it.
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from incbak.reasons import Reason


@dataclass(frozen=True)
class BitmapInfo:
    """One bitmap of a disk, as its engine reports it. ``count``: dirty bytes, of no meaning when ``inconsistent``.

    ``reason`` says why it is inconsistent, where the engine knows; ``found`` how it came through the last end of its
    engine (``clean``, ``recovered``, ``coarse``), or is empty.
    """

    name: str
    granularity: int
    count: int
    recording: bool = True
    busy: bool = False
    persistent: bool = True
    inconsistent: bool = False
    reason: Reason | None = None
    found: str = ""


@dataclass(frozen=True)
class EngineDisk:
    """A disk that can be backed up. ``node`` and ``device`` are the engine's own names for it."""

    name: str
    size: int
    node: str
    device: str = ""
    format: str = "raw"
    can_persist: bool = True
    bitmaps: tuple[BitmapInfo, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def bitmap(self, name: str) -> BitmapInfo | None:
        """The bitmap of that name."""
        return next((b for b in self.bitmaps if b.name == name), None)


@dataclass(frozen=True)
class Description:
    """What an engine says of its VM. ``config`` goes into the backup record as it is; ``notes`` are for the user."""

    vm: str | None
    disks: tuple[EngineDisk, ...]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class DiskPlan:
    """What to do with one disk: add ``new_bitmap``, copy all (``base_bitmap`` of ``None``) or what that one marks."""

    disk: EngineDisk
    new_bitmap: str
    base_bitmap: str | None
    granularity: int


@dataclass(frozen=True)
class DiskResult:
    """How a disk's job ended. ``copied``: the bytes that the job says it sent, ``None`` where it does not say exactly."""

    copied: int | None
    error: str | None = None


class Target(Protocol):
    """Where one disk's content goes; provided by the runner."""

    name: str
    size: int

    def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        """Content, from within this process; ``owned``: the buffer is given away."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes, from within this process."""

    def flush(self) -> None:
        """All is sent, from within this process."""

    def address(self) -> tuple[Path, str]:
        """A private Unix socket and the export's name there, for engines that connect by path."""

    def socket(self) -> socket.socket:
        """The engine's end of a new connection to an NBD server that exports this target; the caller closes it."""


Copied = Callable[[str, int, int], None]
"""Called with disk, bytes done, bytes in all, while jobs run."""


class Engine(ABC):
    """One run's way to a VM's disks. Methods are called in the order in which they stand here; `close` always."""

    kind: str

    @abstractmethod
    async def describe(self) -> Description:
        """Look at the disks; changes nothing. Raises `EngineError`, `ImageInUseError`."""

    @abstractmethod
    async def cleanup(self, prefix: str, keep: set[str]) -> list[str]:
        """Remove what dead runs left: jobs, nodes and filters named after ``prefix``, and bitmaps with the prefix that
        are not in ``keep``. Touches nothing else; says in words what it removed. May be called twice.
        """

    @abstractmethod
    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], copied: Copied
    ) -> dict[str, DiskResult]:
        """All disks at one instant: new bitmaps record from it on, and jobs copy what the disks held at it.

        Returns when all jobs have ended, with a result for each disk. Raises `EngineError` when it could not start;
        then nothing of it is left. Cancelled: nothing is left but, perhaps, what `rollback` removes.
        """

    @abstractmethod
    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        """The backup is durable: give up the base bitmaps. Idempotent; a failure is only a leftover."""

    @abstractmethod
    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        """The backup failed: remove the new bitmaps and all else of this run; the bases keep recording. Idempotent."""

    @abstractmethod
    async def close(self) -> None:
        """Let go; idempotent; raises nothing."""

"""What the runner sees of any engine: one object per run of one VM.

The order of calls is the safety of a backup; the runner keeps to it:

1. `Engine.describe`: the disks and their bitmaps. Changes nothing.
2. `Engine.cleanup`: what dead runs of this repository have left goes; somebody else's things are never touched.
3. `Engine.run`: the new bitmaps first, then the point in time of all disks, then the copies. When it raises, everything
   that it set up is gone again, the new bitmaps too, as far as the engine still answers.
4. `Engine.confirm`, and the runner commits to the repository.
5. `Engine.commit`: only now the older bitmaps of this repository go. Or `Engine.rollback`: the new ones go; the base's
   bitmaps have kept recording and still hold everything.
"""

from __future__ import annotations

import re
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from incbak.errors import EngineError
from incbak.reasons import Reason

PREFIX = "incbak"
_BITMAP = re.compile(f"({PREFIX}-[0-9a-f]{{8}}-[0-9a-f]{{8}})(?:-[0-9a-f]{{8}})?")
_END_MARK = "-end"

ProgressCallback = Callable[[str, int, int], None]  # disk, bytes done, bytes in all


def run_name(repository: str, backup: str) -> str:
    """Return ``incbak-<repository id>-<backup id>``, eight hex digits each: how all names of one run begin."""
    return f"{PREFIX}-{repository}-{backup}"


def bitmap_name(run: str, disk: str) -> str:
    """Return the run's name with eight hex digits of the digest of the disk's name.

    So the bitmap of one disk is never taken for that of another, when a VM starts with its images exchanged.
    """
    return f"{run}-{blake3(disk.encode(errors='surrogatepass')).hexdigest()[:8]}"


def run_of(bitmap: str) -> str:
    """Return the run of a bitmap; earlier versions gave the bitmaps of all disks its name. Other names stay."""
    found = _BITMAP.fullmatch(bitmap.removesuffix(_END_MARK))
    return found[1] if found else bitmap


def end_mark_of(bitmap: str) -> str:
    """Return the name of a bitmap's end mark: see `incbak.engine.end_mark`."""
    return bitmap + _END_MARK


def is_bitmap_name(name: str) -> bool:
    """Return whether ``name`` is that of a bitmap of a backup."""
    return _BITMAP.fullmatch(name) is not None


def repository_prefix(repository: str) -> str:
    """What the names of all things of one repository in an engine begin with."""
    return f"{PREFIX}-{repository}-"


def superseded(plan: DiskPlan) -> list[str]:
    """The bitmaps of the same repository on the plan's disk that the new one replaces, once the backup exists."""
    prefix = plan.run.rpartition("-")[0] + "-"
    return [b.name for b in plan.disk.bitmaps if b.name.startswith(prefix) and run_of(b.name) != plan.run]


@dataclass(frozen=True)
class BitmapInfo:
    """One bitmap as its engine reports it. ``count`` is in bytes; it says nothing unless the bitmap is `sound`."""

    name: str
    granularity: int
    count: int
    recording: bool = True
    busy: bool = False
    persistent: bool = False
    inconsistent: bool = False
    reason: Reason | None = None  # why it is invalid, where the engine knows
    found: str = ""  # how it survived: clean, recovered, coarse, created; empty where the engine does not say
    path: str = ""  # its file, where it is one of ours
    provisional: bool = False  # of a device that was set up anew: believed only after a sample

    def trouble(self, granularity: int, *, sampling: bool = False) -> Reason | None:
        """Why an incremental cannot build on it, or ``None``. A ``count`` of 0 does not mean that nothing changed.

        ``sampling``: a provisional bitmap is looked at closer before it is built on.
        """
        if self.reason is not None:
            return self.reason
        if self.inconsistent:
            return Reason.BITMAP_INCONSISTENT
        if self.busy:
            return Reason.BITMAP_BUSY
        if not self.recording:
            return Reason.BITMAP_DISABLED
        if self.provisional and not sampling:
            return Reason.UNPROVEN
        return Reason.GRANULARITY if self.granularity != granularity else None


DECRYPTED = ", decrypted"
"""Ends the format of a disk whose engine has the key of its image."""


@dataclass(frozen=True)
class EngineDisk:
    """One disk that can be backed up. ``name`` is stable over restarts; ``node`` is where its bitmaps are."""

    name: str
    size: int
    node: str
    device: str = ""
    format: str = "raw"
    can_persist: bool = False
    bitmaps: tuple[BitmapInfo, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def bitmap(self, name: str) -> BitmapInfo | None:
        """The bitmap of that name."""
        return next((b for b in self.bitmaps if b.name == name), None)

    def was_cut(self, name: str) -> bool:
        """Return whether the disk has been shorter since the bitmap ``name`` began; only an end mark shows it."""
        mark = self.bitmap(end_mark_of(name))
        return mark is not None and not mark.inconsistent and mark.count == 0


@dataclass(frozen=True)
class LeftOut:
    """A disk that is not backed up, and why: for ``incbak doctor`` and for the notes of a run.

    ``expected``: nobody would look for it in a backup (a drive without a medium, a CD), so no run warns of it.
    """

    name: str
    why: str
    expected: bool = False


@dataclass(frozen=True)
class Description:
    """What an engine has. ``config`` is any JSON: what else a restore needs, for the backup record.

    ``peer``: the process that made the monitor's socket, where it tells; not always the engine.
    """

    vm: str | None
    disks: tuple[EngineDisk, ...]
    engine: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    peer: int | None = None


@dataclass
class DiskPlan:
    """What is to be done with one disk. Without ``base_bitmap`` everything is read, because of ``reason``."""

    disk: EngineDisk
    new_bitmap: str
    granularity: int
    base_bitmap: str | None = None
    reason: Reason | None = None

    @property
    def run(self) -> str:
        """How the names of the run's jobs and nodes begin, which are short in QEMU."""
        return run_of(self.new_bitmap)


class Target(Protocol):
    """Where the clusters of one disk go. The three writes are called from any thread and may block."""

    size: int

    def write(self, offset: int, view: memoryview, *, owned: bool = False) -> None:
        """Take the bytes; the caller may reuse them afterwards, unless it gives the buffer away (``owned``)."""

    def write_zeroes(self, offset: int, length: int) -> None:
        """The range reads as zeroes."""

    def flush(self) -> None:
        """Everything so far has been taken in."""

    def serve(self, sock: socket.socket) -> None:
        """Take over a connected socket with an NBD client at the other end."""

    def address(self) -> tuple[Path, str]:
        """A Unix socket in a private directory, and the export's name there."""


@dataclass(frozen=True)
class DiskResult:
    """How the copy of one disk went: the bytes the job says it copied, or why it failed."""

    copied: int = 0
    error: str | None = None


@dataclass(frozen=True)
class RunResult:
    """How `Engine.run` went.

    ``frozen``: whether the guest's file systems were frozen at the point in time; ``None``: that was not asked for.
    ``left``: what of ours could not be taken out of the engine again, in words; the backup is not worse for it.
    """

    disks: Mapping[str, DiskResult]
    frozen: bool | None = None
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()


@dataclass(frozen=True)
class Leftover:
    """What a backup run has in an engine. ``run``: how the names of its nodes and jobs begin; ``repository``: the
    first digits of its id. ``at_work``: it has a job that has not ended."""

    run: str
    repository: str
    nodes: tuple[str, ...]
    at_work: bool

    def __str__(self) -> str:
        return f"{self.run} ({len(self.nodes)} nodes)"


class Engine(ABC):
    """A process that serves disks and takes commands, or an image that nobody has open. Raises `EngineError`."""

    kind: str = ""

    @abstractmethod
    async def describe(self) -> Description:
        """The disks of the VM with their bitmaps. Changes nothing."""

    @abstractmethod
    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        """Remove jobs, filters, nodes and bitmaps whose names begin with ``prefix``, not bitmaps of runs in ``keep``.

        The caller holds the VM's lock in the repository, so whatever has the prefix belongs to a dead run. Returns what
        was removed, for people. Call `describe` again afterwards.
        """

    @abstractmethod
    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        """New bitmaps, the point in time of all ``plans`` at one instant, and the copies into ``targets``.

        ``targets`` and the result go by disk name. A disk whose copy fails has its error in the result; what concerns
        all disks raises.
        """

    async def confirm(self) -> None:  # noqa: B027
        """Look once more, before the runner commits. Raises `EngineError` where the disks are not the engine's now."""

    @abstractmethod
    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        """The backup exists: of this repository's bitmaps on these disks only the new ones stay."""

    @abstractmethod
    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        """There is no backup: the new bitmaps go, as far as the engine still answers."""

    async def bitmaps(self) -> list[tuple[EngineDisk, BitmapInfo]]:
        """Return all bitmaps, also those on nodes that no backup reads. Changes nothing."""
        return [(disk, bitmap) for disk in (await self.describe()).disks for bitmap in disk.bitmaps]

    async def leftovers(self) -> list[Leftover]:
        """Return the backup runs that have something in the engine, at work or dead. Changes nothing."""
        return []

    async def remove_bitmaps(self, bitmaps: Sequence[tuple[EngineDisk, str]]) -> None:
        """Remove bitmaps by name, beside no job of a backup. Raises `EngineError` or `DiskError`."""
        raise EngineError(f"bitmaps of {self.kind} are not removed by name")

    async def invalidate(self, disk: EngineDisk, name: str, reason: Reason) -> None:
        """Make it durable that the bitmap ``name`` of ``disk`` is wrong. It stays, to tell the reason.

        Raises `EngineError` or `BitmapError` where that fails. An engine that cannot keep a reason removes the bitmap.
        """
        await self.rollback([DiskPlan(disk, name, 0)])

    async def close(self) -> None:  # noqa: B027
        """Let go of the engine. May be called at any time, more than once."""

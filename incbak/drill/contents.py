"""What is on a disk, and which of it is copied out to be checked."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from incbak.drill import fsck
from incbak.drill.partitions import Part, TableError, partitions
from incbak.drill.scratch import Scratch
from incbak.errors import DamagedError
from incbak.export.image import BackupImage
from incbak.files import systems
from incbak.repo.drills import SystemDrill
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT
from incbak.units import format_size

_USED = 0.9
"""Of the free space: the host needs some too."""
_SILENT = ("empty", "swap")


@dataclass(frozen=True)
class Content:
    """A file system; ``scratch`` is where it goes to be checked, and ``why`` it does not."""

    part: Part
    system: str
    scratch: Scratch | None
    why: str = ""


def contents(
    repo: Repository, record: Record, disk: DiskRecord, directory: Path, stack: ExitStack
) -> tuple[list[Content], list[str]]:
    """The file systems of a disk, with a `Scratch` for each that can be checked, closed by ``stack``; and problems.

    Raises `DiskError` when there can be no file in ``directory``.
    """
    image = BackupImage(repo, record, disk)
    try:
        parts = partitions(lambda at, length: _read(image, at, length), disk.size)
        heads = [_read(image, part.start, min(systems.HEAD, part.length)) for part in parts]
    except TableError as e:
        return [], [f"disk {disk.name}: {e}"]
    except OSError:
        return [], []  # damage: whoever proves the data says so
    room = _Room(repo, record, disk, directory)
    found = []
    for part, head in zip(parts, heads, strict=True):
        name = systems.recognise(head).name
        if name in _SILENT or (name == "unknown" and not part.number):
            continue
        why = fsck.checkable(name) or room.take(part)
        scratch = None
        if not why:
            scratch = Scratch(part, directory)
            stack.callback(scratch.close)
        found.append(Content(part, name, scratch, why))
    return found, []


def _read(image: BackupImage, offset: int, length: int) -> bytes:
    buf = bytearray(length)
    if length:
        image.read_into(memoryview(buf), offset)
    return bytes(buf)


class _Room:
    """The space in a directory, given away by the data in each partition: holes take none."""

    def __init__(self, repo: Repository, record: Record, disk: DiskRecord, directory: Path) -> None:
        self._repo, self._record, self._disk = repo, record, disk
        self._directory = directory
        self._left = int(shutil.disk_usage(directory).free * _USED) if directory.is_dir() else 0
        self._there: NDArray[np.bool_] | None = None

    def take(self, part: Part) -> str:
        """Why there is no room; empty if there is."""
        step = self._record.cluster_size
        there = self._clusters()
        needs = int(there[part.start // step : -(-(part.start + part.length) // step)].sum()) * step
        if needs > self._left and self._directory.is_dir():
            return f"it needs {format_size(needs)} in {self._directory}, there is room for {format_size(self._left)}"
        self._left -= needs
        return ""

    def _clusters(self) -> NDArray[np.bool_]:
        """Which clusters have data."""
        if self._there is None:
            tree = self._repo.tree(self._disk, self._record.cluster_size)
            self._there = np.zeros(tree.clusters, dtype=bool)
            try:
                for number, leaf in tree.leaves():
                    rows = self._there[number * FANOUT : (number + 1) * FANOUT]
                    rows[:] = np.asarray(tree.page(leaf).any(axis=1))[: len(rows)]
            except DamagedError:
                self._there[:] = True
        return self._there


def judged(disk: str, found: Sequence[Content]) -> list[SystemDrill]:
    """What the tools say, now that the scratches hold what was restored."""
    rows = []
    for content in found:
        verdict = fsck.Verdict(fsck.UNCHECKED, content.why)
        if content.scratch:
            verdict = fsck.check(content.system, content.scratch)
        number = content.part.number
        rows.append(SystemDrill(disk=disk, partition=number, name=content.system, state=verdict.state, why=verdict.why))
    return rows

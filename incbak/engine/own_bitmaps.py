"""The bitmaps that incbak has made, wherever an engine has them: also those of repositories that are gone.

A backup looks only at the disks that it reads and at the bitmaps of its own repository. What else has a name of ours is
kept and recorded by nobody's wish, for ever: here it is listed, on any node, and removed by name. Bitmaps with other
names belong to other programs and are not touched. Nothing is removed beside a job of a backup, and from an image that
is off only where a backup would write to it: see `incbak.engine.private_daemon`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from incbak.engine.base import PREFIX, BitmapInfo, Engine, EngineDisk, end_mark_of
from incbak.errors import BitmapError, UsageError

_NAME = re.compile(f"{PREFIX}-([0-9a-f]{{8}})-([0-9a-f]{{8}})(?:-[0-9a-f]{{8}})?")
"""Ends the name of a bitmap that stands beside one of ours, and goes with it."""


@dataclass(frozen=True)
class OwnBitmap:
    """One bitmap of ours on ``disk``, which may be a node that no backup reads.

    ``repository`` and ``backup``: the first eight digits of their ids.
    """

    disk: EngineDisk
    info: BitmapInfo
    repository: str
    backup: str

    @property
    def state(self) -> str:
        """Return how it is, in words."""
        if self.info.reason:
            return f"invalid ({self.info.reason})"
        if self.info.inconsistent:
            return "inconsistent"
        words = ["busy"] if self.info.busy else []
        words += ["recording" if self.info.recording else "disabled"]
        return ", ".join([*words, "persistent" if self.info.persistent else "in memory"])


def made_for(name: str) -> tuple[str, str] | None:
    """Return the first digits of the repository and the backup that a bitmap is named after, if it is one of ours."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2]) if found else None


async def own_bitmaps(engine: Engine) -> list[OwnBitmap]:
    """Return all of them, by disk and name. Raises `EngineError`."""
    found = [
        OwnBitmap(disk, info, *of) for disk, info in await engine.bitmaps() if (of := made_for(info.name)) is not None
    ]
    return sorted(found, key=lambda b: (b.disk.name, b.info.name))


def choose(found: Sequence[OwnBitmap], names: Collection[str], disks: Collection[str] = ()) -> list[OwnBitmap]:
    """Return those with these names, of these disks or all. Raises `UsageError` or `BitmapError`, and chooses none."""
    if foreign := [name for name in names if made_for(name) is None]:
        hint = "Only bitmaps that incbak has made are removed; see: incbak bitmap list SOURCE"
        raise UsageError(f"not a bitmap of incbak: {', '.join(foreign)}", hint=hint)
    chosen = [b for b in found if b.info.name in names and (not disks or {b.disk.name, b.disk.node} & set(disks))]
    if missing := sorted(set(names) - {b.info.name for b in chosen}):
        raise UsageError(f"there is no bitmap {', '.join(missing)}", hint="See: incbak bitmap list SOURCE")
    if busy := [f"{b.info.name} of {b.disk.name}" for b in chosen if b.info.busy]:
        raise BitmapError(f"a job uses bitmap {', '.join(busy)}", hint="Run again when the job has ended.")
    return chosen


async def remove(engine: Engine, chosen: Sequence[OwnBitmap]) -> None:
    """Remove them. Raises `EngineError` or `DiskError`; those before the one that failed are gone."""
    there = {(disk.node, bitmap.name) for disk, bitmap in await engine.bitmaps()}
    named = [(each.disk, name) for each in chosen for name in (each.info.name, end_mark_of(each.info.name))]
    await engine.remove_bitmaps([(disk, name) for disk, name in named if (disk.node, name) in there])

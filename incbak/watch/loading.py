"""From the files into QEMU, before the guest's first instruction: steps 1 to 3 of the package docstring."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from incbak.bitmap import bits as kernels
from incbak.bitmap.file import Bitmap, Found
from incbak.bitmap.store import view_file
from incbak.durable import crash_point, declare
from incbak.engine.base import is_bitmap_name
from incbak.engine.session import EngineGone, EngineSilent, Session
from incbak.errors import EngineError, IncbakError
from incbak.reasons import Reason
from incbak.watch.disks import Watched
from incbak.watch.transfer import PREFIX, Place, PrivateServer, bitmaps_of, private_server

declare("watch.invalidated", "watch.recording", "watch.filled", "watch.loaded")

_FRESH = "prelaunch"


@dataclass
class Outcome:
    """What became of the bitmaps of one disk: those that QEMU has now, and why others are lost.

    ``detail`` is why none could be loaded, or saved, and ``reason`` what the next record says of that.
    """

    disk: str
    kept: list[str] = field(default_factory=list)
    lost: dict[str, Reason] = field(default_factory=dict)
    detail: str = ""
    reason: Reason = Reason.UNSAVED


@dataclass
class _Read:
    name: str
    granularity: int
    bits: kernels.Bits


async def distrust(session: Session, disk: Watched, reason: Reason) -> Outcome:
    """Make all files of the disk invalid, durably: the guest has written, or may have, and nobody marked it there."""
    outcome = Outcome(disk.name)
    for name in disk.store.names():
        outcome.lost[name] = await asyncio.to_thread(_give_up, disk, name, reason)
    await _settle(session, disk, outcome)
    return outcome


def _give_up(disk: Watched, name: str, reason: Reason) -> Reason:
    found = view_file(disk.store.path(name)).reason or reason
    disk.store.give_up(name, found)
    return found


async def _settle(session: Session, disk: Watched, outcome: Outcome) -> None:
    """What QEMU records under our names is kept, whatever became of the files: a dead watch may have loaded it."""
    known = await bitmaps_of(session, disk.node)
    outcome.kept = [name for name, info in known.items() if is_bitmap_name(name) and info["recording"]]
    outcome.lost = {name: reason for name, reason in outcome.lost.items() if name not in outcome.kept}


async def load(session: Session, disks: Sequence[Watched]) -> list[Outcome]:
    """Put what the files hold into QEMU. Raises `EngineGone` or `EngineSilent`; then the files are invalid."""
    outcomes = [Outcome(disk.name) for disk in disks]
    taken = [await asyncio.to_thread(_take, disk, o) for disk, o in zip(disks, outcomes, strict=True)]
    crash_point("watch.invalidated")
    for disk, outcome, found in zip(disks, outcomes, taken, strict=True):
        outcome.lost |= {each.name: Reason.UNSAVED for each in found}
        try:
            if found:
                await _load(session, disk, found)
        except (EngineGone, EngineSilent):
            raise
        except (IncbakError, OSError) as e:
            outcome.detail = str(e)
        await _settle(session, disk, outcome)
    return outcomes


def _take(disk: Watched, outcome: Outcome) -> list[_Read]:
    """The bits of the files that may be believed. No file may be, when this returns."""
    found: list[_Read] = []
    fingerprint = disk.seen()
    for name in disk.store.names():
        bitmap = disk.store.open(name, fingerprint)
        reason = bitmap if isinstance(bitmap, Reason) else _unfit(bitmap)
        if isinstance(bitmap, Bitmap):
            if reason is None:
                found.append(_Read(name, bitmap.granularity, bitmap.snapshot()))
            bitmap.close(None)
        if reason:
            outcome.lost[name] = reason
        disk.store.give_up(name, reason or Reason.UNSAVED)
    return found


def _unfit(bitmap: Bitmap) -> Reason | None:
    """Why a sound bitmap is not loaded. One that an ``incbak serve`` has left that was killed is."""
    if not bitmap.enabled:
        return Reason.BITMAP_DISABLED
    if bitmap.found is Found.COARSE:
        return Reason.UNCLEAN_SHUTDOWN  # the map of regions stands for writes until the power cut, not for later ones
    return None if is_bitmap_name(bitmap.name) else Reason.UNSAVED


async def _load(session: Session, disk: Watched, found: Sequence[_Read]) -> None:
    """All bitmaps of one disk, each in a transaction of its own; what is there of them when it raises is whole."""
    since = {"node": disk.node, "name": PREFIX}
    granularity = min(each.granularity for each in found)
    await session.execute("block-dirty-bitmap-add", since | {"granularity": granularity})
    try:
        crash_point("watch.recording")
        if why := await why_written(session, [disk]):
            raise EngineError(why)
        async with private_server(session) as server:
            for each in found:
                await _one(session, server, disk, each)
            crash_point("watch.loaded")
    finally:
        await session.try_execute("block-dirty-bitmap-remove", since)


async def _one(session: Session, server: PrivateServer, disk: Watched, each: _Read) -> None:
    """The bitmap is there with all its bits and those since step 2, or it is not there."""
    place = Place(disk.node, each.name, each.granularity, disk.size)
    async with server.filled(place, each.bits) as source:
        crash_point("watch.filled")
        sources = [{"node": disk.node, "name": PREFIX}, source]
        actions = [
            {"type": "block-dirty-bitmap-add", "data": place.named() | {"granularity": each.granularity}},
            {
                "type": "block-dirty-bitmap-merge",
                "data": {"node": place.node, "target": place.name, "bitmaps": sources},
            },
        ]
        await session.execute("transaction", {"actions": actions})


async def why_written(session: Session, disks: Sequence[Watched]) -> str:
    """Why the guest, or anybody, may have written to ``disks`` since QEMU opened them, or ""."""
    status = str((await session.execute("query-status"))["status"])
    if status != _FRESH:
        return f"the VM has run already: it is {status}"
    if any(_writes(e["stats"]) for e in await session.execute("query-blockstats")):
        return "the VM has run already: it has written, and was reset"
    written = await session.execute("query-blockstats", {"query-nodes": True})
    for disk in disks:
        nodes = [e["stats"] for e in written if e.get("node-name") == disk.node]
        if not nodes or any(_writes(stats) for stats in nodes):
            return f"disk {disk.name} has been written since QEMU opened it"
    return ""


def _writes(stats: Mapping[str, Any]) -> bool:
    fields = ("wr_highest_offset", "wr_operations", "wr_bytes", "unmap_operations")  # none is reset with the VM
    return any(int(stats.get(name, 0)) for name in fields)

"""From QEMU into the files, when the guest has shut down: steps 4 to 6 of the package docstring."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qemu.qmp import EventListener

from incbak.bitmap import bits as kernels
from incbak.bitmap.saved import write_clean
from incbak.disk.locks import writer_present
from incbak.durable import crash_point, declare
from incbak.engine.base import PREFIX, is_bitmap_name
from incbak.engine.deadline import deadline
from incbak.engine.jobs import cancel_jobs
from incbak.engine.session import EngineGone, EngineSilent, Session
from incbak.errors import EngineError, IncbakError
from incbak.fingerprint import Fingerprint
from incbak.reasons import Reason
from incbak.watch.disks import Holder, Watched
from incbak.watch.loading import Outcome
from incbak.watch.transfer import Place, bitmaps_of, private_server

log = logging.getLogger(__name__)

declare("watch.read", "watch.quitting", "watch.gone", "watch.written", "watch.saved")

SHUT_DOWN = "shutdown"
RAN = ("RESUME", "RESET")
"""Events that mean: what was read may not be all."""
_QUIT_SECONDS = 600.0
_LETTING_GO_SECONDS = 60.0
_TRIES = 3


class RanAgainError(EngineError):
    """Somebody resumed or reset the VM while its bitmaps were saved."""


@dataclass
class _Disk:
    """What was read of one disk while the VM was paused."""

    disk: Watched
    fingerprint: Fingerprint
    places: list[Place] = field(default_factory=list)
    bits: list[kernels.Bits] = field(default_factory=list)


async def save_and_quit(
    session: Session, disks: Sequence[Watched], ran: EventListener, *, status: str = SHUT_DOWN, trouble: str = ""
) -> list[Outcome]:
    """Save all bitmaps of ours, end QEMU, and set the files' flags.

    A backup that still runs is cancelled first: QEMU 7.2 with I/O threads sometimes hangs when it is told to quit in
    the middle of one (in ``job_cancel_sync_all``, a few times in a hundred).

    ``status``: in which state the VM stays meanwhile. ``trouble``: why nothing can be saved, where that is known.
    Raises `RanAgainError` when the VM runs again and QEMU was not ended. What else fails is in the outcomes, and QEMU
    is ended all the same: that is what the guest asked for.
    """
    holder = Holder(session.peer_pid(), disks)
    trouble = trouble or holder.why_not_told()
    still = _Still(session, ran, status)
    read: list[_Disk] = []
    try:
        if not trouble:
            read = await _read_all(session, disks, still)
    except (EngineGone, RanAgainError):
        raise
    except (IncbakError, OSError) as e:
        trouble = str(e)
    crash_point("watch.read")
    for job in await cancel_jobs(session, f"{PREFIX}-"):
        log.warning("%s of a backup was cancelled, since the guest has shut down: run it again", job)
    await still.check()
    crash_point("watch.quitting")
    trouble = await _quit(session) or trouble
    if not trouble and not await holder.gone(disks, _LETTING_GO_SECONDS):
        trouble = "QEMU has not let go of the images"
    if not ran.empty():
        trouble = "the VM was resumed while it was ended"
    crash_point("watch.gone")
    if trouble:
        return [Outcome(disk.name, detail=trouble) for disk in disks]
    return [await asyncio.to_thread(_write, each) for each in read]


@dataclass(frozen=True)
class _Still:
    """Whether the VM has stayed in ``status`` since ``ran`` was cleared."""

    session: Session
    ran: EventListener
    status: str

    async def check(self) -> None:
        """Raises `RanAgainError`."""
        status = str((await self.session.execute("query-status"))["status"])
        if status != self.status or not self.ran.empty():
            raise RanAgainError(f"the VM is {status}: somebody has resumed or reset it")


async def _read_all(session: Session, disks: Sequence[Watched], still: _Still) -> list[_Disk]:
    """The bits of all disks as they are when this returns; a backup may still have been at it meanwhile."""
    for _ in range(_TRIES):
        await still.check()
        read = [_Disk(disk, await asyncio.to_thread(disk.settled)) for disk in disks]
        for each in read:
            each.places = _places(each.disk, await bitmaps_of(session, each.disk.node))
        if any(each.places for each in read):
            async with private_server(session) as server:
                for each in read:
                    each.bits = await server.read(each.places) if each.places else []
        if all([_same(each, await bitmaps_of(session, each.disk.node)) for each in read]):
            return read
    raise EngineError("the bitmaps changed while they were read")


def _places(disk: Watched, found: Mapping[str, Mapping[str, Any]]) -> list[Place]:
    """Those that an incremental would believe."""
    return [
        Place(disk.node, name, int(info["granularity"]), disk.size)
        for name, info in found.items()
        if is_bitmap_name(name) and info["recording"] and not info["busy"] and not info.get("inconsistent")
    ]


def _same(each: _Disk, found: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether QEMU counts what was read, in the same bitmaps."""
    if _places(each.disk, found) != each.places:
        return False
    counts = [kernels.count(bits) * place.granularity for place, bits in zip(each.places, each.bits, strict=True)]
    return counts == [int(found[place.name]["count"]) for place in each.places]


async def _quit(session: Session) -> str:
    """`quit`, and wait until the monitor's connection has ended, which is after the images were closed; or why not."""
    try:
        await session.execute("quit", timeout=_QUIT_SECONDS)
        async with deadline(_QUIT_SECONDS):
            await session.ended()
    except EngineGone:
        return ""
    except (EngineSilent, TimeoutError):
        return f"QEMU did not end within {_QUIT_SECONDS:g} s"
    return ""


def _write(each: _Disk) -> Outcome:
    """The files of one disk; the image first."""
    disk, outcome = each.disk, Outcome(each.disk.name)
    try:
        disk.sync()
        fingerprint = disk.settled()
        if why := _why_not_closed(each, fingerprint):
            outcome.detail, outcome.reason = why, Reason.DISK_CHANGED
            return outcome
        for place, bits in zip(each.places, each.bits, strict=True):
            write_clean(disk.store, place.name, place.granularity, bits, fingerprint)
            outcome.kept.append(place.name)
        crash_point("watch.written")
        if disk.fingerprint() != fingerprint or _opened(disk, fingerprint):
            outcome.detail = f"{disk.image} was written or opened again too early"
            outcome.reason = Reason.DISK_CHANGED
            for name in outcome.kept:
                disk.store.give_up(name, Reason.DISK_CHANGED)
            return outcome
        for name in disk.store.names():
            if name not in outcome.kept:
                disk.store.remove(name)
    except (IncbakError, OSError) as e:
        outcome.detail = str(e)
    crash_point("watch.saved")
    return outcome


def _why_not_closed(each: _Disk, now: Fingerprint) -> str:
    """Why the image may not be what the guest has left, or ""."""
    before, disk = each.fingerprint, each.disk
    if disk.is_replaced():
        return f"{disk.image} is not the image that was watched"
    if now != before if disk.raw else (now.inode, now.size) != (before.inode, before.size):
        return f"somebody else has written to {disk.image}"
    return f"somebody else has {disk.image} open for writing" if _opened(disk, now) else ""


def _opened(disk: Watched, now: Fingerprint) -> bool:
    """Whether there is a writer whose writes would not show: a raw file has a time of change that tells of each."""
    return not (disk.raw and now.mtime_ns) and writer_present(str(disk.image))

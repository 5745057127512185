"""A raw image or block device that nobody has open: read directly, its bitmaps found in the state directory."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import numpy as np

from incbak.bitmap.continuity import changed
from incbak.bitmap.file import Bitmap, Found
from incbak.bitmap.format import Flag
from incbak.bitmap.look import views_in
from incbak.bitmap.owner import Owner
from incbak.bitmap.settle import settled
from incbak.bitmap.store import BitmapStore, BitmapView, component, views
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.users import refuse_writers
from incbak.engine.base import (
    BitmapInfo,
    Description,
    DiskPlan,
    DiskResult,
    Engine,
    EngineDisk,
    ProgressCallback,
    RunResult,
    Target,
    run_of,
    superseded,
)
from incbak.errors import DiskError, ImageChangedError, IncbakError, UsageError
from incbak.extents import Extent, StatusExtent, align_out, intersect, merge, total
from incbak.fingerprint import without_ctime
from incbak.reasons import Reason

CHUNK = 4 << 20
_FIND = "Find out which program has it open (fuser, lsof), and run again when it has ended."
DEFAULT_DISK = "disk0"


class ImageEngine(Engine):
    """See `Engine`. Holds the image's lock and the bitmaps' from `describe` to `close`: nobody writes meanwhile.

    With ``look`` it only describes: it owns no bitmaps, and changes none. ``ignore_ctime``: see
    `incbak.bitmap.continuity`. ``sampling``: see `incbak.bitmap.judge.judge`.
    """

    kind = "image"

    def __init__(
        self,
        path: Path,
        state_dir: Path,
        vm: str,
        disk: str | None,
        speed: int = 0,
        note: str = "",
        *,
        look: bool = False,
        ignore_ctime: bool = False,
        sampling: bool = False,
    ) -> None:
        self._look, self._sampling = look, sampling
        self._path, self._vm, self._speed, self._note = path, vm, speed, note
        self._disk: FileDisk = open_disk(path, read_only=True)
        self._bitmaps: dict[str, Bitmap] = {}
        self._bad: dict[str, Reason] = {}
        try:
            self._found, _ = settled(self._disk)  # who writes all the time is found by `confirm`
            self._kept = without_ctime(self._found) if ignore_ctime else self._found
            self._name = disk or _known_disk(state_dir, vm, self._found.inode)
            self._store = BitmapStore(state_dir, vm, self._name)
            if not look:
                self._store.lock(Owner.RUN)
                self._note = "; ".join(filter(None, (note, refuse_writers(path).doubt(path))))
                self._store.note_image(path)
        except OSError as e:
            self._disk.close()
            raise DiskError(f"cannot read image {path}: {e.strerror}") from e
        except BaseException:
            self._disk.close()
            raise

    async def describe(self) -> Description:
        if not self._look and not self._bitmaps and not self._bad:
            good, self._bad = self._store.open_all(self._found, sampling=self._sampling)
            self._bitmaps = {b.name: b for b in good}
        infos = [_info(b) for b in self._bitmaps.values()]
        infos += [_invalid(name, reason) for name, reason in self._bad.items()]
        if self._look:
            see = partial(views_in, self._store.directory, self._found, sampling=self._sampling)
            infos = [_looked(v) for v in await asyncio.to_thread(see)]
        extra = {"path": str(self._path)}
        notes = (self._note,) if self._note else ()
        disk = EngineDisk(self._name, self._disk.size, self._name, can_persist=True, bitmaps=tuple(infos), extra=extra)
        images = {"images": {self._name: os.path.abspath(self._path)}}
        return Description(self._vm, (disk,), "image", images, (), notes)

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        gone = [name for name in (*self._bitmaps, *self._bad) if name.startswith(prefix) and run_of(name) not in keep]
        for name in gone:
            self._remove(name)
        return [f"bitmap {name} of {self._name}" for name in gone]

    async def run(
        self, plans: Sequence[DiskPlan], targets: Mapping[str, Target], progress: ProgressCallback
    ) -> RunResult:
        (plan,) = plans
        new = self._store.create(plan.new_bitmap, self._disk.size, plan.granularity, self._kept)
        new.heartbeat(self._found)
        self._bitmaps[plan.new_bitmap] = new
        stop = threading.Event()
        copy = asyncio.to_thread(self._copy, plan, targets[self._name], progress, stop)
        try:
            return RunResult({self._name: await asyncio.shield(task := asyncio.ensure_future(copy))})
        except asyncio.CancelledError:
            stop.set()
            await asyncio.wait([task])
            raise

    def _copy(self, plan: DiskPlan, target: Target, progress: ProgressCallback, stop: threading.Event) -> DiskResult:
        size = self._disk.size
        wanted = self._bitmaps[plan.base_bitmap].extents() if plan.base_bitmap else [Extent(0, size)]
        whole, done, read, begun = total(wanted), 0, 0, time.monotonic()
        try:
            for extent in pieces(self._disk, wanted, plan.granularity):
                if stop.is_set():
                    return DiskResult(done, "interrupted")
                if extent.zero:
                    target.write_zeroes(extent.offset, extent.length)
                else:
                    buf = memoryview(np.empty(extent.length, dtype=np.uint8))  # type: ignore[arg-type]
                    self._disk.read_into(buf, extent.offset)
                    target.write(extent.offset, buf, owned=True)
                    read += extent.length
                    self._slow_down(read, begun, stop)
                done += extent.length
                progress(self._name, done, whole)
            target.flush()
            self._disk.flush_times()  # what was read may not be on the disk yet, and a power cut would undo it unmarked
        except OSError as e:
            return DiskResult(done, f"cannot read or sync {self._path}: {e.strerror}")
        except IncbakError as e:
            return DiskResult(done, str(e))
        return DiskResult(done)

    def _slow_down(self, read: int, begun: float, stop: threading.Event) -> None:
        """An interrupt ends the waiting, however slow it is to be."""
        if self._speed:
            stop.wait(max(read / self._speed - (time.monotonic() - begun), 0))

    async def confirm(self) -> None:
        """Raise `ImageInUseError` where another process can write the image by now, `ImageChangedError` where it is not
        what it was when it was opened."""
        await asyncio.to_thread(self._confirm)

    def _confirm(self) -> None:
        refuse_writers(self._path)
        if reason := changed(self._kept, self._disk.fingerprint()):
            what = "changed" if reason is Reason.UNPROVEN else "wrote to"
            raise ImageChangedError(f"another program {what} {self._path} while it was read", hint=_FIND)
        if not self._disk.is_at(self._path):
            raise ImageChangedError(f"another program replaced {self._path} while it was read", hint=_FIND)

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            for name in superseded(plan):
                self._remove(name)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        for plan in plans:
            self._remove(plan.new_bitmap)

    async def remove_bitmaps(self, bitmaps: Sequence[tuple[EngineDisk, str]]) -> None:
        for _disk, name in bitmaps:
            self._remove(name)

    async def invalidate(self, disk: EngineDisk, name: str, reason: Reason) -> None:
        await asyncio.to_thread(self._invalidate, name, reason)

    def _invalidate(self, name: str, reason: Reason) -> None:
        if bitmap := self._bitmaps.pop(name, None):
            bitmap.invalidate(reason)
            bitmap.close(None)
        else:
            self._store.give_up(name, reason)
        self._bad[name] = reason

    def _remove(self, name: str) -> None:
        if bitmap := self._bitmaps.pop(name, None):
            bitmap.close(None)
        self._bad.pop(name, None)
        self._store.remove(name)

    async def close(self) -> None:
        if self._disk.fd < 0:
            return
        for bitmap in self._bitmaps.values():
            provisional = bitmap.found is Found.PROVISIONAL
            # Not as it is now: what was written meanwhile was marked nowhere. What is provisional stays so.
            bitmap.close(None if provisional else self._kept)
        self._bitmaps = {}
        self._store.unlock()
        self._disk.close()


def pieces(disk: FileDisk, wanted: list[Extent], granularity: int) -> Iterator[StatusExtent]:
    """What to read of ``wanted`` (whole clusters), in chunks, and which ranges are holes; tiles ``wanted``."""
    for extent in wanted:
        status = disk.extents(extent.offset, extent.length)
        data = merge(align_out(Extent(e.offset, e.length), granularity, disk.size) for e in status if not e.zero)
        position = extent.offset
        for part in intersect(data, [extent]):
            if part.offset > position:
                yield StatusExtent(position, part.offset - position, zero=True, hole=True)
            for offset in range(part.offset, part.end, CHUNK):
                yield StatusExtent(offset, min(CHUNK, part.end - offset), zero=False, hole=False)
            position = part.end
        if position < extent.end:
            yield StatusExtent(position, extent.end - position, zero=True, hole=True)


def _info(bitmap: Bitmap) -> BitmapInfo:
    return BitmapInfo(
        bitmap.name,
        bitmap.granularity,
        bitmap.count(),
        recording=bitmap.enabled,
        found=bitmap.found.value,
        path=str(bitmap.path),
        provisional=bitmap.found is Found.PROVISIONAL,
    )


def _invalid(name: str, reason: Reason) -> BitmapInfo:
    return BitmapInfo(name, 0, 0, inconsistent=True, reason=reason, found="invalid")


def _looked(seen: BitmapView) -> BitmapInfo:
    if seen.reason or seen.slot is None:
        return _invalid(seen.name, seen.reason or Reason.HEADER)
    return BitmapInfo(
        seen.name,
        seen.slot.granularity,
        total(seen.extents()),
        recording=bool(seen.slot.flags & Flag.ENABLED),
        found=seen.found.value if seen.found else "",
        path=str(seen.path),
        provisional=seen.found is Found.PROVISIONAL,
    )


def _known_disk(state_dir: Path, vm: str, inode: int) -> str:
    """By which name this image was served: the VM's only disk, or the one whose bitmaps remember the inode."""
    known = sorted(unquote(p.name) for p in (state_dir / component(vm)).glob("*/") if p.is_dir())
    if len(known) < 2:
        return known[0] if known else DEFAULT_DISK
    same = {v.disk for v in views(state_dir, vm) if v.slot and inode and v.slot.fingerprint.inode == inode}
    if len(same) != 1:
        raise UsageError(f"{vm} has several disks: {', '.join(known)}", hint="Say which this image is with --disk.")
    return same.pop()


__all__ = ["CHUNK", "DEFAULT_DISK", "DiskError", "ImageEngine", "pieces"]

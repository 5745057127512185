"""Opening and closing what is served: images with their locks, bitmaps with their flag.

The order of a clean end, which is the proof that a bitmap with its flag set is whole: no connection, no job; the gate
is shut, so no write is in flight or to come; the disk is flushed; the fingerprint is taken; each bitmap is closed
clean. Where a step fails the flag stays clear, and the next start recovers the bits.
"""

from __future__ import annotations

import logging
import threading
from contextlib import suppress
from pathlib import Path

from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.owner import Owner
from incbak.bitmap.remembered import remembered_format
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk
from incbak.disk.formats import named_format, recognise
from incbak.disk.users import WRITES, refuse_writers
from incbak.errors import FormatError, IncbakError
from incbak.fingerprint import without_ctime
from incbak.serve.gate import DrainTimeoutError
from incbak.serve.tracker import TrackedDisk
from incbak.serve.vm import Vm

log = logging.getLogger(__name__)

HEARTBEAT = 0.1
"""Seconds between notes that the owner is alive."""


def open_tracked(vm: Vm, name: str, path: Path, state_dir: Path, *, read_only: bool = False) -> TrackedDisk:
    """Open an image with its bitmaps and enter it into ``vm``. Raises `DiskError`, `LockedError`.

    Who else can write the image is looked for after its lock is ours, so of two servers that begin at once one is
    refused. Such a writer would be recorded in no bitmap, and would write over what the guest writes.

    A bitmap that is not believed is durably so before the guest can write: nothing would be recorded in it.
    """
    _check_raw(vm, name, path, state_dir)
    disk = open_disk(path, read_only=read_only)
    store = BitmapStore(state_dir, vm.name, name)
    try:
        refuse_writers(path, hint=WRITES)
        store.lock(Owner.SERVE)
        store.note_image(path)
        good, bad = store.open_all(disk.fingerprint())
        if not read_only:
            for lost, reason in bad.items():
                store.give_up(lost, reason)
    except BaseException:
        disk.close()
        store.unlock()
        raise
    tracked = TrackedDisk(name, disk, store)
    tracked.bitmaps.update({b.name: b for b in good})
    vm.lost[name] = dict(bad)
    for lost, reason in bad.items():
        log.warning("disk %s: bitmap %s cannot be used: %s", name, lost, reason.text)
    tracked.refresh()
    vm.add_disk(tracked)
    return tracked


def _check_raw(vm: Vm, name: str, path: Path, state_dir: Path) -> None:
    """What is served is raw, whatever its guest has written to it; what its name or its history says is not content."""
    content, named = recognise(path), named_format(path)
    before, where, same = remembered_format(state_dir, vm.name, name, path, name)
    if same and before != "raw":
        hint = "Serve it under another name, or serve it with: qemu-nbd -f " + before
        raise FormatError(f"{path} was a {before} image in {where}, and only raw ones are served", hint=hint)
    if content not in ("raw", "luks") and named == content and not same:
        hint = f"incbak serve takes raw images: convert it, or serve it with: qemu-nbd -f {named}"
        raise FormatError(f"{path} is a {named} image", hint=hint)
    if content not in ("raw", "luks"):
        log.warning("disk %s: %s looks like a %s image, and is served as the raw disk that it is", name, path, content)


def close_tracked(tracked: TrackedDisk, timeout: float, *, ignore_ctime: bool = False) -> bool:
    """The clean end of one disk, as the module's docstring orders it; false where it was not to be.

    ``ignore_ctime``: see `incbak.bitmap.continuity`.
    """
    clean = True
    fingerprint = None
    try:
        tracked.gate.shut(timeout)
        if not tracked.read_only:
            tracked.disk.flush_times()
        fingerprint = tracked.disk.fingerprint()
        fingerprint = without_ctime(fingerprint) if ignore_ctime else fingerprint
    except (DrainTimeoutError, IncbakError, OSError) as e:
        log.error("disk %s: not closed cleanly, its bitmaps are recovered at the next start: %s", tracked.name, e)
        clean = False
    with tracked.reading:
        for bitmap in tracked.bitmaps.values():
            if isinstance(bitmap, Bitmap):
                try:
                    bitmap.close(fingerprint)
                except (IncbakError, OSError) as e:
                    log.error("disk %s: bitmap %s is not closed cleanly: %s", tracked.name, bitmap.name, e)
                    clean = False
        tracked.bitmaps.clear()
    if tracked.store:
        tracked.store.unlock()
    tracked.disk.close()
    return clean


class Heartbeat:
    """Notes in each bitmap that its owner is alive: a change of the image much later was not tracked."""

    def __init__(self, vm: Vm) -> None:
        self._vm = vm
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            for tracked in list(self._vm.disks.values()):
                tracked.rest()
                with tracked.reading, suppress(OSError):
                    beat = tracked.disk.beat()
                    for bitmap in list(tracked.bitmaps.values()):
                        if isinstance(bitmap, Bitmap) and bitmap.state is State.DIRTY:
                            bitmap.heartbeat(beat)

    def stop(self) -> None:
        """No more notes."""
        self._stop.set()
        self._thread.join(timeout=1)

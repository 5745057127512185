"""Opening and closing what is served: images with their locks, bitmaps with their flag.

The order of a clean end, which is the proof that a bitmap with its flag set is whole: no connection, no job; the gate
is shut, so no write is in flight or to come; the disk is flushed; the fingerprint is taken; each bitmap is closed
clean. Where a step fails the flag stays clear, and the next start recovers the bits.
"""

from __future__ import annotations

import logging
import os
import threading
from contextlib import suppress
from pathlib import Path

from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.owner import Owner
from incbak.bitmap.remembered import remembered_format
from incbak.bitmap.settle import settled
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.formats import named_format, recognise
from incbak.disk.stacking import key_of, share_bytes
from incbak.disk.users import WRITES, refuse_writers
from incbak.errors import FormatError, ImageChangedError, IncbakError, UsageError
from incbak.fingerprint import without_ctime
from incbak.serve.gate import DrainTimeoutError
from incbak.serve.tracker import TrackedDisk
from incbak.serve.vm import Vm

log = logging.getLogger(__name__)

HEARTBEAT = 0.1
"""Seconds between notes that the owner is alive."""
DURABLE = 60.0
"""Seconds between syncs of when the images were written: after a power cut they are no older."""


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
        _refuse_shared_bytes(vm, name, disk)
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


def _refuse_shared_bytes(vm: Vm, name: str, disk: FileDisk) -> None:
    """Raise `UsageError` where another disk of ``vm`` has bytes of this one, as a device and its partition."""
    images = {other.name: other.disk for other in vm.disks.values()} | {name: disk}
    found = share_bytes({n: [key_of(os.fstat(d.fd))] for n, d in images.items() if isinstance(d, FileDisk)})
    if found:
        hint = "What is written to one of them is not recorded for the other: serve one of them only."
        raise UsageError(f"disks {found[0]} and {found[1]} have bytes in common", hint=hint)


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
        found, shows = settled(tracked.disk)
        if not shows:
            raise ImageChangedError("another program writes to it")
        fingerprint = without_ctime(found) if ignore_ctime else found
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
        threading.Thread(target=self._make_durable, name="times", daemon=True).start()

    def _make_durable(self) -> None:
        """A thread of its own: a sync may take long, and nobody waits for it."""
        while not self._stop.wait(DURABLE):
            for tracked in list(self._vm.disks.values()):
                if not tracked.read_only:
                    with suppress(OSError):  # final, and told to the next guest that flushes
                        tracked.disk.flush_times()

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

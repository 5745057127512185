"""The state directory: one directory per disk of a VM, with its bitmaps, its identity and its lock."""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from incbak import durable, host
from incbak.bitmap import bits as kernels
from incbak.bitmap import format as fmt
from incbak.bitmap.body import digest_of
from incbak.bitmap.create import create_file, new_slot
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import TOUCHED, UNTOUCHED, Flag, Slot
from incbak.bitmap.identity import Identity, read_identity, write_identity, written_since
from incbak.bitmap.names import component as component
from incbak.bitmap.names import name_of
from incbak.errors import BitmapError, LockedError
from incbak.extents import Extent
from incbak.fingerprint import Fingerprint
from incbak.opening import open_regular
from incbak.reasons import Reason

SUFFIX = ".bitmap"
HEARTBEAT_SLACK_NS = 1_000_000_000
"""How much later than its last heartbeat a killed owner may have written."""
POWER_CUT_SLACK_NS = 120_000_000_000
"""The same after a power cut: the kernel writes dirty pages back after some 35 s."""


class BitmapStore:
    """The bitmaps of one disk of one VM: ``<state dir>/<vm>/<disk>/<name>.bitmap``."""

    def __init__(self, state_dir: Path, vm: str, disk: str) -> None:
        self.vm, self.disk = vm, disk
        self.directory = state_dir / component(vm) / component(disk)
        self._lock_fd: int | None = None
        self.uuid = b""

    def lock(self) -> None:
        """Become the owner of this disk's bitmaps, until `unlock` or death. Raises `LockedError` if there is one."""
        durable.make_dir(self.directory)
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            hint = "Stop the process that serves it, or use its monitor as the source."
            raise LockedError(f"the bitmaps of disk {self.disk} of {self.vm} are in use", hint=hint) from None
        self._lock_fd = fd
        for left in self.directory.glob(".*.tmp"):
            left.unlink(missing_ok=True)
        self.uuid = self._identity()

    def unlock(self) -> None:
        """Let the next owner in."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def _identity(self) -> bytes:
        found = read_identity(self._about)
        if found is None:
            found = Identity(str(uuid.uuid4()))
            write_identity(self._about, found)
        return uuid.UUID(found.uuid).bytes

    @property
    def _about(self) -> Path:
        return self.directory / "disk.json"

    def note_image(self, image: Path) -> None:
        """Remember where the image is, so that `disown` finds the bitmaps of an image that is overwritten.

        A block device has no time of change. Where the kernel has counted writes to it since `note_writes`, what was
        closed cleanly is not believed any more. Call it before anything is opened.
        """
        found, where = read_identity(self._about), os.path.abspath(image)
        if not found:
            return
        if written_since(found.writes, host.device_writes(image)):
            for name in self.names():
                slot, _both = _read_slots(self.path(name))
                if isinstance(slot, Slot) and slot.flags & Flag.CLEAN:
                    self.give_up(name, Reason.DISK_CHANGED)
        if found.image != where:
            write_identity(self._about, Identity(found.uuid, where, found.writes))

    def note_writes(self, image: Path) -> None:
        """A clean end: ``image`` is flushed, and nobody writes to it. Call it before a flag is set."""
        found, writes = read_identity(self._about), host.device_writes(image)
        if found and found.writes != writes:
            write_identity(self._about, Identity(found.uuid, found.image, writes))

    def path(self, name: str) -> Path:
        """Where the bitmap ``name`` is."""
        return self.directory / (component(name) + SUFFIX)

    def create(self, name: str, size: int, granularity: int, disk: Fingerprint, *, enabled: bool = True) -> Bitmap:
        """A new bitmap with nothing marked, durable and preallocated. Takes time; records once a tracker has it.

        Raises `BitmapError` when it exists or there is no room.
        """
        if granularity < 512 or granularity & (granularity - 1):
            raise BitmapError(f"granularity {granularity} is not a power of two of at least 512")
        self._bury_leftover(name)
        slot = new_slot(name, size, granularity, self.uuid, disk, enabled)
        create_file(self.path(name), slot)
        return Bitmap(self.path(name), replace(slot, sequence=slot.sequence + 1), Found.CREATED, State.DIRTY)

    def _bury_leftover(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.directory / (component(name) + SUFFIX + ".invalid"))

    def names(self) -> list[str]:
        """The names of all bitmap files here, sorted."""
        return sorted(_names(self.directory))

    def open(self, name: str, disk: Fingerprint) -> Bitmap | Reason:
        """The bitmap ``name`` if it may be believed, else why not. The table of the package docstring, row by row."""
        path = self.path(name)
        if not path.exists():
            return Reason.TRACKING_FAILED
        slot, both = _read_slots(path)
        if isinstance(slot, Reason):
            return slot
        if reason := _suspect(slot, path, name, self.uuid, disk):
            return reason
        try:
            if slot.flags & Flag.CLEAN:
                return _open_clean(path, slot, disk) if both else Reason.HEADER
            return _open_unclean(path, slot, disk)
        except OSError:  # a sector that cannot be read, or a full disk that takes no store
            return Reason.HEADER

    def open_all(self, disk: Fingerprint) -> tuple[list[Bitmap], dict[str, Reason]]:
        """Every bitmap that may be believed, and why the others may not. Never raises for what a file holds."""
        good: list[Bitmap] = []
        bad: dict[str, Reason] = {}
        for name in self.names():
            found = self.open(name, disk)
            if isinstance(found, Bitmap):
                good.append(found)
            else:
                bad[name] = found
        return good, bad

    def give_up(self, name: str, reason: Reason) -> None:
        """Make it durable that a bitmap is not to be believed, before the disk is written without recording in it.

        What was wrong with it may be gone at the next look: a read that failed once, a header in a bad moment.
        Raises `BitmapError`, `DurabilityError` or `OSError` when that cannot be done.
        """
        path = self.path(name)
        if not path.exists():
            return
        slot, _both = _read_slots(path)
        if isinstance(slot, Slot) and slot.flags & Flag.INVALID:
            return
        try:
            bitmap = _openable(slot, path)
        except OSError:
            os.rename(path, path.with_name(path.name + ".invalid"))
            durable.sync_dir(self.directory)
            return
        bitmap.invalidate(reason)
        bitmap.close(None)

    def remove(self, name: str) -> None:
        """Remove a bitmap's file durably; one that is open must be closed by the caller first or after."""
        durable.remove(self.directory / (component(name) + SUFFIX + ".invalid"))
        durable.remove(self.path(name))


def _openable(slot: Slot | Reason, path: Path) -> Bitmap:
    if isinstance(slot, Reason) or os.stat(path).st_size != fmt.layout(slot)[2]:
        raise OSError(f"{path} is not a whole bitmap")
    return Bitmap(path, slot, Found.INVALID, State.DIRTY)


def _names(directory: Path) -> Iterator[str]:
    found = set()
    for path in directory.glob(f"*{SUFFIX}*"):
        stem = path.name.removesuffix(".invalid")
        if stem.endswith(SUFFIX) and path.is_file() and (name := name_of(stem.removesuffix(SUFFIX))):
            found.add(name)
    yield from found


def _read_slots(path: Path) -> tuple[Slot | Reason, bool]:
    try:
        fd = open_regular(path, os.O_RDONLY)  # an engine may have named it
        try:
            return fmt.newest(os.pread(fd, 2 * fmt.SECTOR, 0))
        finally:
            os.close(fd)
    except OSError:
        return Reason.HEADER, False


def _suspect(slot: Slot, path: Path, name: str, disk_uuid: bytes, disk: Fingerprint) -> Reason | None:
    """What is wrong with a header, apart from how the last session ended."""
    if slot.flags & Flag.INVALID:
        return Reason(slot.reason) if slot.reason in set(Reason) else Reason.INVALIDATED
    if slot.name != name or slot.disk_uuid != disk_uuid:
        return Reason.WRONG_DISK
    if slot.size != disk.size:
        return Reason.RESIZED
    if os.stat(path).st_size != fmt.layout(slot)[2]:
        return Reason.HEADER
    return None


def _open_clean(path: Path, slot: Slot, disk: Fingerprint) -> Bitmap | Reason:
    if slot.fingerprint != disk:
        return Reason.DISK_CHANGED
    bitmap = Bitmap(path, slot, Found.CLEAN, State.CLEAN)
    if digest_of(bitmap._body) != slot.digest:
        bitmap.close(None)
        return Reason.DIGEST
    bitmap.trust_coarse_map()
    return bitmap


def _open_unclean(path: Path, slot: Slot, disk: Fingerprint) -> Bitmap | Reason:
    same_boot = slot.boot_id == host.boot_id()
    if slot.fingerprint.inode != disk.inode:
        return Reason.DISK_CHANGED if same_boot else Reason.UNCLEAN_SHUTDOWN
    bitmap = Bitmap(path, slot, Found.RECOVERED if same_boot else Found.COARSE, State.DIRTY)
    reason = _bypassed(bitmap, disk, same_boot) or _unsound(bitmap)
    if reason:
        bitmap.close(None)
        return reason
    if not same_boot:
        bitmap.mark_touched_regions()
    bitmap.trust_coarse_map()
    bitmap.adopt()
    return bitmap


def _bypassed(bitmap: Bitmap, disk: Fingerprint, same_boot: bool) -> Reason | None:
    """Whether the image was written after the last owner had died (faults row 8); block devices cannot tell."""
    if not disk.mtime_ns:
        return None
    beat = bitmap.last_heartbeat() or bitmap.slot.fingerprint.mtime_ns
    slack = HEARTBEAT_SLACK_NS if same_boot else POWER_CUT_SLACK_NS
    return Reason.DISK_CHANGED if disk.mtime_ns > beat + slack else None


def _unsound(bitmap: Bitmap) -> Reason | None:
    coarse = bitmap._coarse
    return None if bool(((coarse == TOUCHED) | (coarse == UNTOUCHED)).all()) else Reason.COARSE_MAP


# -- for looking at, without owning ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitmapView:
    """A bitmap file as it stands, read without owning it: a live owner may be marking meanwhile."""

    vm: str
    disk: str
    name: str
    path: Path
    slot: Slot | None
    reason: Reason | None
    in_use: bool

    def runs(self) -> kernels.Runs:
        """The dirty clusters as (first, count). Raises `BitmapError` when the header does not verify."""
        bits = self._mapped()
        assert self.slot
        return kernels.runs(bits, self.slot.clusters)

    def _mapped(self) -> kernels.Bits:
        if self.slot is None:
            hint = "The next backup reads the whole disk."
            raise BitmapError(f"bitmap {self.path} cannot be read", reason=self.reason, hint=hint)
        start, coarse, end = fmt.layout(self.slot)
        if os.stat(self.path).st_size != end:
            raise BitmapError(f"bitmap {self.path} has a wrong size", reason=Reason.HEADER)
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", offset=0, shape=(coarse,))
        return mapped[start : start + kernels.bytes_for(self.slot.clusters)]

    def clean_mask(self) -> Callable[[int, int], NDArray[np.bool_]]:
        """A function from (first cluster, count) to which of them are not marked *now*. Raises as `runs`."""
        bits = self._mapped()

        def clean(first: int, count: int) -> NDArray[np.bool_]:
            window = np.unpackbits(bits[first >> 3 : (first + count + 7) >> 3], bitorder="little")
            return np.asarray(window[first & 7 :][:count] == 0)

        return clean

    def extents(self) -> list[Extent]:
        """The dirty bytes."""
        found = self.runs()
        assert self.slot
        return kernels.extents_of(found, self.slot.granularity, self.slot.size)


def _in_use(directory: Path) -> bool:
    try:
        fd = open_regular(directory / "lock", os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def view(state_dir: Path, vm: str, disk: str, name: str) -> BitmapView:
    """One bitmap, looked at. Raises `BitmapError` when there is none of that name."""
    return view_file(state_dir / component(vm) / component(disk) / (component(name) + SUFFIX))


def view_file(path: Path) -> BitmapView:
    """As `view`, of the file at its place in a state directory."""
    directory = path.parent
    vm, disk, name = (unquote(part) for part in (directory.parent.name, directory.name, path.name.removesuffix(SUFFIX)))
    if not path.exists():
        buried = path.with_name(path.name + ".invalid")
        if buried.exists():
            return BitmapView(vm, disk, name, buried, None, Reason.TRACKING_FAILED, _in_use(directory))
        raise BitmapError(f"no bitmap {name} of disk {disk} of {vm}", hint="See: incbak bitmap list")
    slot, both = _read_slots(path)
    reason: Reason | None = slot if isinstance(slot, Reason) else None
    if isinstance(slot, Slot) and slot.flags & Flag.INVALID:
        reason = Reason(slot.reason) if slot.reason in set(Reason) else Reason.INVALIDATED
    elif isinstance(slot, Slot) and slot.flags & Flag.CLEAN and not both:
        reason = Reason.HEADER
    return BitmapView(vm, disk, name, path, slot if isinstance(slot, Slot) else None, reason, _in_use(directory))


def views(state_dir: Path, vm: str | None = None) -> list[BitmapView]:
    """All bitmaps below the state directory (of one VM), sorted by VM, disk and name."""
    found = []
    for directory in sorted(state_dir.glob("*/*/") if vm is None else state_dir.glob(f"{component(vm)}/*/")):
        owner, disk = name_of(directory.parent.name), name_of(directory.name)
        for name in sorted(_names(directory)) if owner and disk else ():
            found.append(view_file(directory / (component(name) + SUFFIX)))
    return found


def get_dirty_blocks(state_dir: Path, vm: str, disk: str, name: str) -> list[Extent]:
    """``getDirtyBlocks`` of the 2013 thread: what the guest wrote since the backup that the bitmap is named after."""
    return view(state_dir, vm, disk, name).extents()


def invalidate(state_dir: Path, vm: str, disk: str, name: str, reason: Reason = Reason.INVALIDATED) -> None:
    """Make a bitmap invalid durably. Raises `LockedError` when an owner has it open."""
    store = BitmapStore(state_dir, vm, disk)
    if not store.path(name).exists():
        raise BitmapError(f"no bitmap {name} of disk {disk} of {vm}", hint="See: incbak bitmap list")
    store.lock()
    try:
        store.give_up(name, reason)
    finally:
        store.unlock()

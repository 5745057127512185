"""The state directory: one directory per disk of a VM, with its bitmaps, its identity and its lock."""

from __future__ import annotations

import fcntl
import os
import uuid
from contextlib import suppress
from pathlib import Path

import msgspec

from incbak import durable
from incbak.bitmap import format as fmt
from incbak.bitmap.create import create_file, new_slot
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import Slot
from incbak.bitmap.identity import Identity, read_identity, write_identity
from incbak.bitmap.judge import Header, judge, judge_body, read_header, said_invalid, why_put_aside
from incbak.bitmap.look import BitmapView, get_dirty_blocks, view, view_file, views
from incbak.bitmap.names import ABOUT, BURIED, SUFFIX, component, names_in
from incbak.bitmap.owner import Owner, said_owner, say_owner
from incbak.errors import BitmapError, LockedError
from incbak.fingerprint import Fingerprint
from incbak.reasons import Reason

__all__ = [
    "SUFFIX",
    "BitmapStore",
    "BitmapView",
    "component",
    "get_dirty_blocks",
    "invalidate",
    "view",
    "view_file",
    "views",
]


class BitmapStore:
    """The bitmaps of one disk of one VM: ``<state dir>/<vm>/<disk>/<name>.bitmap``."""

    def __init__(self, state_dir: Path, vm: str, disk: str) -> None:
        self.vm, self.disk = vm, disk
        self.directory = state_dir / component(vm) / component(disk)
        self._lock_fd: int | None = None
        self.uuid = b""

    def lock(self, by: Owner = Owner.COMMAND) -> None:
        """Become the owner of this disk's bitmaps, until `unlock` or death. Raises `LockedError` if there is one."""
        durable.make_dir(self.directory)
        fd = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            who, hint = said_owner(fd)
            os.close(fd)
            raise LockedError(f"the bitmaps of disk {self.disk} of {self.vm} are in use{who}", hint=hint) from None
        say_owner(fd, by)
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
        return self.directory / ABOUT

    def note_image(self, image: Path, form: str = "") -> None:
        """Remember where the image is, so that `disown` finds the bitmaps of an image that is overwritten.

        ``form``: its format, if it is known; else what is remembered stays. Call it before anything is opened.
        """
        if not (found := read_identity(self._about)):
            return
        now = msgspec.structs.replace(found, image=os.path.abspath(image), format=form or found.format)
        if now != found:
            write_identity(self._about, now)

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
        made = create_file(self.path(name), slot)
        return Bitmap(self.path(name), made, Found.CREATED, State.DIRTY)

    def _bury_leftover(self, name: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self.directory / (component(name) + SUFFIX + BURIED))

    def names(self) -> list[str]:
        """The names of all bitmap files here, sorted."""
        return sorted(names_in(self.directory))

    def open(self, name: str, disk: Fingerprint, *, sampling: bool = False) -> Bitmap | Reason:
        """The bitmap ``name`` if it may be believed, else why not. The table of the package docstring, row by row.

        With ``sampling`` also one that is `Found.PROVISIONAL`, which stays as it is on disk: close it with ``None``.
        """
        path = self.path(name)
        if not path.exists():
            aside = path.with_name(path.name + BURIED)
            return why_put_aside(aside) if aside.exists() else Reason.TRACKING_FAILED
        header = read_header(path)
        if isinstance(header, Reason):
            return header
        verdict = judge(header, name, self.uuid, disk, sampling=sampling)
        if isinstance(verdict, Reason):
            return verdict
        try:
            return _taken(path, header.slot, verdict, disk)
        except OSError:  # a sector that cannot be read, or a full disk that takes no store
            return Reason.HEADER

    def open_all(self, disk: Fingerprint, *, sampling: bool = False) -> tuple[list[Bitmap], dict[str, Reason]]:
        """Every bitmap that `open` gives, and why it does not give the others. Never raises for what a file holds."""
        good: list[Bitmap] = []
        bad: dict[str, Reason] = {}
        for name in self.names():
            found = self.open(name, disk, sampling=sampling)
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
        header = read_header(path)
        if isinstance(header, Header) and said_invalid(header.slot):
            return
        try:
            bitmap = _openable(header, path)
        except OSError:
            os.rename(path, path.with_name(path.name + BURIED))
            durable.sync_dir(self.directory)
            return
        bitmap.invalidate(reason)
        bitmap.close(None)

    def remove(self, name: str) -> None:
        """Remove a bitmap's file durably; one that is open must be closed by the caller first or after."""
        durable.remove(self.directory / (component(name) + SUFFIX + BURIED))
        durable.remove(self.path(name))


def _openable(header: Header | Reason, path: Path) -> Bitmap:
    if isinstance(header, Reason) or header.length != fmt.layout(header.slot)[2]:
        raise OSError(f"{path} is not a whole bitmap")
    return Bitmap(path, header.slot, Found.INVALID, State.DIRTY)


def _taken(path: Path, slot: Slot, found: Found, disk: Fingerprint) -> Bitmap | Reason:
    """The bitmap, its body judged too, as this owner's."""
    untouched = found in (Found.CLEAN, Found.PROVISIONAL)
    bitmap = Bitmap(path, slot, found, State.CLEAN if untouched else State.DIRTY)
    if reason := judge_body(slot, found, bitmap._body, bitmap._coarse):
        bitmap.close(None)
        return reason
    if found is Found.COARSE:
        bitmap.mark_touched_regions()
    bitmap.trust_coarse_map()
    if not untouched:
        bitmap.adopt(disk)
    return bitmap


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

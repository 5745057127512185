"""Bitmap files as they stand, read without owning them: no lock is held, and nothing is changed.

A bitmap that a live owner has is what its header says; of any other the judgement is the one that its next owner will
come to (`judge`), with the image as it is now. What is not to be believed has a reason, and no extents.
"""

from __future__ import annotations

import fcntl
import os
import uuid
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from incbak.bitmap import bits as kernels
from incbak.bitmap import format as fmt
from incbak.bitmap.body import read_exactly
from incbak.bitmap.format import REGION, REGION_SHIFT, TOUCHED, Flag, Slot
from incbak.bitmap.identity import RAW, Identity, read_identity
from incbak.bitmap.judge import Found, Header, judge, judge_body, read_body, read_header, said_invalid, why_put_aside
from incbak.bitmap.names import ABOUT, BURIED, SUFFIX, component, name_of, names_in
from incbak.errors import BitmapError
from incbak.extents import Extent
from incbak.fingerprint import Fingerprint, of_content, take_path
from incbak.opening import open_regular
from incbak.reasons import Reason


@dataclass(frozen=True)
class BitmapView:
    """A bitmap file as it stands: a live owner may be marking meanwhile.

    ``found``: how its next owner would find it; ``None`` where it has one, or is not to be believed.
    """

    vm: str
    disk: str
    name: str
    path: Path
    slot: Slot | None
    reason: Reason | None
    in_use: bool
    found: Found | None = None

    @property
    def durably_invalid(self) -> bool:
        """Whether the file itself says so: then nothing that happens to the image brings it back."""
        return self.slot is None or bool(self.slot.flags & Flag.INVALID)

    def runs(self) -> kernels.Runs:
        """The dirty clusters as (first, count). Raises `BitmapError` when the bitmap is not to be believed."""
        bits = self._bits()
        assert self.slot
        return kernels.runs(bits, self.slot.clusters)

    def _bits(self) -> kernels.Bits:
        fd, slot = self._opened()
        start, coarse, _ = fmt.layout(slot)
        try:
            bits = _read(fd, self.path, start, kernels.bytes_for(slot.clusters))
            if self.found is Found.COARSE:
                return _with_regions(bits, slot, _read(fd, self.path, coarse, slot.regions))
            return bits
        finally:
            os.close(fd)

    def _opened(self) -> tuple[int, Slot]:
        """Open the file for reading, which has to be one to believe."""
        if self.slot is None or self.reason:
            why = self.reason.text if self.reason else "its header does not verify"
            what = "cannot be read" if self.slot is None else "is not to be believed"
            hint = "The next backup reads the whole disk."
            raise BitmapError(f"bitmap {self.path} {what}: {why}", reason=self.reason, hint=hint)
        try:
            fd = open_regular(self.path, os.O_RDONLY)
        except OSError as e:
            raise _unreadable(self.path, e) from e
        if os.fstat(fd).st_size != fmt.layout(self.slot)[2]:
            os.close(fd)
            raise BitmapError(f"bitmap {self.path} has a wrong size", reason=Reason.HEADER)
        return fd, self.slot

    def clean_mask(self) -> Callable[[int, int], NDArray[np.bool_]]:
        """A function from (first cluster, count) to which of them are not marked *now*. Raises as `runs`, as it does.

        What a power cut left of a bitmap has no owner that marks, and is read once.
        """
        if self.found is Found.COARSE:
            bits = self._bits()
            return lambda first, count: _clean(bits[first >> 3 : (first + count + 7) >> 3], first, count)
        return _CleanMask(*self._opened(), self.path)

    def extents(self) -> list[Extent]:
        """The dirty bytes. Raises as `runs`."""
        found = self.runs()
        assert self.slot
        return kernels.extents_of(found, self.slot.granularity, self.slot.size)


class _CleanMask:
    """See `BitmapView.clean_mask`. Owns ``fd``."""

    def __init__(self, fd: int, slot: Slot, path: Path) -> None:
        self._fd, self._path, self._at = fd, path, fmt.layout(slot)[0]
        weakref.finalize(self, os.close, fd)

    def __call__(self, first: int, count: int) -> NDArray[np.bool_]:
        low, end = first >> 3, (first + count + 7) >> 3
        return _clean(_read(self._fd, self._path, self._at + low, end - low), first, count)


def _clean(window: kernels.Bits, first: int, count: int) -> NDArray[np.bool_]:
    """Which are not marked; ``window`` begins with the byte of the first."""
    return np.asarray(np.unpackbits(window, bitorder="little")[first & 7 :][:count] == 0)


def _read(fd: int, path: Path, at: int, length: int) -> kernels.Bits:
    """A mapping would end the process where a sector cannot be read."""
    try:
        return np.frombuffer(read_exactly(fd, at, length), dtype=np.uint8)
    except OSError as e:
        raise _unreadable(path, e) from e


def _unreadable(path: Path, e: OSError) -> BitmapError:
    hint = "The next backup reads the whole disk."
    return BitmapError(f"bitmap {path} cannot be read: {e.strerror or e}", reason=Reason.HEADER, hint=hint)


def _with_regions(bits: kernels.Bits, slot: Slot, coarse: kernels.Bits) -> kernels.Bits:
    """After a power cut: all of each touched region, as `Bitmap.mark_touched_regions` marks it."""
    marked, shift = np.array(bits), slot.granularity.bit_length() - 1
    for region in np.flatnonzero(coarse == TOUCHED).tolist():
        first = (region << REGION_SHIFT) >> shift
        kernels.set_range(marked, first, min(first + max(1, REGION >> shift), slot.clusters) - 1)
    return marked


def owned(directory: Path) -> bool:
    """Return whether a process holds the bitmaps of the disk with this directory. Raises `OSError`."""
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


def view_file(path: Path, image: Fingerprint | None = None, *, sampling: bool = False) -> BitmapView:
    """As `view`, of the file at its place in a state directory; ``image``: what the disk's image is now, if known.

    ``sampling``: as in `judge`.
    """
    directory = path.parent
    vm, disk, name = (unquote(part) for part in (directory.parent.name, directory.name, path.name.removesuffix(SUFFIX)))
    in_use = owned(directory)
    if not path.exists():
        buried = path.with_name(path.name + BURIED)
        if buried.exists():
            return BitmapView(vm, disk, name, buried, None, why_put_aside(buried), in_use)
        raise BitmapError(f"no bitmap {name} of disk {disk} of {vm}", hint="See: incbak bitmap list")
    header = read_header(path)
    if isinstance(header, Reason):
        return BitmapView(vm, disk, name, path, None, header, in_use)
    verdict = _of_an_owner(header) if in_use else _of_nobody(header, path, name, image, sampling)
    reason, found = (verdict, None) if isinstance(verdict, Reason) else (None, verdict)
    return BitmapView(vm, disk, name, path, header.slot, reason, in_use, found)


def _of_an_owner(header: Header) -> Reason | None:
    if reason := said_invalid(header.slot):
        return reason
    return Reason.HEADER if header.slot.flags & Flag.CLEAN and not header.both else None


def _of_nobody(header: Header, path: Path, name: str, image: Fingerprint | None, sampling: bool) -> Found | Reason:
    """What the next owner will find."""
    identity = read_identity(path.parent / ABOUT)
    if identity is None:
        return said_invalid(header.slot) or Reason.WRONG_DISK
    if image is None and not said_invalid(header.slot):
        image = _image(identity, header.slot.size)
    found = judge(header, name, uuid.UUID(identity.uuid).bytes, image, sampling=sampling)
    if isinstance(found, Reason):
        return found
    try:
        return judge_body(header.slot, found, *read_body(path, header.slot)) or found
    except OSError:
        return Reason.HEADER


def _image(identity: Identity, size: int) -> Fingerprint | None:
    """What the image is now; of a watched image of another format, with the size of the disk, as `watch` takes it."""
    raw = identity.format in ("", RAW)
    try:
        found = take_path(Path(identity.image), raw=raw) if identity.image else None
    except OSError:
        return None
    return found if found is None or raw else of_content(found, size)


def views(state_dir: Path, vm: str | None = None) -> list[BitmapView]:
    """All bitmaps below the state directory (of one VM), sorted by VM, disk and name."""
    found = []
    for directory in sorted(state_dir.glob("*/*/") if vm is None else state_dir.glob(f"{component(vm)}/*/")):
        if name_of(directory.parent.name) and name_of(directory.name):
            found += views_in(directory)
    return found


def views_in(directory: Path, image: Fingerprint | None = None, *, sampling: bool = False) -> list[BitmapView]:
    """All bitmaps of one disk, sorted by name; ``image`` and ``sampling`` as in `view_file`."""
    paths = [directory / (component(name) + SUFFIX) for name in sorted(names_in(directory))]
    return [view_file(path, image, sampling=sampling) for path in paths]


def get_dirty_blocks(state_dir: Path, vm: str, disk: str, name: str) -> list[Extent]:
    """``getDirtyBlocks`` of the 2013 thread: what the guest wrote since the backup that the bitmap is named after.

    Raises `BitmapError` with the reason where that is not known: then all of the disk may have been written.
    """
    return view(state_dir, vm, disk, name).extents()

"""Bitmap files as they stand, read without owning them: no lock is held, and nothing is changed.

A bitmap that a live owner has is what its header says; of any other the judgement is the one that its next owner will
come to (`judge`), with the image as it is now. What is not to be believed has a reason, and no extents.
"""

from __future__ import annotations

import fcntl
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from incbak.bitmap import bits as kernels
from incbak.bitmap import format as fmt
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
        if self.slot is None or self.reason:
            why = self.reason.text if self.reason else "its header does not verify"
            what = "cannot be read" if self.slot is None else "is not to be believed"
            hint = "The next backup reads the whole disk."
            raise BitmapError(f"bitmap {self.path} {what}: {why}", reason=self.reason, hint=hint)
        start, coarse, end = fmt.layout(self.slot)
        if os.stat(self.path).st_size != end:
            raise BitmapError(f"bitmap {self.path} has a wrong size", reason=Reason.HEADER)
        mapped = np.memmap(self.path, dtype=np.uint8, mode="r", offset=0, shape=(end,))
        bits = mapped[start : start + kernels.bytes_for(self.slot.clusters)]
        if self.found is Found.COARSE:
            return _with_regions(bits, self.slot, mapped[coarse : coarse + self.slot.regions])
        return bits

    def clean_mask(self) -> Callable[[int, int], NDArray[np.bool_]]:
        """A function from (first cluster, count) to which of them are not marked *now*. Raises as `runs`."""
        bits = self._bits()

        def clean(first: int, count: int) -> NDArray[np.bool_]:
            window = np.unpackbits(bits[first >> 3 : (first + count + 7) >> 3], bitorder="little")
            return np.asarray(window[first & 7 :][:count] == 0)

        return clean

    def extents(self) -> list[Extent]:
        """The dirty bytes. Raises as `runs`."""
        found = self.runs()
        assert self.slot
        return kernels.extents_of(found, self.slot.granularity, self.slot.size)


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

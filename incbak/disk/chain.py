"""What belongs to a qcow2 image beside its own file: backing files, and the file that holds its data.

QEMU would open whatever the headers name, of any format that it guesses, and by any protocol. Here each layer is looked
at before QEMU sees it, and QEMU is told each file and driver:

- a name is a path: never ``json:`` or a protocol; a relative one is relative to the directory of its image;
- a file must be in the directory of the image whose format its owner has decided, or be allowed (``--allow-backing``:
  a file, or a directory with all below), whatever links lead there; of an image whose format was guessed, allowed only;
- its format is what the header says; a header that does not say it is an error, nothing is guessed;
- it is a regular file or block device, and no layer comes twice.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from incbak.disk import qcow2
from incbak.disk.file import forget_cached
from incbak.errors import DiskError
from incbak.opening import open_image

_DEEPEST = 200
_PROTOCOL = re.compile(r"[^/]*:")  # as QEMU tells a protocol from a path
_FORMATS = ("raw", "qcow2")


@dataclass(frozen=True)
class Layer:
    """One file of a chain; ``data``: the file that holds the data of a qcow2 image, or ``None``."""

    path: Path
    format: str
    data: Path | None = None


@dataclass(frozen=True)
class Allowed:
    """``paths``: files and directories. ``beside``: the directory of the image too."""

    paths: Sequence[Path] = ()
    beside: bool = True

    def has(self, path: Path, image: Path) -> bool:
        """Whether ``path``, named in the chain of ``image``, may be read."""
        real = Path(os.path.realpath(path))
        places = [Path(os.path.realpath(p)) for p in self.paths]
        if self.beside:
            own = [Path(os.path.realpath(image.parent)), Path(os.path.realpath(image)).parent]
            if real.parent in own:
                return True
        return any(real == place or place in real.parents for place in places)


def read_chain(path: Path, allowed: Allowed) -> list[Layer]:
    """The layers of the qcow2 image ``path``, itself first. Raises `DiskError`."""
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    at, form = path, "qcow2"
    while True:
        _check_file(at, seen)
        header = qcow2.read_header(at) if form == "qcow2" else None
        layers.append(Layer(at, form, _data_file(at, header, path, allowed) if header else None))
        if not header or not header.backing:
            return layers
        if len(layers) > _DEEPEST:
            raise DiskError(f"image {path} has more than {_DEEPEST} backing files")
        below = _named(at, header.backing, "backing file", path, allowed)
        if header.backing_format not in _FORMATS:
            said = f"of the format {header.backing_format}" if header.backing_format else "without saying its format"
            hint = f"Say raw or qcow2: qemu-img rebase -u -b {header.backing} -F FORMAT {at}"
            raise DiskError(f"image {at} names a backing file {said}: {header.backing}", hint=hint)
        at, form = below, header.backing_format


def _data_file(at: Path, header: qcow2.Header, image: Path, allowed: Allowed) -> Path | None:
    if not header.features & qcow2.Feature.DATA_FILE:
        return None
    if not header.data_file:
        raise DiskError(f"image {at} has its data in another file and does not name it")
    found = _named(at, header.data_file, "data file", image, allowed)
    _check_file(found, set())
    return found


def _named(at: Path, name: str, what: str, image: Path, allowed: Allowed) -> Path:
    if _PROTOCOL.match(name):
        raise DiskError(f"image {at} names a {what} that is no path: {name}", hint="Only files are followed.")
    found = at.parent / name
    if not allowed.has(found, image):
        hint = f"If it belongs to the disk, allow it: --allow-backing {os.path.realpath(found)}"
        raise DiskError(f"image {at} names a {what} that is not allowed: {found}", hint=hint)
    return found


def _check_file(path: Path, seen: set[tuple[int, int]]) -> None:
    try:
        info = os.stat(path)
    except (OSError, ValueError) as e:
        raise DiskError(f"cannot look at {path}: {getattr(e, 'strerror', e)}") from e
    if not stat.S_ISREG(info.st_mode) and not stat.S_ISBLK(info.st_mode):
        raise DiskError(f"{path} is neither a file nor a block device")
    if (info.st_dev, info.st_ino) in seen:
        raise DiskError(f"{path} is its own backing file")
    seen.add((info.st_dev, info.st_ino))
    if stat.S_ISBLK(info.st_mode):
        _read_from_storage(path)


def _read_from_storage(path: Path) -> None:
    """QEMU reads through the page cache of a device, which may be outdated: see `incbak.disk.file.forget_cached`."""
    with suppress(OSError):  # what cannot be opened fails when it is read
        fd = open_image(path, os.O_RDONLY)
        try:
            forget_cached(fd)
        finally:
            os.close(fd)

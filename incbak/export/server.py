"""The disks of a backup behind an NBD server."""

from __future__ import annotations

from itertools import islice

from incbak.export.image import BackupImage
from incbak.export.overlay import Overlay

_ALLOCATION = "base:allocation"
_HOLE, _ZERO = 1, 2
_EXTENTS = 64
"""In one answer. QEMU asks for one at a time: on a disk in many pieces, more would be found out in vain each time."""


class ImageExport:
    """See `incbak.nbd.export.Export`. Every request may wait for the repository, so workers serve them."""

    multi_conn = True

    def __init__(self, image: BackupImage | Overlay, description: str) -> None:
        self.image, self.description = image, description
        self.name, self.size, self.read_only = image.name, image.size, image.read_only

    def contexts(self) -> list[str]:
        """``base:allocation``."""
        return [_ALLOCATION]

    def open(self) -> ImageDevice:
        """One connection's way in."""
        return ImageDevice(self.image)


class ImageDevice:
    """See `incbak.nbd.export.Device`."""

    def __init__(self, image: BackupImage | Overlay) -> None:
        self._image = image
        self.size, self.read_only = image.size, image.read_only
        self.read_into = image.read_into

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        """Never: content may have to be fetched."""
        return False

    def may_block(self, offset: int, length: int) -> bool:
        """Always."""
        return True

    def write(self, buf: memoryview, offset: int) -> None:
        """Into the overlay."""
        self._overlay().write(buf, offset)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Into the overlay."""
        self._overlay().write_zeroes(offset, length)

    def trim(self, offset: int, length: int) -> None:
        """Zeroes, as most disks make of it."""
        self._overlay().write_zeroes(offset, length)

    def _overlay(self) -> Overlay:
        assert isinstance(self._image, Overlay)  # the server refuses writes to what is read-only
        return self._image

    def cache(self, offset: int, length: int) -> None:
        """Reading ahead does that."""

    def flush(self) -> None:
        """What is thrown away need not be durable."""

    def status(self, offset: int, length: int, context: str, limit: int) -> list[tuple[int, int]]:
        """(length, flags) of a prefix of the range."""
        found = islice(self._image.extents(offset, length), min(limit, _EXTENTS))
        return [(e.length, (_HOLE if e.hole else 0) | (_ZERO if e.zero else 0)) for e in found]

    def close(self) -> None:
        """Nothing is held for a connection."""

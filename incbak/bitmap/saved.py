"""A bitmap that somebody else has kept (QEMU, in its memory): its file appears at once, whole, with its flag set."""

from __future__ import annotations

from dataclasses import replace

from incbak import durable
from incbak.bitmap import bits as kernels
from incbak.bitmap.create import create_file, new_slot
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.store import BitmapStore, component
from incbak.fingerprint import Fingerprint

durable.declare("saved.filled", "saved.closed", "saved.named")


def write_clean(store: BitmapStore, name: str, granularity: int, bits: kernels.Bits, disk: Fingerprint) -> None:
    """The bitmap ``name`` with ``bits``, of a disk that is on its storage and has the fingerprint ``disk``.

    The caller holds the store's lock, and nobody has written to the disk since ``bits`` were taken. An invalid file of
    that name is replaced in one step: at no moment is there one that could be believed and lacks a bit. That is why the
    file is made under a name that nobody looks at. Raises `BitmapError` or `DurabilityError`.
    """
    temporary = store.directory / f".{component(name)}.saved.tmp"
    temporary.unlink(missing_ok=True)
    slot = new_slot(name, disk.size, granularity, store.uuid, disk, True)
    create_file(temporary, slot)
    try:
        bitmap = Bitmap(temporary, replace(slot, sequence=slot.sequence + 1), Found.CREATED, State.DIRTY)
        try:
            bitmap.fill(bits)
            durable.crash_point("saved.filled")
            bitmap.close(disk)
        finally:
            bitmap.close(None)
        durable.crash_point("saved.closed")
        durable.commit(temporary, store.path(name), replace=True)
        durable.crash_point("saved.named")
    finally:
        temporary.unlink(missing_ok=True)

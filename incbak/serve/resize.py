"""Another size for a disk, beside its guest.

The order, so that a kill or a power cut at any moment leaves no bitmap that calls something clean and is believed:

1. nothing may have a point in time of the disk, or use one of its bitmaps: a job's clusters are those of one size;
2. every bitmap in a file is made invalid, durably, with the reason ``resized``: the next backup reads the whole disk;
3. the disk is drained, gets its size, and the bitmaps in memory theirs; what is new counts as written;
4. clients that come from now on see the new size. Those that are there keep theirs: what they ask for beyond the end
   of a disk that was cut is refused, for a write there would make the image longer again;
5. the size is durable before the answer.
"""

from __future__ import annotations

import logging

from incbak import durable
from incbak.bitmap.file import Bitmap
from incbak.extents import whole_sectors
from incbak.reasons import Reason
from incbak.serve.schema import QmpError
from incbak.serve.tracker import TrackedDisk
from incbak.serve.vm import check_usable

log = logging.getLogger(__name__)

durable.declare("serve.resize-invalidated", "serve.resize-resized")

LIMIT = 9223372035781033984
"""QEMU's, in bytes: what is left of 63 bits when offsets are rounded up."""
_DRAIN_TIMEOUT = 30.0


def resize(tracked: TrackedDisk, size: int) -> None:
    """Give the disk ``size`` bytes, in whole sectors. Raises `QmpError`, `BitmapError`, `DrainTimeoutError` or
    `OSError`; then the disk has the size that it had, though its bitmaps may have become invalid, or a flush failed
    afterwards.
    """
    _check(tracked, size)
    size = whole_sectors(size)
    if size == tracked.size and size == tracked.disk.size:
        return
    for bitmap in tracked.bitmaps.values():
        if isinstance(bitmap, Bitmap):
            bitmap.invalidate(Reason.RESIZED)
    durable.crash_point("serve.resize-invalidated")
    before = tracked.size
    with tracked.gate.drained(_DRAIN_TIMEOUT):
        old = tracked.resize(size)
    del old
    durable.crash_point("serve.resize-resized")
    tracked.disk.flush()
    log.warning("disk %s: resized from %d to %d bytes", tracked.name, before, size)


def _check(tracked: TrackedDisk, size: int) -> None:
    if size < 0:
        raise QmpError("Parameter 'size' expects a >0 size")
    if size > LIMIT:
        raise QmpError(f"offset({size}) exceeds maximum({LIMIT})")
    if tracked.read_only:
        raise QmpError("Block node is read-only")
    if tracked.copied or tracked.written_by is not None:
        raise QmpError(f"Node '{tracked.name}' is busy: block device is in use by block job: backup")
    for name in tracked.busy:
        check_usable(tracked, tracked.bitmaps[name])
    tracked.disk.check_resize(size)

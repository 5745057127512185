"""The fingerprint of a disk, taken when any later write shows in it: the clock has gone past its times.

File systems take times from a clock that ticks every few milliseconds; some keep whole seconds, or pairs of them. A
fingerprint that is taken earlier is also that of the disk after a write by another program within the same tick.
"""

from __future__ import annotations

import time

from incbak import device
from incbak.bitmap.continuity import may_repeat
from incbak.disk.base import Disk
from incbak.disk.file import FileDisk
from incbak.fingerprint import Fingerprint

SETTLE_SECONDS = 3.0
"""More than the grain of any file system."""


def settled(disk: Disk) -> tuple[Fingerprint, bool]:
    """Wait up to `SETTLE_SECONDS`; return the fingerprint, and whether a later write would show in it.

    It would not if another program writes to the disk all the time. Raises `OSError`.
    """
    if isinstance(disk, FileDisk) and disk.is_block:
        disk.flush()
        device.settle(disk.proc)
    deadline = time.monotonic() + SETTLE_SECONDS
    while may_repeat(found := disk.fingerprint(), time.time_ns()):
        if time.monotonic() > deadline:
            return found, False
        time.sleep(0.002)
    return found, True

"""The fingerprint of a disk, taken when any later write shows in it: the clock has gone past its times.

File systems take times from a clock that ticks every few milliseconds; some keep whole seconds, or pairs of them. A
fingerprint that is taken earlier is also that of the disk after a write by another program within the same tick.
"""

from __future__ import annotations

import time
from typing import Protocol

from incbak.bitmap.continuity import may_repeat
from incbak.fingerprint import Fingerprint

SETTLE_SECONDS = 3.0
"""More than the grain of any file system."""


class Settling(Protocol):
    """What a disk must be able to do for it."""

    def settle(self) -> None:
        """Bring what was written to the device, whose counts show it then."""

    def fingerprint(self) -> Fingerprint:
        """Return the disk's state."""


def settled(disk: Settling, seconds: float | None = None) -> tuple[Fingerprint, bool]:
    """Wait up to ``seconds`` (`SETTLE_SECONDS`); return the fingerprint, and whether a later write would show in it.

    It would not if another program writes to the disk all the time. Raises `OSError`.
    """
    disk.settle()
    deadline = time.monotonic() + (SETTLE_SECONDS if seconds is None else seconds)
    while may_repeat(found := disk.fingerprint(), time.time_ns()):
        if time.monotonic() > deadline:
            return found, False
        time.sleep(0.002)
    return found, True

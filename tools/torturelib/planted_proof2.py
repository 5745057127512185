"""Faults of what is believed of a disk that nobody tracked: its ctime, its identity, samples of it."""

from __future__ import annotations

from torturelib.planted import Fault, unit

FAULTS = (
    Fault(
        "ctime-explained-by-attributes",
        "incbak/bitmap/continuity.py",
        "        return Reason.DISK_CHANGED if now.attributes == before.attributes else Reason.UNPROVEN\n",
        "        return Reason.DISK_CHANGED if now.attributes == before.attributes else None\n",
        unit("bitmap/test_continuity", "test_a_real_file"),
    ),
    Fault(
        "watch-compares-no-ctime",
        "incbak/watch/disks.py",
        "        return without_ctime(self.seen()) if self.ignore_ctime else self.seen()\n",
        "        return without_ctime(self.seen())\n",
        unit("watch/test_disks", "test_an_image_that_was_dated_back_shows"),
    ),
)

"""What is built on a device and keeps it busy, in words: device-mapper, md, on it or on one of its partitions.

`open` with ``O_EXCL`` refuses such a device with no more than "busy"; nothing has it open or mounted either.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_BLOCK = Path("/sys/dev/block")


def holders(path: Path) -> list[str]:
    """Return each holder of the device, as the end of "it is ...": ``used by dm-3 (vg-root)``."""
    try:
        info = path.stat()
    except OSError:
        return []
    device = _BLOCK / f"{os.major(info.st_rdev)}:{os.minor(info.st_rdev)}"
    if not stat.S_ISBLK(info.st_mode):
        return []
    parts = sorted(place.parent for place in device.glob("*/partition"))
    return [_named(holder) for each in (device, *parts) for holder in sorted((each / "holders").glob("*"))]


def _named(holder: Path) -> str:
    try:
        label = (holder / "dm" / "name").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        label = ""
    return f"used by {holder.name}" + (f" ({label})" if label else "")

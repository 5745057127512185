"""Giving up the bitmaps of an image that is overwritten by something else than its guest."""

from __future__ import annotations

import os
from pathlib import Path

from incbak.bitmap.identity import read_identity
from incbak.bitmap.store import invalidate, views
from incbak.reasons import Reason


def disown(state_dir: Path, image: Path) -> list[str]:
    """Invalidate the bitmaps of ``image``, which is about to be overwritten by something else than its guest.

    A block device has no time of change that would tell so later. It is looked for by the path that it was served by,
    which may be a link that leads elsewhere after each boot. Returns their names; raises as `invalidate` does.
    """
    real = os.path.realpath(image)
    done = []
    for found in views(state_dir):
        identity = read_identity(found.path.parent / "disk.json")
        if identity and os.path.realpath(identity.image) == real and not found.durably_invalid:
            invalidate(state_dir, found.vm, found.disk, found.name, Reason.DISK_CHANGED)
            done.append(found.name)
    return done

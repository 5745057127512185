"""Which file or device a running engine has open for each disk: a node can get another one and keep its bitmaps.

A bitmap in the engine's memory says nothing of another file, whatever its name (``blockdev-reopen``). So the record
keeps what was open, and within one boot it has to be the same: by its device and inode, or by the number of the block
device. File systems and devices may get other numbers after a boot, and another host has others; there, and for a
bitmap that the image itself stores, an image is another one only if its name is another one too.
"""

from __future__ import annotations

import stat
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from incbak import host
from incbak.backup.facts import Peer
from incbak.disk.stacking import Key, key_of
from incbak.engine.base import Description

Opened = Sequence[Any]
"""As in a record: path, inode, device, boot; older ones have path and inode. Of a block device, its number and -1; of
what is not known, ``None`` twice."""


def opened_of(description: Description, peer: Peer) -> dict[str, list[Any]]:
    """Return what a running engine has open for each disk."""
    images: Mapping[str, Any] = description.config.get("images", {})
    boot = host.boot_id().hex()
    named = {d.name: path for d in description.disks if (path := str(images.get(d.name, "")))}
    return {name: [path, *_found(path, peer), boot] for name, path in named.items()}


def _found(path: str, peer: Peer) -> list[int | None]:
    looked = peer.look(path)
    if looked is None or not (stat.S_ISREG(looked[1].st_mode) or stat.S_ISBLK(looked[1].st_mode)):
        return [None, None]
    return [*_numbers(key_of(looked[1]))]


def _numbers(key: Key) -> list[int]:
    return [key.rdev, -1] if key.rdev else [key.inode, key.device]


def is_another(before: Opened, now: Opened, held: Collection[Key], *, in_memory: bool) -> bool:
    """Return whether the engine has another image open now than when the record was made.

    ``held``: all that it has open, where that is seen; an image that was renamed is among it. ``in_memory``: the bitmap
    to be believed is not stored in the image.
    """
    if len(before) not in (2, 4) or len(now) != 4:
        return False
    if in_memory and len(before) == 4 and before[3] == now[3] and before[1] is not None:
        if now[1] is not None:
            return list(before[1:3]) != list(now[1:3])
        if held:
            return list(before[1:3]) not in [_numbers(key) for key in held]
    return bool(before[0] != now[0] and (now[1] is None or before[1] != now[1]))

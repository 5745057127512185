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
from incbak.backup.facts import Identity, Peer, identity
from incbak.engine.base import Description

Opened = Sequence[Any]
"""As in a record: path, inode, device (both ``None`` where it is not known), boot. Older ones have path and inode."""


def opened_of(description: Description, peer: Peer) -> dict[str, list[Any]]:
    """Return what a running engine has open for each disk."""
    images: Mapping[str, Any] = description.config.get("images", {})
    boot = host.boot_id().hex()
    named = {d.name: path for d in description.disks if (path := str(images.get(d.name, "")))}
    return {name: [path, *_numbers(path, peer), boot] for name, path in named.items()}


def _numbers(path: str, peer: Peer) -> tuple[int | None, int | None]:
    looked = peer.look(path)
    if looked is None or not (stat.S_ISREG(looked[1].st_mode) or stat.S_ISBLK(looked[1].st_mode)):
        return None, None
    device, inode = identity(looked[1])
    return inode, device


def is_another(before: Opened, now: Opened, held: Collection[Identity], *, in_memory: bool) -> bool:
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
            return (before[2], before[1]) not in held
    return bool(before[0] != now[0] and (now[1] is None or before[1] != now[1]))

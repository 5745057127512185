"""``disk.json``, beside a disk's bitmaps: who the disk is, where its image was, and what was written to its device."""

from __future__ import annotations

import uuid
from pathlib import Path

import msgspec

from incbak import durable


class Identity(msgspec.Struct, frozen=True):
    """``image``: where it was last opened. ``writes``: what `incbak.host.device_writes` said at the last clean end.

    ``format``: see `incbak.disk.formats`; empty: raw.
    """

    uuid: str
    image: str = ""
    format: str = ""
    writes: str = ""


def read_identity(path: Path) -> Identity | None:
    """``None`` where there is none that makes sense."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Identity)
        uuid.UUID(found.uuid)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if "\0" in found.image else found


def write_identity(path: Path, identity: Identity) -> None:
    """Durably. Raises `DurabilityError`."""
    durable.write_new(path, [msgspec.json.encode(identity)], replace=True)


def written_since(before: str, now: str) -> bool:
    """Whether the kernel has counted writes to a device; no, where it was set up anew: then nobody knows."""
    return _device(before) == _device(now) and before != now


def _device(writes: str) -> list[str]:
    return writes.split(":")[:2]

"""``disk.json``, beside a disk's bitmaps: who the disk is, and where its image was."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

import msgspec

from incbak import durable
from incbak.opening import open_regular

_LIMIT = 1 << 16
RAW = "raw"
"""The format of an image that is the disk itself."""


class Identity(msgspec.Struct, frozen=True):
    """``image``: where it was last opened. ``format``: see `incbak.disk.formats`; empty: raw."""

    uuid: str
    image: str = ""
    format: str = ""


def read_identity(path: Path) -> Identity | None:
    """``None`` where there is none that makes sense."""
    try:
        found = msgspec.json.decode(_content(path), type=Identity)
        uuid.UUID(found.uuid)
    except (FileNotFoundError, msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return None if "\0" in found.image else found


def _content(path: Path) -> bytes:
    with open(open_regular(path, os.O_RDONLY), "rb") as f:
        return f.read(_LIMIT)


def write_identity(path: Path, identity: Identity) -> None:
    """Durably. Raises `DurabilityError`."""
    durable.write_new(path, [msgspec.json.encode(identity)], replace=True)

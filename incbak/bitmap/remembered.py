"""The format of a disk as the state directory has it, beside its bitmaps."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import msgspec

from incbak import durable
from incbak.bitmap.identity import RAW, Identity, read_identity, write_identity
from incbak.bitmap.store import component


def remembered_format(state_dir: Path, vm: str, disk: str | None, image: Path, default: str) -> tuple[str, str, bool]:
    """(format, where that is written, whether it is this disk for sure); empty texts where there is nothing.

    Without ``disk``: the disk of ``vm`` that has this path, or is called ``default``; or else one that may be it.
    """
    known = {unquote(p.parent.name): p for p in sorted((state_dir / component(vm)).glob("*/disk.json"))}
    here = [p for p in known.values() if _is_at(p, image)]
    if disk is not None:
        sure = [known[disk]] if disk in known else []
    else:
        sure = here or ([known[default]] if default in known else [])
    for place in sure:
        if found := read_identity(place):
            return found.format or RAW, str(place), True
    for place in (*(known.values() if len(known) == 1 and disk is None else ()), *_elsewhere(state_dir, image)):
        if found := read_identity(place):
            return found.format or RAW, str(place), False
    return "", "", False


def remember_format(state_dir: Path, vm: str, disk: str, image: Path, form: str) -> None:
    """Write down the format of a disk that has no bitmaps in the state directory. Raises `DurabilityError`."""
    place = state_dir / component(vm) / component(disk) / "disk.json"
    found = read_identity(place) or Identity(str(uuid.uuid4()))
    now = msgspec.structs.replace(found, image=os.path.abspath(image), format=form)
    if now != found:
        durable.make_dir(place.parent)
        write_identity(place, now)


def _elsewhere(state_dir: Path, image: Path) -> Iterator[Path]:
    return (p for p in sorted(state_dir.glob("*/*/disk.json")) if _is_at(p, image))


def _is_at(place: Path, image: Path) -> bool:
    found = read_identity(place)
    return bool(found and found.image and os.path.realpath(found.image) == os.path.realpath(image))

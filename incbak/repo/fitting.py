"""What goes into a record must come out of it again.

A reader holds a record to limits (`record.LIMIT` and others), so a writer must, too: a record over them would be a
backup that nobody can list, and for which every prune would have to keep everything. So each part has a limit of its
own, far below that of the whole; what is too large, and what a record can do without, is left out with a note that is
told (`fitted`); and what is to be committed is decoded again first, as a reader does it (`proven`). Parts that a user
gives, as attachments, are refused before the run.
"""

from __future__ import annotations

from typing import Any

import msgspec

from incbak.errors import BackupError, DamagedError
from incbak.repo import record as records
from incbak.repo.record import Record

MAX_CONFIG = 4 << 20
"""Bytes, as JSON, of what the engine says of the VM."""
MAX_ATTACHMENTS = 256
MAX_ATTACHED = 8 << 20
"""Bytes of all attachments, as JSON."""
MAX_NOTES = 1000
MAX_TEXT = 2000
"""Characters of a note, of why a disk was read whole, and of other short texts."""


def fitted(made: Record) -> tuple[Record, list[str]]:
    """The record with each part within its limit, and what was left out, in words; that is in its notes, too."""
    lost: list[str] = []
    config = _config(made.config, lost)
    attachments = _attachments(made.attachments, lost)
    notes = [_short(note) for note in made.notes]
    if len(notes) > MAX_NOTES:
        lost.append(f"{len(notes) - MAX_NOTES} of {len(notes)} notes were left out")
        del notes[MAX_NOTES:]
    return msgspec.structs.replace(
        made,
        config=config,
        attachments=attachments,
        notes=(*notes, *lost),
        tags=tuple(map(_clean, made.tags)),
        host=_short(made.host),
        disks=tuple(msgspec.structs.replace(d, detail=_short(d.detail)) for d in made.disks),
    ), lost


def proven(made: Record) -> bytes:
    """The record's file. Raises `BackupError` unless a reader will take it and find in it what was written."""
    try:
        data = records.encode(made)
        if len(data) > records.LIMIT:
            raise DamagedError(f"it has {len(data)} bytes, more than {records.LIMIT}")
        if records.encode(records.decode(made.id, data)) != data:
            raise DamagedError("it does not come out as it went in")
    except (DamagedError, msgspec.MsgspecError, UnicodeError, RecursionError, TypeError) as e:
        what = f"the record of backup {made.id[:8]} of {made.vm!r} could not be read again: {e}"
        raise BackupError(what, hint="Nothing was committed. Attach less, or back up fewer disks at once.") from e
    return data


def _config(config: dict[str, Any], lost: list[str]) -> dict[str, Any]:
    try:
        data = msgspec.json.encode(config)
        msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, TypeError) as e:
        lost.append(_short(f"the configuration of the VM was left out, it cannot be kept: {e}"))
        return {}
    if len(data) > MAX_CONFIG:
        lost.append(f"the configuration of the VM was left out: {len(data)} bytes, more than {MAX_CONFIG}")
        return {}
    return config


def _attachments(given: dict[str, str], lost: list[str]) -> dict[str, str]:
    """Whole files only, in their order, as many as there is room for."""
    kept: dict[str, str] = {}
    room = MAX_ATTACHED
    for name, text in given.items():
        size = size_of(name, text)
        if size > room or len(kept) == MAX_ATTACHMENTS:
            lost.append(_short(f"the attachment {name} was left out: there is no room for it in the record"))
            continue
        kept[name] = text
        room -= size
    return kept


def size_of(name: str, text: str) -> int:
    """What an attachment takes in a record."""
    return len(msgspec.json.encode({_clean(name): _clean(text)}))


def _short(text: str) -> str:
    text = _clean(text)
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 4] + " ..."


def _clean(text: str) -> str:
    """With what is no text, as in a path that is not UTF-8, replaced: JSON cannot hold it."""
    return text.encode(errors="surrogateescape").decode(errors="replace") if _has_surrogates(text) else text


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= c <= "\udfff" for c in text) if not text.isascii() else False

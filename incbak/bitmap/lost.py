"""Why a disk lacks a bitmap that it should have: what the state directory remembers of the runs of its VM.

QEMU keeps the bitmaps of most images in its memory. One that ends with QEMU leaves nothing that could say why, so
``incbak watch`` writes it into ``watch.json``, beside the disk's bitmap files:

- when it attaches to a VM (`note_watched`): from then on the bitmaps are in QEMU. A watch that dies leaves that as its
  last word;
- when QEMU ended and the bitmaps were not saved (`note_end`, with the reason);
- when they were saved (`note_saved`), or it was told to leave the VM alone (`note_left`).

A bitmap that was loaded from a file has its reason there. This only explains: what may be believed is decided without
it, and a note that cannot be read or written costs the explanation.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec

from incbak import durable, host
from incbak.bitmap.judge import read_header, said_invalid, why_put_aside
from incbak.bitmap.look import owned
from incbak.bitmap.names import BURIED, SUFFIX, component, names_in
from incbak.errors import DurabilityError, UsageError
from incbak.reasons import Reason

_NOTE = "watch.json"
_LIMIT = 4096
_WATCHED, _LEFT = "watched", "left"


class Note(msgspec.Struct, frozen=True):
    """``state``: of the watch in boot ``boot``. ``ended_ns``: when those in QEMU were lost last, for ``reason``."""

    state: str = ""
    boot: str = ""
    ended_ns: int = 0
    reason: Reason = Reason.UNSAVED


@dataclass(frozen=True)
class Lost:
    """Why bitmaps of one disk are lost: those with a ``files``, and those of backups made until ``ended_ns``."""

    files: Mapping[str, Reason] = field(default_factory=dict)
    ended_ns: float = 0
    reason: Reason | None = None

    def why(self, name: str, finished: str, *, here: bool) -> Reason | None:
        """Return why there is no bitmap ``name`` of a backup that was ``finished`` then, by this host (``here``)."""
        if name in self.files:
            return self.files[name]
        with suppress(ValueError):
            if here and datetime.fromisoformat(finished).timestamp() * 1e9 <= self.ended_ns:
                return self.reason
        return None


def lost_bitmaps(state_dir: Path | None, vm: str, disks: Iterable[str], *, in_qemu: bool) -> dict[str, Lost]:
    """Return what is known of each disk. ``in_qemu``: the VM runs in QEMU, else nothing can be watching it."""
    found = {}
    for disk in disks if state_dir else ():
        with suppress(OSError, UsageError):
            assert state_dir
            found[disk] = _of_disk(state_dir / component(vm) / component(disk), in_qemu)
    return found


def _of_disk(directory: Path, in_qemu: bool) -> Lost:
    note = _read(directory)
    files = {name: _of_file(directory, name) for name in names_in(directory)} if in_qemu else {}
    alive = in_qemu and owned(directory)
    if (note.state == _WATCHED and not alive) or note.state == _LEFT:
        return Lost(files, float("inf"), _without_a_word(note))
    return Lost(files, note.ended_ns, note.reason if note.ended_ns else None)


def _of_file(directory: Path, name: str) -> Reason:
    """The VM runs, and the bitmap is not in QEMU. A file that could be believed was not loaded."""
    path = directory / (component(name) + SUFFIX)
    if not path.exists():
        return why_put_aside(path.with_name(path.name + BURIED))
    header = read_header(path)
    return header if isinstance(header, Reason) else said_invalid(header.slot) or Reason.UNWATCHED


def _without_a_word(note: Note) -> Reason:
    """The watch is gone. One that was told to leave may have left a VM that ended well."""
    same_boot = note.state == _LEFT or note.boot == host.boot_id().hex()
    return Reason.UNWATCHED if same_boot else Reason.UNCLEAN_SHUTDOWN


# -- the notes of a watch, which holds the disk's lock --------------------------------------------------------------


def note_watched(directory: Path) -> None:
    """A watch attaches: the bitmaps are in QEMU. What a former watch has not told is taken for an end."""

    def watched(before: Note) -> Note:
        now = msgspec.structs.replace(before, state=_WATCHED, boot=host.boot_id().hex())
        if before.state:
            return msgspec.structs.replace(now, ended_ns=time.time_ns(), reason=_without_a_word(before))
        return now

    _change(directory, watched)


def note_end(directory: Path, reason: Reason) -> None:
    """QEMU has ended, and its bitmaps are lost."""
    _change(directory, lambda _: Note(ended_ns=time.time_ns(), reason=reason))


def note_saved(directory: Path) -> None:
    """The bitmaps that QEMU had are in their files."""
    _change(directory, lambda before: msgspec.structs.replace(before, state=""))


def note_left(directory: Path) -> None:
    """The VM goes on without a watch."""
    _change(directory, lambda before: msgspec.structs.replace(before, state=_LEFT))


def _change(directory: Path, change: Callable[[Note], Note]) -> None:
    with suppress(DurabilityError, OSError):
        note = change(_read(directory))
        durable.write_new(directory / _NOTE, [msgspec.json.encode(note)], replace=True)


def _read(directory: Path) -> Note:
    try:
        with (directory / _NOTE).open("rb") as f:
            return msgspec.json.decode(f.read(_LIMIT), type=Note)
    except (OSError, msgspec.MsgspecError, ValueError, RecursionError):
        return Note()

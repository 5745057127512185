"""When each pack was last read and verified whole: ``verified/ID``. By it a check goes on where the last one stopped.

It is kept in the repository, not on the host, since any host may check it, and what one has read the next need not.
Files are never changed: a check that has read something writes a new one with all that is known, durably, and then
removes those that it had read. Two checks at once leave two files, and the later time counts; killed in between, there
is one file too many. A file that does not verify says nothing, and is removed by the next check.

**A pack is never called read that was not.** A time goes in when every blob of the pack was read and compared. It is
the time when that began. With it goes what the pack's file was then (size, inode, time of change): of a pack that was
copied or put back since, nothing is known, and a copied repository is read from the start. A time in the future was a
wrong clock's, and counts for nothing. Rot changes none of these: that is what reading it again is for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import msgspec

from incbak.errors import DamagedError, FormatTooNewError
from incbak.repo.condemned import read_condemned
from incbak.repo.digested import digested, verified_body
from incbak.repo.ids import is_id, new_id
from incbak.repo.storage.base import Storage

VERSION = 1
KIND = "verified"
_LIMIT = 256 << 20
_FAR = 1e11
"""Seconds since 1970 that a date can still be made of."""


class Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """``at``: seconds since 1970; ``whole``: nothing in the pack was damaged; ``file``: what its file was."""

    at: float
    whole: bool
    file: str


class LastCheck(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last check that read data. ``read`` in bytes."""

    at: float
    read: int
    packs: int
    problems: int


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    last: LastCheck | None
    packs: dict[str, Mark]


@dataclass(frozen=True)
class Coverage:
    """How much of what is stored was read. Bytes are of packs as files, condemned ones left out.

    ``oldest``: when the pack was read that was read longest ago, of those that were; ``None`` if none was.
    """

    packs: int
    size: int
    read_packs: int
    read_size: int
    damaged: int
    """Packs in which the last reading found damage."""
    oldest: float | None
    last: LastCheck | None
    now: float

    @property
    def complete(self) -> bool:
        """Whether everything was read at some time."""
        return self.read_packs == self.packs

    @property
    def within(self) -> float | None:
        """Seconds within which all was read that was read at all; ``None`` if nothing was."""
        return None if self.oldest is None else self.now - self.oldest


class Verified:
    """What is known, and what a check adds to it. One thread. ``clock``: seconds since 1970."""

    def __init__(self, storage: Storage, clock: Callable[[], float] = time.time) -> None:
        self._storage, self._clock = storage, clock
        self._marks: dict[str, Mark] = {}
        self._replaces: list[str] = []
        self.last: LastCheck | None = None
        for name in storage.list(KIND):
            self._take(name)

    def _take(self, name: str) -> None:
        if not is_id(name):
            return
        try:
            found = _decode(name, self._storage.read(KIND, name, _LIMIT))
        except FileNotFoundError:
            return
        except FormatTooNewError:
            return  # left alone, and what it says is read again
        except (DamagedError, OSError):
            self._replaces.append(name)
            return
        self._replaces.append(name)
        for pack, mark in found.packs.items():
            if pack not in self._marks or self._marks[pack].at < mark.at <= self._clock():
                self._marks[pack] = mark
        if found.last and (self.last is None or found.last.at > self.last.at):
            self.last = found.last

    def look(self, pack: str) -> str:
        """What the file of a pack is now; to be called before it is read. Empty when it is not there."""
        path = self._storage.path("packs", pack)
        if path is None:
            return "-"
        try:
            info = os.stat(path, follow_symlinks=False)
        except OSError:
            return ""
        return f"{info.st_size}:{info.st_ino}:{info.st_ctime_ns}"

    def read_at(self, pack: str) -> float:
        """When a pack as it is now was last read; 0 if that is not known."""
        mark = self._valid(pack)
        return mark.at if mark else 0.0

    def _valid(self, pack: str) -> Mark | None:
        mark = self._marks.get(pack)
        if mark is None or not 0 < mark.at <= self._clock() or mark.file != self.look(pack):
            return None
        return mark

    def in_turn(self, packs: Iterable[str]) -> list[str]:
        """Those first that were never read, then those that were read longest ago."""
        return sorted(packs, key=lambda name: (self.read_at(name), name))

    def hurt(self) -> list[str]:
        """Packs, as they are now, in which the last reading found damage."""
        return [name for name in self._marks if (mark := self._valid(name)) and not mark.whole]

    def add(self, pack: str, at: float, file: str, *, whole: bool) -> None:
        """A pack has been read; ``file`` is what `look` said before."""
        self._marks[pack] = Mark(at, whole, file)

    def save(self, last: LastCheck | None = None) -> None:
        """Make durable what is known of packs that are there. Raises `DurabilityError`; then the old files stay."""
        there = self._storage.list("packs")
        self.last = last or self.last
        known = {name: mark for name, mark in sorted(self._marks.items()) if name in there}
        body = msgspec.json.encode(_File(VERSION, self.last, known))
        fresh = new_id()
        self._storage.write(KIND, fresh, digested(body))
        self._storage.remove_all(KIND, self._replaces)
        self._replaces = [fresh]

    def coverage(self) -> Coverage:
        """Of the packs that are there now."""
        gone = read_condemned(self._storage).packs
        sizes = {name: size for name, size in self._storage.list("packs").items() if name not in gone}
        marks = {name: mark for name in sizes if (mark := self._valid(name))}
        return Coverage(
            packs=len(sizes),
            size=sum(sizes.values()),
            read_packs=len(marks),
            read_size=sum(sizes[name] for name in marks),
            damaged=sum(not mark.whole for mark in marks.values()),
            oldest=min((mark.at for mark in marks.values()), default=None),
            last=self.last,
            now=self._clock(),
        )


def _decode(name: str, data: bytes) -> _File:
    body = verified_body(data, f"verified {name}")
    try:
        found: Mapping[str, object] = msgspec.json.decode(body, type=dict)
        if isinstance(version := found.get("version"), int) and version > VERSION:
            raise FormatTooNewError(f"verified {name} is of version {version}", hint="Use a newer incbak.")
        decoded = msgspec.json.decode(body, type=_File)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise DamagedError(f"verified {name} is malformed: {e}") from e
    if decoded.last and not 0 <= decoded.last.at < _FAR:
        raise DamagedError(f"verified {name} is malformed: its time")
    return decoded


__all__ = ["Coverage", "LastCheck", "Mark", "Verified"]

"""What this host remembers of a repository, so that it notices when that is not what it was.

A repository may be on storage that others can write to. Whoever can, can put an older copy in its place, drop or swap
the newest backups, or put one that is not encrypted where an encrypted one was. Nothing in the repository shows that;
the host's own memory does: ``<state dir>/.repositories``, one file for the repository and one for each VM, which are
replaced whole. They are hints for people: losing them loses no data, and where they cannot be written, backups go on.

* ``ID.json``: where the repository was, and whether it was encrypted. One that was is not used when it is not any more.
* ``ID-VM.json``: the last backup that this host made of that VM, its number, and the digest of its record.

A backup that is remembered and gone is no alarm when this host pruned it, or when the VM has newer ones: another host
may have pruned it.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from blake3 import blake3

from incbak import durable
from incbak.errors import DamagedError, DurabilityError
from incbak.opening import open_regular
from incbak.repo import record as records
from incbak.repo.ids import is_id
from incbak.repo.record import Record
from incbak.repo.repository import Config, Repository

_FOLDER = ".repositories"
_LIMIT = 64 << 10

S = TypeVar("S", bound=msgspec.Struct)


class Place(msgspec.Struct, frozen=True):
    """A repository as it was when it was last used."""

    path: str
    encrypted: bool
    key: str = ""
    """The key file that opened it."""


class LastBackup(msgspec.Struct, frozen=True):
    """Of one VM. ``record``: digest of its record. ``pruned``: this host has removed it since."""

    vm: str
    id: str
    seq: int
    record: str
    pruned: bool = False


class Memory:
    """Of one host, below its state directory; where there is none, nothing is remembered."""

    def __init__(self, state_dir: Path | None) -> None:
        self._folder = None if state_dir is None else state_dir / _FOLDER

    def _files(self, pattern: str) -> list[Path]:
        return sorted(self._folder.glob(pattern)) if self._folder else []

    def refuse_downgrade(self, path: Path, config: Config) -> None:
        """Raises `DamagedError` if the repository was encrypted when this host used it last, here or elsewhere."""
        if config.cipher:
            return
        for file in self._files("*.json"):
            place = _read(file, Place) if "-" not in file.name else None
            if place and place.encrypted and (place.path == _text(path) or file.stem == config.id):
                what = f"the repository {path} was encrypted when this host used it last, and is not now"
                raise DamagedError(what, hint=f"Somebody may have replaced it. If that was you, remove {file}")

    def note_place(self, path: Path, config: Config, key: str = "") -> None:
        """The repository is there, encrypted or not; ``key`` is the file that opened it. Raises `DurabilityError`."""
        self._write(f"{config.id}.json", Place(_text(path), bool(config.cipher), key or self.key(config)))

    def key(self, config: Config) -> str:
        """The id of the key file that opened the repository last; empty where that is not known."""
        place = _read(self._folder / f"{config.id}.json", Place) if config.cipher and self._folder else None
        return place.key if place and is_id(place.key) else ""

    def forget_place(self, path: Path) -> None:
        """A new repository is made there: what was there before is of the past. Raises `DurabilityError`."""
        for file in self._files("*.json"):
            if "-" not in file.name and (place := _read(file, Place)) and place.path == _text(path):
                durable.remove(file)

    def remember(self, repo: Repository, record: Record) -> None:
        """A backup that this host has just committed. Raises `DurabilityError`."""
        digest = blake3(records.encode(record)).hexdigest()
        self._write(self._name(repo.id, record.vm), LastBackup(record.vm, record.id, record.seq, digest))
        self.note_place(repo.storage.root, repo.config, repo.key)

    def pruned(self, repo: Repository, removed: Collection[str]) -> None:
        """This host has removed these backups. Raises `DurabilityError`."""
        for last in self._all(repo.id):
            if last.id in removed:
                self._write(self._name(repo.id, last.vm), msgspec.structs.replace(last, pruned=True))

    def troubles(self, repo: Repository, vm: str | None = None) -> list[str]:
        """What of a repository (and one VM in it) is not as this host left it, for people."""
        return [what for last in self._all(repo.id) if vm in (None, last.vm) if (what := _trouble(repo, last))]

    def _all(self, repository: str) -> Iterator[LastBackup]:
        for file in self._files(f"{repository}-*.json"):
            if last := _read(file, LastBackup):
                yield last

    @staticmethod
    def _name(repository: str, vm: str) -> str:
        return f"{repository}-{blake3(vm.encode()).hexdigest(length=8)}.json"

    def _write(self, name: str, what: msgspec.Struct) -> None:
        data = msgspec.json.encode(what)
        if self._folder is None:
            return
        try:
            if _content(self._folder / name) == data:
                return
        except OSError:
            pass
        try:
            durable.make_dir(self._folder)
        except OSError as e:
            raise DurabilityError(f"cannot make {self._folder}: {e.strerror}") from e
        durable.write_new(self._folder / name, [data], replace=True)


def _text(path: Path) -> str:
    """A path, of which Linux knows bytes only, as text."""
    return os.fsencode(path.resolve()).decode(errors="backslashreplace")


def _trouble(repo: Repository, last: LastBackup) -> str | None:
    name = f"backup {last.id[:8]} of {last.vm}, which this host made last,"
    try:
        found = repo.storage.read("backups", last.id, records.LIMIT)
        records.decode(last.id, found)
    except FileNotFoundError:
        newest = max((r.seq for r in repo.backups(last.vm)), default=0)
        if last.pruned or newest > last.seq:
            return None
        return f"{name} is gone: the repository was put back to an older state, or somebody removed it"
    except (DamagedError, OSError):
        return None  # whoever lists the backups is told of it
    return None if blake3(found).hexdigest() == last.record else f"{name} is not what it was: somebody replaced it"


def _content(file: Path) -> bytes:
    with open(open_regular(file, os.O_RDONLY), "rb") as stream:
        return stream.read(_LIMIT)


def _read(file: Path, kind: type[S]) -> S | None:
    try:
        return msgspec.json.decode(_content(file), type=kind)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None

"""A repository: the small facade over storage, index, records and locks."""

from __future__ import annotations

import hmac
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

import msgspec
import numpy as np

from incbak import durable
from incbak.errors import (
    DamagedError,
    FormatTooNewError,
    LockedError,
    NoRepositoryError,
    UsageError,
    WrongPassphraseError,
)
from incbak.repo import blob
from incbak.repo import record as records
from incbak.repo.cipher import KEY, Cipher
from incbak.repo.cipher import NAME as CIPHER
from incbak.repo.damage import Damage, read_damage
from incbak.repo.ids import ids, is_id, new_id
from incbak.repo.index import Index
from incbak.repo.keys import Cost, Unlocked, add_key, unlock
from incbak.repo.merge import merge_small
from incbak.repo.place import refuse_address, refuse_remains, room_for_one
from incbak.repo.reader import BlobReader
from incbak.repo.record import DiskRecord, Record
from incbak.repo.seal import PLAIN, Seal
from incbak.repo.storage.base import KINDS, Storage
from incbak.repo.storage.local import LocalStorage
from incbak.repo.tree import PAGE, TreeReader, TreeUpdate, clusters_in
from incbak.repo.writer import Writer

log = logging.getLogger(__name__)

VERSION = 1
DEFAULT_CLUSTER = 65536
CLUSTER_SIZES = range(4096, (4 << 20) + 1)
_CONFIG_LIMIT = 1 << 20
REPOSITORY_LOCK = "repository.lock"
CONTENT_LOCK = "content.lock"
"""Held shared by whoever builds on what is stored, and exclusively for the moment in which packs are condemned."""
_CONDEMNING = 10.0
"""Seconds that a run waits for such a moment to pass."""


_NEWER = "Use a newer incbak."


def _no_passphrase() -> bytes:
    raise WrongPassphraseError("the repository is encrypted, and no passphrase was given")


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the file ``config`` holds; ``digest`` is of the other fields, and ``proof`` too, with the repository's key,
    where ``cipher`` says that it is encrypted."""

    version: int
    id: str
    cluster_size: int
    program: str = "incbak"
    digest: str = ""
    cipher: str = ""
    proof: str = ""

    def sealed(self) -> Config:
        """With its digest."""
        return msgspec.structs.replace(self, digest=blob.digest_of(self._fields).hex())

    def proven(self, seal: Seal) -> Config:
        """With the proof that who wrote it has the key."""
        return msgspec.structs.replace(self, proof=seal.check(self._fields).hex())

    def opens(self, master: bytes) -> bool:
        """Whether it was proven with this master key."""
        return hmac.compare_digest(self.proven(Cipher(master)).proof, self.proof)

    @property
    def _fields(self) -> bytes:
        cipher = f" {self.cipher}" if self.cipher else ""
        return f"{self.version} {self.id} {self.cluster_size} {self.program}{cipher}".encode()


class Repository:
    """An open repository. Reading is safe beside any other process; one `session` per VM writes."""

    def __init__(self, storage: LocalStorage, config: Config) -> None:
        self.storage, self.config = storage, config
        self.id, self.cluster_size = config.id, config.cluster_size
        self._index: Index | None = None
        self.unreadable: dict[str, str] = {}
        """Records that `backups` could not read, with the reason."""
        self.key = ""
        """The file in ``keys`` that opened it; empty where it is not encrypted."""

    @classmethod
    def init(
        cls, path: Path, cluster_size: int = DEFAULT_CLUSTER, passphrase: bytes | None = None, cost: Cost | None = None
    ) -> Repository:
        """Make a new repository in a directory that is missing or empty, encrypted if there is a passphrase.

        The config comes last. Raises `UsageError`, `LostConfigError`, before anything is made; removes nothing.
        """
        refuse_address(path)
        if cluster_size not in CLUSTER_SIZES or cluster_size & (cluster_size - 1):
            raise UsageError(f"not a cluster size: {cluster_size}", hint="Use a power of two from 4K to 4M.")
        if (path / "config").exists():
            raise UsageError(f"{path} is a repository already")
        if path.exists() and (not path.is_dir() or any(p.name not in _OURS for p in path.iterdir())):
            raise UsageError(f"{path} is not an empty directory", hint="Choose another path.")
        refuse_remains(path)
        if passphrase is not None and not passphrase:
            raise UsageError("the passphrase is empty")
        config, seal, key = Config(VERSION, new_id(), cluster_size), PLAIN, ""
        if passphrase is not None:
            master = os.urandom(KEY)
            seal = Cipher(master)
            config = msgspec.structs.replace(config, cipher=CIPHER).proven(seal)
        durable.make_dir(path)
        storage = LocalStorage(path, seal)
        storage.make_directories()
        if passphrase is not None:
            key = add_key(storage, config.id, master, passphrase, cost=cost)
        durable.write_new(path / "config", [msgspec.json.encode(config.sealed())])
        made = cls(storage, config.sealed())
        made.key = key
        return made

    @classmethod
    def open(cls, path: Path, passphrase: Callable[[], bytes] = _no_passphrase, key: str = "") -> Repository:
        """Open the repository at ``path``; ``passphrase`` is asked for one if it is encrypted, ``key`` is tried first.

        Raises `NoRepositoryError`, `FormatTooNewError`, `DamagedError`, `WrongPassphraseError`.
        """
        storage, config = cls.look(path)
        storage.check_folders()
        if config.cipher:
            unlocked = cls.unlock(storage, config, passphrase, key)
            storage.seal, key = Cipher(unlocked.master), unlocked.key
        opened = cls(storage, config)
        opened.key = key
        return opened

    @staticmethod
    def unlock(storage: Storage, config: Config, passphrase: Callable[[], bytes], first: str = "") -> Unlocked:
        """The key of an encrypted repository; the file ``first`` is tried first. Raises as `keys.unlock`."""
        found = unlock(storage, config.id, passphrase(), first)
        if not config.opens(found.master):
            raise DamagedError(f"the config of repository {config.id[:8]} does not verify with its key")
        return found

    @staticmethod
    def look(path: Path) -> tuple[LocalStorage, Config]:
        """Where its files are, and its config, without opening it. Raises as `open`, but asks for no passphrase."""
        storage = LocalStorage(path)
        try:
            raw = storage.read(".", "config", _CONFIG_LIMIT)
        except (FileNotFoundError, NotADirectoryError):
            refuse_address(path)
            refuse_remains(path)
            what = "is not a repository" if path.exists() else "does not exist"
            raise NoRepositoryError(f"{path} {what}", hint=f"Make one with: incbak init {room_for_one(path)}") from None
        except OSError as e:
            raise NoRepositoryError(f"cannot read {path}: {e.strerror}", hint="Check the path and permissions.") from e
        version = _version_of(raw)
        if version is not None and version > VERSION:
            raise FormatTooNewError(f"repository {path} is of format {version}", hint=_NEWER)
        try:
            config = msgspec.json.decode(raw, type=Config)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
            raise DamagedError(f"the config of {path} is malformed: {e}") from e
        size = config.cluster_size
        if not is_id(config.id) or size not in CLUSTER_SIZES or size & (size - 1):
            raise DamagedError(f"the config of {path} is malformed: its id or cluster size")
        if config != config.sealed():
            raise DamagedError(f"the config of {path} does not match its digest")
        if config.cipher not in ("", CIPHER):
            raise FormatTooNewError(f"repository {path} is encrypted with {config.cipher[:32]!r}", hint=_NEWER)
        return storage, config

    @property
    def seal(self) -> Seal:
        """How content is named and stored."""
        return self.storage.seal

    # -- reading --------------------------------------------------------------------------------------------------

    @property
    def index(self) -> Index:
        """Opened when it is first needed."""
        if self._index is None:
            self._index = Index(self.storage)
        return self._index

    def backups(self, vm: str | None = None) -> list[Record]:
        """All backups (of one VM), oldest first by sequence. Records that cannot be read are noted in `unreadable`.

        What is needed to read them is in the index afterwards, also of those committed since it was opened.
        """
        found = []
        self.unreadable = {}
        for name in ids(self.storage.list("backups")):
            try:
                found.append(self.record(name))
            except FileNotFoundError:
                continue
            except DamagedError as e:
                self.unreadable[name] = str(e)
        if self._index is not None:
            self._index.refresh()
        return sorted((r for r in found if vm is None or r.vm == vm), key=records.order)

    def record(self, name: str) -> Record:
        """One record by its whole id. Raises `DamagedError`, `FileNotFoundError`."""
        if not is_id(name):
            raise DamagedError(f"{name[:100]!r} in backups is no backup")
        try:
            data = self.storage.read("backups", name, records.LIMIT)
        except FileNotFoundError:
            raise
        except OSError as e:
            raise DamagedError(f"the record of backup {name} cannot be read: {e.strerror}") from e
        return records.decode(name, data)

    def find(self, text: str, vm: str | None = None) -> Record:
        """A backup by id, unique prefix of one, or ``latest``. Raises `UsageError`; `DamagedError` for a bad record."""
        if text == "latest":
            found = self.backups(vm)
            if len({r.vm for r in found}) > 1:
                names = ", ".join(sorted({r.vm for r in found}))
                raise UsageError(f"several VMs share the repository: {names}", hint="Say which with --name.")
            if not found:
                what = f" of {vm}" if vm else ""
                if self.unreadable:
                    why = "; ".join(self.unreadable.values())
                    raise DamagedError(f"there is no backup{what} that can be read: {why}", hint="Run: incbak check")
                raise UsageError(f"there is no backup{what} in the repository", hint="See: incbak list")
            for why in self.unreadable.values():
                log.warning("backup %s may not be the latest: %s", found[-1].id[:8], why)
            return found[-1]
        there = ids(self.storage.list("backups")) if re.fullmatch("[0-9a-f]+", text) else {}
        matches = [n for n in there if n.startswith(text)]
        if len(matches) != 1:
            what = "several backups begin" if matches else "no backup begins"
            raise UsageError(f"{what} with {text[:64]!r}", hint="See: incbak list")
        return self.record(matches[0])

    def reader(self) -> BlobReader:
        """Reads blobs, verified."""
        return BlobReader(self.storage, self.index, max(self.cluster_size, PAGE))

    def tree(self, disk: DiskRecord, cluster_size: int | None = None) -> TreeReader:
        """The tree of a backed-up disk."""
        clusters = clusters_in(disk.size, cluster_size or self.cluster_size)
        return TreeReader(self.reader().read, bytes.fromhex(disk.root), clusters)

    def is_whole(self, record: Record, seen: set[bytes]) -> bool:
        """Whether every page of a backup's trees verifies and every cluster is in a pack that is there.

        Pages in ``seen`` are known to be whole with all below them; those of a whole backup are added.
        """
        reader = self.reader()
        trail = set(seen)
        try:
            for disk in record.disks:
                tree = TreeReader(reader.read, bytes.fromhex(disk.root), clusters_in(disk.size, record.cluster_size))
                for _digest, level, page in tree.pages(trail):
                    rows = page[page.any(axis=1)]
                    if level == 0 and not self.index.have(np.ascontiguousarray(rows), lasting=True).all():
                        return False
        except DamagedError:
            return False
        seen |= trail
        return True

    def unsound(self, records: Sequence[Record]) -> frozenset[str]:
        """The ids of those that are no base: noted by a check, or, where a pack is missing, not whole."""
        noted = self.damage().of(r.id for r in records)
        self.index.refresh()
        if self.index.complete:
            return noted
        seen: set[bytes] = set()
        return noted | {r.id for r in records if not self.is_whole(r, seen)}

    def damage(self) -> Damage:
        """What earlier checks found."""
        return read_damage(self.storage)

    # -- writing --------------------------------------------------------------------------------------------------

    @contextmanager
    def vm_lock(self, vm: str, wait: float = 0.0) -> Iterator[Callable[[], None]]:
        """Only one run per VM. Yields a check, to be called before the commit, that the lock still stands.

        Raises `LockedError` when another run holds it for longer than ``wait`` seconds.
        """
        name = f"vm-{quote(vm, safe='')[:200]}.lock"
        with ExitStack() as stack:
            stack.enter_context(self.storage.lock(REPOSITORY_LOCK, exclusive=False, wait=wait))
            stack.enter_context(self.storage.lock(name, exclusive=True, wait=wait))
            moment = max(wait, _CONDEMNING)
            stack.enter_context(self.storage.lock(CONTENT_LOCK, exclusive=False, wait=moment))
            before = {n: self._lock_identity(n) for n in (REPOSITORY_LOCK, name, CONTENT_LOCK)}

            def still_there() -> None:
                for held, identity in before.items():
                    if self._lock_identity(held) != identity:
                        why = f"the lock {held} was removed or replaced during the run; nothing was committed"
                        raise LockedError(why, hint="Run it again; leave the files in locks/ alone.")

            yield still_there

    def _lock_identity(self, name: str) -> tuple[int, int]:
        try:
            info = os.stat(self.storage.root / "locks" / name)
        except FileNotFoundError:
            return (0, 0)
        return (info.st_dev, info.st_ino)

    def writer(self, still_locked: Callable[[], None], level: int = 1) -> Writer:
        """A writer for one backup. Takes the moment to sweep old temporary files and to merge small index files."""
        self.storage.sweep()
        merge_small(self.storage)
        self.index.refresh()
        return Writer(self.storage, self.index, self.damage(), still_locked, level)

    def new_backup_id(self) -> str:
        """An id whose first 8 digits no backup here has, since bitmaps are named after these."""
        taken = {name[:8] for name in self.storage.list("backups")}
        while (fresh := new_id())[:8] in taken:
            pass
        return fresh

    def update(self, writer: Writer, base: DiskRecord | None, size: int) -> TreeUpdate:
        """A tree update for a disk of ``size`` bytes from the tree of ``base``, or from nothing."""
        root = bytes.fromhex(base.root) if base else None
        return TreeUpdate(self.reader().read, writer.add_new, root, clusters_in(size, self.cluster_size))

    def close(self) -> None:
        """Release files."""
        self.storage.close()


_OURS = set(KINDS)


def _version_of(raw: bytes) -> int | None:
    try:
        found = msgspec.json.decode(raw)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    version = found.get("version") if isinstance(found, dict) else None
    return version if isinstance(version, int) else None


def host_name() -> str:
    """For the record."""
    return socket.gethostname()


__all__ = ["Config", "Repository", "Storage", "host_name"]

"""Copying what is needed out of packs that are mostly garbage, as it is stored, verified on the way."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from incbak.errors import DamagedError, FormatTooNewError, text_of
from incbak.events import Progress, Reporter, Warned, silent
from incbak.repo import pack
from incbak.repo.damage import Damage
from incbak.repo.index import Digests
from incbak.repo.needs import Needs
from incbak.repo.repository import Repository
from incbak.repo.writer import Writer


class Repacker:
    """Remembers what it copied of each pack, 32 bytes for each blob."""

    def __init__(self, repo: Repository, needs: Needs) -> None:
        self._repo, self._needs = repo, needs
        self._copied: dict[str, Digests] = {}
        self._tables: dict[str, Digests] = {}

    def table(self, name: str) -> Digests:
        """The digests in a pack, by its own table. Raises `DamagedError`, `OSError`."""
        size = self._repo.storage.list("packs").get(name, 0)
        return _digests(pack.read_table(self._repo.storage, name, size))

    def _told(self, name: str) -> Digests:
        """As `table`; of a pack that has none any more, what the index says of it."""
        try:
            return self.table(name)
        except FormatTooNewError:
            raise
        except (DamagedError, OSError):
            if not len(entries := self._repo.index.entries_of(name)):
                raise
            return _digests(entries)

    def copy(self, packs: Collection[str], report: Reporter = silent) -> DamagedError | None:
        """Copy what is needed of ``packs``, unless it is whole in another pack too; all is durable and indexed then.

        A pack of which something that is needed cannot be read is left as it is, with a warning. Returns the first such
        error. Raises `DurabilityError`.
        """
        besides = set(packs) | self._repo.index.condemned.packs
        copied: dict[str, Digests] = {}
        lost: DamagedError | None = None
        sizes, done = self._repo.storage.list("packs"), 0
        total = sum(sizes.get(name, 0) for name in packs)
        with Writer(self._repo.storage, self._repo.index, Damage(), lambda: None) as writer:
            for name in sorted(packs):
                try:
                    copied[name] = self._one(writer, name, besides)
                except (DamagedError, OSError) as e:
                    report(Warned(f"pack {name} stays, since what backups need of it cannot be read: {text_of(e)}"))
                    lost = lost or _lost(name, e)
                done += sizes.get(name, 0)
                report(Progress("", done, total, "copying what is needed"))
            writer.finish()
        self._copied |= copied
        return lost

    def _one(self, writer: Writer, name: str, besides: Collection[str]) -> Digests:
        digests = self._tables[name] = self._told(name)
        needed = digests[self._needs.needed(digests)]
        reader = self._repo.reader()
        for digest in map(np.ndarray.tobytes, needed):
            try:
                reader.stored(digest, besides=besides)
            except DamagedError:
                place, stored = reader.stored(digest)
                writer.add(digest, place.codec, bytes(stored), place.raw)
        return needed

    def free(self, name: str) -> bool:
        """Whether all that is needed of a pack now was copied."""
        if name not in self._copied:
            return False
        digests = self._tables[name]
        needed, copied = (d.view("V32").ravel() for d in (digests[self._needs.needed(digests)], self._copied[name]))
        return bool(np.isin(needed, copied).all())


def _lost(name: str, error: DamagedError | OSError) -> DamagedError:
    what = f"backups that stay need content of pack {name} that cannot be read: {text_of(error)}"
    return DamagedError(what, hint="See: incbak check --read-data. The next full backup stores again what it can.")


def _digests(entries: pack.Entries) -> Digests:
    return np.frombuffer(entries["digest"].tobytes(), dtype=np.uint8).reshape(-1, 32)

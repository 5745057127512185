"""Writing one backup. The order, which is the proof that a backup is listed only when all of it is durable:

1. blobs are appended to packs under temporary names;
2. a pack is complete: its table is written, it is synced, gets its name, and the directory is synced;
3. the index file that names durable packs only is written the same way (in between, too, so that memory is bounded);
4. the record was decoded again, as a reader does it (`fitting`), and the locks are looked at again: a lock file that
   was removed or replaced meanwhile stops the commit;
5. the record is written the same way. Now the backup exists.

Killed anywhere before 5, what was written is orphaned: harmless, and used by the next backup that needs the content.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from incbak import durable
from incbak.errors import BackupError, DurabilityError, IncbakError
from incbak.repo import pack, record
from incbak.repo.damage import Damage
from incbak.repo.fitting import proven
from incbak.repo.ids import new_id
from incbak.repo.index import Digests, Index, encode
from incbak.repo.storage.base import Storage, Stream

SPILL = 1 << 18
"""Blobs after which an index file is written, to bound memory: 25 MiB."""
_BUFFER = 1 << 20
_SEALING = 2

durable.declare(
    "repo.pack-full", "repo.packs-durable", "repo.index-durable", "repo.locks-checked", "repo.record-durable"
)

_Item = tuple[bytes, int, int, int, int]


class _Pack(NamedTuple):
    """A pack whose blobs are all written to the stream or the buffer."""

    stream: Stream
    buffer: list[bytes | memoryview]
    offset: int
    items: list[_Item]


class Writer:
    """Adds blobs and commits one record. Safe for many threads until `commit`. Use as a context manager: an exit
    without `commit` aborts. Full packs are made durable by a thread of its own, two at a time at most.
    """

    def __init__(
        self,
        storage: Storage,
        index: Index,
        damage: Damage,
        still_locked: Callable[[], None],
        level: int = 1,
    ) -> None:
        self._storage, self._index, self._damage, self._still_locked = storage, index, damage, still_locked
        self.level, self.seal = level, storage.seal
        self._lock = threading.Lock()
        self._stream: Stream | None = None
        self._buffer: list[bytes | memoryview] = []
        self._buffered = self._offset = 0
        self._items: list[_Item] = []
        self._new: dict[bytes, None] = {}
        self._packs: list[tuple[str, int]] = []
        self._tables: list[pack.Entries] = []
        self._sealer = ThreadPoolExecutor(1, "seal")
        self._sealing: list[tuple[Future[None], Stream]] = []
        self._failure: BaseException | None = None
        self.blobs = self.stored = 0
        """New blobs, and the bytes that they take."""

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    @property
    def trusts_bases(self) -> bool:
        """Whether all packs are there and nothing is noted as damaged: what a tree names need not be looked up."""
        whole = self._index.complete
        return whole and not self._index.damaged and not self._damage

    def have(self, digests: Digests) -> NDArray[np.bool_]:
        """Which of the digests (shape (n, 32)) need not be added; content that is damaged or condemned must be."""
        found = self._index.have(digests, lasting=True)
        for i in np.flatnonzero(~found).tolist():
            found[i] = digests[i].tobytes() in self._new
        if self._damage:
            for i in np.flatnonzero(found).tolist():
                digest = digests[i].tobytes()
                found[i] = not self._damage.covers(digest) or digest in self._new
        return found

    def add(self, digest: bytes, codec: int, stored: bytes | memoryview, raw: int) -> int:
        """Store a blob, unless this writer has it; the bytes that it takes (0 when it was there).

        ``stored`` must stay as it is. Raises `DurabilityError`.
        """
        size = len(stored)
        with self._lock, self._failing():
            if digest in self._new:
                return 0
            if self._stream is None:
                self._begin()
            self._new[digest] = None
            self._items.append((digest, self._offset, size, raw, codec))
            self._offset += size
            self._buffer.append(stored)
            self._buffered += size
            self.blobs += 1
            self.stored += size
            if self._offset >= pack.TARGET:
                self._end()
            elif self._buffered >= _BUFFER:
                self._write_buffer()
        return size

    def add_content(self, digest: bytes, data: bytes | memoryview) -> int:
        """As `add`, of content that is not encoded yet.

        It is decoded and compared before it is stored, so that bad memory or a faulty codec spoils a run and not a
        backup (faults row 86). Raises `BackupError` then.
        """
        codec, stored = self.seal.encode(digest, data, self.level)
        if stored is data:
            stored = bytes(data)
        if self.seal.digest(self.seal.decode(digest, codec, stored, len(data))) != digest:
            raise BackupError(
                f"blob {digest.hex()} came out wrong when it was decoded again; nothing of it was stored",
                hint="Test the memory of this host, then run it again.",
            )
        return self.add(digest, codec, stored, len(data))

    def add_new(self, data: bytes | memoryview) -> bytes:
        """Store content, as a page of a tree, unless it is there; its digest."""
        digest = self.seal.digest(data)
        if not self.have(np.frombuffer(digest, dtype=np.uint8).reshape(1, -1))[0]:
            self.add_content(digest, data)
        return digest

    def _begin(self) -> None:
        self._stream = self._storage.stream("packs")
        self._buffer, self._buffered = [pack.head()], pack.HEAD.size
        self._offset = pack.HEAD.size

    def _write_buffer(self) -> None:
        assert self._stream
        self._stream.append(self._buffer)
        self._buffer, self._buffered = [], 0

    def _end(self) -> None:
        """Hand the current pack over to be made durable; waits when two are under way. Called with the lock."""
        if self._stream is None:
            return
        while len(self._sealing) >= _SEALING:
            self._sealing.pop(0)[0].result()
        whole = _Pack(self._stream, self._buffer, self._offset, self._items)
        self._stream, self._buffer, self._buffered, self._items = None, [], 0, []
        self._sealing.append((self._sealer.submit(self._seal, whole), whole.stream))

    def _seal(self, whole: _Pack) -> None:
        """Step 2, and 3 now and then."""
        entries = np.zeros(len(whole.items), dtype=pack.ENTRY)
        digests, offsets, sizes, raws, codecs = zip(*whole.items, strict=True)
        entries["digest"] = np.frombuffer(b"".join(digests), dtype="V32")
        entries["offset"], entries["stored"], entries["raw"], entries["codec"] = offsets, sizes, raws, codecs
        table, name = pack.tail(entries, whole.offset, self.seal)
        try:
            size = whole.stream.append([*whole.buffer, table])
            durable.crash_point("repo.pack-full")
            whole.stream.commit(name)
        except BaseException:
            whole.stream.abort()
            raise
        self._packs.append((name, size))
        self._tables.append(entries)
        if sum(map(len, self._tables)) >= SPILL:
            self._write_index()

    def _write_index(self) -> None:
        """Name the durable packs in an index file, and have it in the index that we look at. One thread at a time."""
        if not self._packs:
            return
        durable.crash_point("repo.packs-durable")
        numbers = np.repeat(np.arange(len(self._tables), dtype=np.uint32), [len(t) for t in self._tables])
        named = np.concatenate(self._tables)
        self._storage.write("index", new_id(), encode(self._packs, numbers, named, self.seal))
        durable.crash_point("repo.index-durable")
        self._packs, self._tables = [], []
        if not self._damage:
            self._index.refresh()
            for digest in named["digest"]:
                self._new.pop(digest.tobytes(), None)

    @contextmanager
    def _failing(self) -> Iterator[None]:
        """The first failure is final: what was half written must never be counted on."""
        if self._failure:
            raise DurabilityError(f"an earlier write of this backup failed: {self._failure}") from self._failure
        try:
            yield
        except BaseException as e:
            self._failure = e
            raise

    def finish(self) -> None:
        """Steps 2 and 3: everything added is durable and indexed."""
        with self._lock, self._failing():
            self._end()
            for sealing, _stream in self._sealing:
                sealing.result()
            self._sealing = []
            self._write_index()

    def commit(self, made: record.Record) -> None:
        """Steps 2 to 5. Raises `DurabilityError`, `LockedError` or `BackupError`; then the backup does not exist."""
        data = proven(made)
        self.finish()
        self._still_locked()
        durable.crash_point("repo.locks-checked")
        try:
            self._storage.write("backups", made.id, data)
        except FileExistsError as e:
            raise IncbakError(f"a backup with the id {made.id} exists already") from e
        durable.crash_point("repo.record-durable")

    def abort(self) -> None:
        """Give up what is not in a durable pack; idempotent; nothing after `commit`."""
        with self._lock:
            self._sealer.shutdown(wait=True, cancel_futures=True)
            for _sealing, stream in self._sealing:
                stream.abort()
            if self._stream is not None:
                self._stream.abort()
                self._stream = None

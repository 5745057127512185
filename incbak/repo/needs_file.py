"""What `needs` keeps from one prune to the next: ``needs/ID``.

::

    blocks      one after the other: up to 2**20 keys of 8 bytes, in order, then as many counts of 4 bytes
    manifest    the rest, with the seal's check of each block, and checked itself; closed by the seal
    16          the length of the manifest, 8; magic "INCBAKND"

A file that does not verify says nothing: what it said can be found out anew.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from contextlib import suppress

import msgspec
import numpy as np

from incbak import durable
from incbak.errors import DamagedError, StorageError
from incbak.repo.columns import StoredBytes, column
from incbak.repo.counts import Counts, Keys, Numbers
from incbak.repo.digested import digested, verified_body
from incbak.repo.ids import is_id, new_id
from incbak.repo.mapping import opened
from incbak.repo.storage.base import Storage

VERSION = 1
_FOOT = struct.Struct("<Q8s")
_MAGIC = b"INCBAKND"
_KEY, _COUNT = 8, 4

durable.declare("prune.needs-saved")


class Chain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The backups of one disk, of one size and cluster size: their ids and roots, oldest first."""

    vm: str
    disk: str
    size: int
    cluster_size: int
    links: tuple[tuple[str, str], ...]


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``serial`` grows from file to file. ``packs``: the bytes needed of each that was looked at. ``condemned``: the
    packs that were. ``blocks``: of each the number of keys, and the seal's check."""

    version: int
    serial: int
    chains: tuple[Chain, ...] = ()
    packs: dict[str, int] = {}
    condemned: tuple[str, ...] = ()
    blocks: tuple[tuple[int, str], ...] = ()


def save(storage: Storage, manifest: Manifest, blocks: Iterable[tuple[Keys, Numbers]]) -> None:
    """A new file in the place of those that are there. Raises `DurabilityError`."""
    before, name = list(storage.list("needs")), new_id()
    stream, written = storage.stream("needs"), list[tuple[int, str]]()
    try:
        for keys, counts in blocks:
            data = keys.tobytes() + counts.astype(np.uint32).tobytes()
            stream.append([data])
            written.append((len(keys), storage.seal.check(data).hex()))
        whole = msgspec.structs.replace(manifest, blocks=tuple(written))
        body = storage.seal.close("needs", name, digested(msgspec.json.encode(whole)))
        stream.append([body, _FOOT.pack(len(body), _MAGIC)])
        stream.commit(name)
    finally:
        stream.abort()
    if before:
        storage.remove_all("needs", before)
    durable.crash_point("prune.needs-saved")


def load(storage: Storage) -> tuple[Manifest, Counts] | None:
    """What the latest file that verifies says; ``None`` where there is none."""
    found: list[tuple[Manifest, Counts]] = []
    for name in storage.list("needs"):
        with suppress(FileNotFoundError, DamagedError, OSError, ValueError):
            found.append(_read(storage, name))
    return max(found, key=lambda f: f[0].serial, default=None)


def _read(storage: Storage, name: str) -> tuple[Manifest, Counts]:
    if not is_id(name):
        raise DamagedError(f"needs {name[:100]!r} is none of ours")
    data = opened(storage, "needs", name, "Look at the storage; the next prune counts anew what it cannot read.")
    if len(data) < _FOOT.size:
        raise DamagedError(f"needs {name} is cut off")
    length, magic = _FOOT.unpack(data[-_FOOT.size :].tobytes())
    end = len(data) - _FOOT.size - length
    if magic != _MAGIC or end < 0:
        raise DamagedError(f"needs {name} is cut off")
    body = storage.seal.open("needs", name, data[end : -_FOOT.size].tobytes())
    try:
        manifest = msgspec.json.decode(verified_body(body, f"needs {name}"), type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        raise DamagedError(f"needs {name} is malformed: {e}") from e
    if manifest.version != VERSION or sum(n * (_KEY + _COUNT) for n, _ in manifest.blocks) != end:
        raise DamagedError(f"needs {name} is of another version or size")
    counts, at = Counts(), 0
    for number, check in manifest.blocks:
        middle, behind = at + number * _KEY, at + number * (_KEY + _COUNT)
        if number < 1 or storage.seal.check(memoryview(data[at:behind])).hex() != check:  # type: ignore[arg-type]
            raise DamagedError(f"needs {name} does not match its digest")
        keys, numbers = column(data, np.dtype("<u8"), number, at), column(data, np.dtype("<u4"), number, middle)
        counts.add_stored(keys, numbers)
        at = behind
    if isinstance(data, StoredBytes):
        data.error = StorageError  # it was whole
    return manifest, counts

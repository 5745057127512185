"""A small repository with backups whose content is known."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from incbak.repo import blob
from incbak.repo.keys import Cost
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.writer import Writer

CLUSTER = 4096


def cluster(number: int) -> bytes:
    """Content of a cluster: the same number gives the same, 0 gives zeroes; every third does not compress."""
    if not number:
        return bytes(CLUSTER)
    if number % 3 == 0:
        return np.random.default_rng(number).bytes(CLUSTER)
    return number.to_bytes(8, "little") * (CLUSTER // 8)


@contextmanager
def writing(repo: Repository) -> Iterator[Writer]:
    """A writer with the lock held."""
    with repo.vm_lock("vm") as still_locked, repo.writer(still_locked) as writer:
        yield writer


def store(writer: Writer, content: bytes) -> bytes:
    """One cluster as the pipeline stores it; its digest."""
    if not any(content):
        return blob.ZERO_DIGEST
    digest = writer.seal.digest(content)
    if not writer.have(np.frombuffer(digest, dtype=np.uint8).reshape(1, -1))[0]:
        writer.add(digest, *writer.seal.encode(digest, content), len(content))
    return digest


def record_of(repo: Repository, disks: dict[str, tuple[int, bytes]], **more: Any) -> Record:
    """A record of ``disks``: sizes and roots by name."""
    backups = repo.backups()
    made = [
        DiskRecord(name=name, size=size, kind="full", base=None, reason=None, read=size, stored=0, root=root.hex())
        for name, (size, root) in disks.items()
    ]
    base = Record(
        id=repo.new_backup_id(),
        seq=max((r.seq for r in backups), default=0) + 1,
        vm="vm",
        kind="full",
        base=None,
        started="2026-01-01T00:00:00Z",
        finished="2026-01-01T00:00:01Z",
        cluster_size=repo.cluster_size,
        disks=tuple(made),
        engine="test",
    )
    return msgspec.structs.replace(base, **more) if more else base


def back_up(repo: Repository, content: list[int], before: Callable[[Writer], None] = lambda w: None) -> Record:
    """One backup of one disk whose i-th cluster is ``cluster(content[i])``."""
    with writing(repo) as writer:
        update = repo.update(writer, None, len(content) * CLUSTER)
        digests = [store(writer, cluster(number)) for number in content]
        update.set(np.arange(len(content)), np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32))
        made = record_of(repo, {"vda": (len(content) * CLUSTER, update.finish())})
        before(writer)
        writer.commit(made)
    return made


def restore(repo: Repository, record: Record, name: str = "vda") -> list[bytes]:
    """Every cluster of a disk, read and verified."""
    disk = record.disk(name)
    assert disk
    tree, reader = repo.tree(disk), repo.reader()
    digests = [d.tobytes() for d in tree.digests(0, disk.size // CLUSTER)]
    return [bytes(CLUSTER) if d == blob.ZERO_DIGEST else bytes(reader.read(d)) for d in digests]


PASSPHRASE = b"correct horse"
CHEAP = Cost(n=16)
"""Of a guess, so that tests need not wait."""


def new(path: Path, *, encrypted: bool = False) -> Repository:
    """An empty one; encrypted with `PASSPHRASE`."""
    return Repository.init(path, CLUSTER, PASSPHRASE if encrypted else None, CHEAP)


def opened(path: Path) -> Repository:
    """One of these, opened anew."""
    return Repository.open(path, lambda: PASSPHRASE)


__all__ = [
    "CHEAP",
    "CLUSTER",
    "PASSPHRASE",
    "back_up",
    "cluster",
    "new",
    "opened",
    "record_of",
    "restore",
    "store",
    "writing",
]

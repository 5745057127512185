"""Restores from a repository that somebody else wrote: nothing outside the disk, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from incbak.errors import DamagedError, FormatTooNewError
from incbak.repo import index
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT, TreeUpdate
from incbak.repo.writer import Writer
from incbak.restore.restore import restore_disk
from incbak.restore.targets import FileTarget, Target
from tests.unit.repo import scene

CLUSTER = scene.CLUSTER


class Bounded(Target):
    """Records what it is told; takes nothing outside its size."""

    name = "bounded"

    def __init__(self, size: int) -> None:
        self.data = bytearray(b"\xee" * size)
        self.ended = ""

    def write(self, data: bytes | memoryview, offset: int) -> None:
        assert 0 <= offset <= offset + len(data) <= len(self.data)
        self.data[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        assert length > 0
        self.write(bytes(length), offset)

    def finish(self) -> None:
        self.ended = "finished"

    def abandon(self) -> None:
        self.ended = "abandoned"


def _repository(path: Path, size: int, root: Callable[[Repository, Writer], bytes]) -> tuple[Repository, Record]:
    repo = scene.new(path)
    with scene.writing(repo) as writer:
        record = scene.record_of(repo, {"vda": (size, root(repo, writer))})
        writer.commit(record)
    repo.index.refresh()
    return repo, record


def _larger(clusters: int) -> Callable[[Repository, Writer], bytes]:
    """The root of a disk of so many clusters, the first and the last of which are not zero."""

    def root(repo: Repository, writer: Writer) -> bytes:
        update = TreeUpdate(repo.reader().read, writer.add_new, None, clusters)
        digests = [scene.store(writer, scene.cluster(n)) for n in (1, 2)]
        update.set(np.array([0, clusters - 1]), np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, 32))
        return update.finish()

    return root


@pytest.mark.parametrize(
    ("size", "clusters"),
    [(CLUSTER, 2), (CLUSTER - 100, 2), (0, 2), (FANOUT * CLUSTER + 1, 2 * FANOUT), (FANOUT * CLUSTER + 1, FANOUT + 2)],
)
def test_a_tree_that_is_larger_than_the_disk(tmp_path: Path, size: int, clusters: int) -> None:
    """Refused; a salvage writes what is inside."""
    repo, record = _repository(tmp_path / "repo", size, _larger(clusters))
    target = Bounded(size)
    with pytest.raises(DamagedError, match="reaches beyond the end"):
        restore_disk(repo, record, record.disks[0], target)
    assert target.ended == "abandoned"
    target = Bounded(size)
    done = restore_disk(repo, record, record.disks[0], target, salvage=True)
    assert target.ended == "finished"
    first = scene.cluster(1)
    if size >= CLUSTER:
        assert not done.damaged
        assert bytes(target.data) == first + bytes(size - CLUSTER)
    else:
        assert sum(e.length for e in done.damaged) == size
        assert not any(target.data)


def test_a_page_of_another_size_is_no_page(tmp_path: Path) -> None:
    repo, record = _repository(
        tmp_path / "repo", 3 * CLUSTER, lambda _repo, writer: scene.store(writer, b"x" * CLUSTER)
    )
    with pytest.raises(DamagedError, match="has 4096 bytes"):
        restore_disk(repo, record, record.disks[0], Bounded(3 * CLUSTER))
    target = Bounded(3 * CLUSTER)
    done = restore_disk(repo, record, record.disks[0], target, salvage=True)
    assert [tuple(e) for e in done.damaged] == [(0, 3 * CLUSTER)]
    assert not any(target.data)


def test_an_index_that_is_too_new_leaves_no_file_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = scene.new(tmp_path / "repo")
    record = scene.back_up(repo, [1, 2])
    with monkeypatch.context() as newer:
        newer.setattr(index, "VERSION", 9)
        repo.storage.write("index", "9" * 32, index.encode([], np.zeros(0, dtype=np.uint32), _no_entries()))
    fresh = Repository.open(tmp_path / "repo")
    (tmp_path / "out").mkdir()
    with pytest.raises(FormatTooNewError):
        restore_disk(fresh, record, record.disks[0], FileTarget(tmp_path / "out" / "d.raw", 2 * CLUSTER, force=False))
    assert not list((tmp_path / "out").iterdir())


def _no_entries() -> index.Entries:
    return np.zeros(0, dtype=index.ENTRY)

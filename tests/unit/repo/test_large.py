"""What only shows in a large repository: look-ups of many digests, and tables that are not kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from incbak.errors import DamagedError
from incbak.events import Event, Warned
from incbak.repo import check as checks
from incbak.repo import columns, mapping, pack
from incbak.repo import index as module
from incbak.repo.check import check
from incbak.repo.damage import add_note
from incbak.repo.ids import new_id
from incbak.repo.index import Index, IndexFile, encode
from incbak.repo.repository import Repository
from tests.unit.repo.scene import back_up, new

COUNT = 30_000


@pytest.mark.parametrize(("small", "kept"), [(1 << 20, 1 << 26), (0, 1 << 26), (0, 0)])
def test_many_are_found_as_few_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: int, kept: int) -> None:
    """In any order; from memory, from a column that is kept, and from the file piece by piece."""
    monkeypatch.setattr(mapping, "IN_MEMORY", small)
    monkeypatch.setattr(columns, "IN_MEMORY", kept)
    repo = new(tmp_path / "repo")
    rng = np.random.default_rng(1)
    digests = rng.integers(0, 256, (COUNT, 32), dtype=np.uint8)
    digests[: COUNT // 2, :8] = digests[0, :8]  # equal prefixes stand side by side
    name = "a" * 32
    (tmp_path / "repo" / "packs" / name).write_bytes(b"x" * 100)
    entries = np.zeros(COUNT, dtype=pack.ENTRY)
    entries["digest"] = digests.view("V32").ravel()
    there = rng.permutation(COUNT)[: COUNT // 3]
    data = encode([(name, 100)], np.zeros(len(there), dtype=np.uint32), entries[np.sort(there)])
    repo.storage.write("index", new_id(), data)
    wanted = np.zeros(COUNT, dtype=bool)
    wanted[there] = True
    order = rng.permutation(COUNT)[: module.SORTED + 100]
    index = Index(repo.storage)
    for _ in range(2):
        assert (index.have(digests[order]) == wanted[order]).all()
    for step in (1, 4, 5, 20, 100):
        pieces = [order[at : at + step] for at in range(0, 200, step)]
        assert [index.have(digests[piece]).tolist() for piece in pieces] == [wanted[piece].tolist() for piece in pieces]
    assert [place is not None for place in index.locate(digests[order[:99]])] == wanted[order[:99]].tolist()
    assert [any(index.places(digests[i].tobytes())) for i in order[:20]] == wanted[order[:20]].tolist()


def several(repo: Repository, count: int, files: int) -> tuple[Index, np.ndarray]:
    """An index of so many files, each with ``count`` digests; all digests, in that order. The first is in all files."""
    digests = np.random.default_rng(2).integers(0, 256, (files * count, 32), dtype=np.uint8)
    for number in range(files):
        name = f"{number:032x}"
        (repo.storage.root / "packs" / name).write_bytes(b"x" * 100)  # type: ignore[attr-defined]
        entries = np.zeros(count + 1, dtype=pack.ENTRY)
        mine = np.concatenate([digests[number * count : (number + 1) * count], digests[:1]])
        entries["digest"] = np.ascontiguousarray(mine).view("V32").ravel()
        repo.storage.write("index", new_id(), encode([(name, 100)], np.zeros(count + 1, dtype=np.uint32), entries))
    return Index(repo.storage), digests


def test_what_was_stored_together_is_looked_for_in_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And all that is scattered is found as well."""
    files, count = 12, 5000
    index, digests = several(new(tmp_path / "repo"), count, files)
    searched = list[int]()
    find = IndexFile.find

    def spy(self: IndexFile, digests: np.ndarray, *rest: object, **options: object) -> object:
        searched.append(len(digests))
        return find(self, digests, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(IndexFile, "find", spy)
    for number in range(files):
        searched.clear()
        assert index.have(digests[number * count : (number + 1) * count]).all()
        assert sum(searched) < 1.5 * count
    mixed = np.random.default_rng(3).permutation(np.concatenate([digests, digests ^ 1]))
    known = {row.tobytes() for row in digests}
    assert index.have(mixed).tolist() == [row.tobytes() in known for row in mixed]


def test_a_refresh_beside_a_look_up_does_not_disturb_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = new(tmp_path / "repo")
    index, digests = several(repo, 200, 8)
    find = IndexFile.find

    def meanwhile(self: IndexFile, digests: np.ndarray, *rest: object, **options: object) -> object:
        name = new_id()
        (tmp_path / "repo" / "packs" / name).write_bytes(b"x" * 100)
        entries = np.zeros(1, dtype=pack.ENTRY)
        repo.storage.write("index", new_id(), encode([(name, 100)], np.zeros(1, dtype=np.uint32), entries))
        index.refresh()
        return find(self, digests, *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(IndexFile, "find", meanwhile)
    assert index.have(digests).all()


def test_single_digests_are_looked_for_where_the_last_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the pages of a tree are; every place is told to who asks for all."""
    files, count = 12, 200
    index, digests = several(new(tmp_path / "repo"), count, files)
    looked = list[str]()
    rows = IndexFile.rows

    def spy(self: IndexFile, digest: bytes, key: int) -> Iterator[int]:
        looked.append(self.name)
        return rows(self, digest, key)

    monkeypatch.setattr(IndexFile, "rows", spy)
    for row in digests[count : 2 * count]:
        assert next(index.places(row.tobytes())).pack == f"{1:032x}"
    assert len(looked) < count + files
    assert {place.pack for place in index.places(digests[0].tobytes())} == {f"{n:032x}" for n in range(files)}


def test_a_pack_whose_table_is_gone_by_its_turn_was_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told, it is not marked as read, and no note goes as if all had been looked at."""
    repo = new(tmp_path / "repo")
    for content in ([1], [3]):
        back_up(repo, content)
    (gone, _) = sorted(repo.storage.list("packs"))
    add_note(repo.storage, set(), {repo.backups()[0].id})
    table_of, told = checks._table_of, list[Event]()

    def vanishing(repo: Repository) -> object:
        original = table_of(repo)

        def table(name: str) -> pack.Entries:
            if name == gone:
                raise DamagedError("gone")
            return original(name)

        return table

    monkeypatch.setattr(checks, "_table_of", vanishing)
    found = check(repo, read_data=True, report=told.append)
    assert (found.packs_read, found.coverage.read_packs, found.coverage.complete) == (1, 1, False)
    assert any(isinstance(event, Warned) and gone in event.text for event in told)
    assert repo.damage().backups
    monkeypatch.undo()
    assert check(repo, read_data=True).coverage.complete
    assert not repo.damage().backups

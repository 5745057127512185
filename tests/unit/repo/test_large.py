"""What only shows in a large repository: look-ups of many digests, and tables that are not kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from incbak.errors import DamagedError
from incbak.events import Event, Warned
from incbak.repo import check as checks
from incbak.repo import index as module
from incbak.repo import pack
from incbak.repo.check import check
from incbak.repo.damage import add_note
from incbak.repo.ids import new_id
from incbak.repo.index import Index, encode
from incbak.repo.repository import Repository
from tests.unit.repo.scene import back_up, new

COUNT = 30_000


def test_many_are_found_as_few_are(tmp_path: Path) -> None:
    """In any order; and a file of which nothing stays in memory can be read again."""
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
    assert len(data) > module._LARGE // 4
    repo.storage.write("index", new_id(), data)
    wanted = np.zeros(COUNT, dtype=bool)
    wanted[there] = True
    order = rng.permutation(COUNT)[: module.SORTED + 100]
    index = Index(repo.storage)
    for _ in range(2):
        assert (index.have(digests[order]) == wanted[order]).all()
        for file in index.files:
            file.let_go()
    assert [bool(index.have(digests[i : i + 1])[0]) for i in order[:50]] == wanted[order[:50]].tolist()


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

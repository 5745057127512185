"""A repository that somebody else wrote, with every checksum right: refused, or harmless."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from incbak.errors import DamagedError
from incbak.repo import damage, merge
from incbak.repo.check import check
from incbak.repo.index import IndexFile, encode, stored
from incbak.repo.repository import Repository
from tests.unit.repo import scene


@pytest.mark.parametrize("folder", ["packs", "index", "backups", "damaged", "locks"])
def test_a_link_in_the_place_of_a_folder_is_not_followed(tmp_path: Path, folder: str) -> None:
    """What is written there, notes and locks, would go elsewhere."""
    scene.new(tmp_path / "repo").close()
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(tmp_path / "repo" / folder)
    (tmp_path / "repo" / folder).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DamagedError, match=f"{folder} is no folder"):
        Repository.open(tmp_path / "repo")


@pytest.mark.parametrize("content", [b'{"digests":[],"backups":[],"x":' + b"[" * 100_000, b"", b"\xff", b"[]"])
def test_a_note_that_cannot_be_read_is_unknown(tmp_path: Path, content: bytes) -> None:
    """See test_unknown for what comes of it."""
    repo = scene.new(tmp_path / "repo")
    repo.storage.write("damaged", "0" * 32, content)
    assert list(repo.damage().unknown) == ["0" * 32]


def test_a_note_that_is_too_large_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(damage, "_LIMIT", 10)
    repo = scene.new(tmp_path / "repo")
    repo.storage.write("damaged", "0" * 32, b'{"digests":[],"backups":[]}')
    assert list(repo.damage().unknown) == ["0" * 32]


@pytest.mark.parametrize("packs", [0, 1])
def test_a_pack_number_out_of_range_is_left_out_of_a_merge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packs: int
) -> None:
    """The index still finds what the sound entries say."""
    repo = scene.new(tmp_path / "repo")
    content = [1, 2, 3]
    made = scene.back_up(repo, content)
    repo.index.refresh()
    (file,) = repo.index.files
    table = list(zip(file.names, file.packs["size"].tolist(), strict=True))[:packs]
    lying = encode(table, np.full(len(file), 1 << 31, dtype=np.uint32), file.entries())
    repo.storage.write("index", "e" * 32, lying)
    monkeypatch.setattr(merge, "FILES", 1)
    merge.merge_small(repo.storage)
    (name,) = repo.storage.list("index")
    assert len(IndexFile(name, stored(repo.storage, name))) == len(file)
    fresh = Repository.open(tmp_path / "repo")
    assert scene.restore(fresh, made) == [scene.cluster(n) for n in content]
    assert not check(fresh, read_data=True).problems

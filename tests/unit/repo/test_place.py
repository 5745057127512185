"""Where a repository is made, and where not."""

from __future__ import annotations

from pathlib import Path

import pytest

from incbak import durable
from incbak.errors import DurabilityError, LostConfigError, NoRepositoryError, UsageError
from incbak.repo.repository import Repository

from .scene import CLUSTER, PASSPHRASE, back_up, new, opened


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_repository_without_its_config_is_left_as_it_is(tmp_path: Path, encrypted: bool) -> None:
    path = tmp_path / "repo"
    record = back_up(new(path, encrypted=encrypted), [1])
    (path / "config").rename(tmp_path / "config")
    before = sorted(str(p) for p in path.rglob("*"))
    for again in (False, True):
        with pytest.raises(LostConfigError, match="holds files of a repository"):
            new(path, encrypted=again)
    with pytest.raises(LostConfigError) as refused:
        opened(path)
    assert "init" not in refused.value.hint
    assert sorted(str(p) for p in path.rglob("*")) == before
    (tmp_path / "config").rename(path / "config")
    assert [r.id for r in opened(path).backups()] == [record.id]


@pytest.mark.parametrize("kind", ["keys", "packs", "index", "backups", "damaged", "pins"])
def test_one_file_of_any_kind_is_enough(tmp_path: Path, kind: str) -> None:
    (tmp_path / kind).mkdir()
    held = tmp_path / kind / "anything"
    held.write_bytes(b"x")
    with pytest.raises(LostConfigError, match=kind):
        Repository.init(tmp_path, CLUSTER, PASSPHRASE)
    assert held.read_bytes() == b"x"


def test_empty_folders_of_an_init_that_was_killed_are_no_obstacle(tmp_path: Path) -> None:
    for kind in ("keys", "packs", "locks"):
        (tmp_path / kind).mkdir()
    (tmp_path / "locks" / "repository.lock").touch()
    back_up(new(tmp_path), [1])


@pytest.mark.parametrize(
    "text", ["s3:bucket/x", "ssh://host/x", "user@host:/x", "sftp:host:x", "rest:https://h/", "C:\\x", "host:backup"]
)
def test_an_address_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.chdir(tmp_path)
    for act in (lambda: Repository.init(Path(text), CLUSTER), lambda: Repository.open(Path(text))):
        with pytest.raises(UsageError, match="not the path of a local directory"):
            act()
    assert list(tmp_path.iterdir()) == []
    new(tmp_path / "s3:bucket")  # said plainly, it is a name like any other
    with pytest.raises(NoRepositoryError):
        Repository.open(tmp_path / "other:bucket")


def test_the_hint_names_a_place_where_init_works(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    for path in (tmp_path, tmp_path / "file", tmp_path / "empty", tmp_path / "new"):
        with pytest.raises(NoRepositoryError) as refused:
            Repository.open(path)
        new(Path(refused.value.hint.partition("incbak init ")[2]))


def test_the_hint_for_a_directory_that_is_missing_is_to_make_it(tmp_path: Path) -> None:
    with pytest.raises(DurabilityError) as refused:
        durable.write_new(tmp_path / "missing" / "x", [b""])
    assert refused.value.hint == f"Make the directory first: mkdir -p {tmp_path / 'missing'}"

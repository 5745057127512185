"""A whole VM goes below one directory: names are keys, links are not followed, what is there stays."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from incbak.errors import DurabilityError, RestoreError
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.restore import vm as module
from incbak.restore.restore import restore_disk
from incbak.restore.targets import open_target
from incbak.restore.vm import Whole, restore_vm
from tests.unit.restore.forged import DISKS, forged

HOSTILE = ("../../escaped", "/etc/escaped", "..", ".hidden", "a b\n\x1b[31m")


def _restore(repo: Repository, record: Record, out: Path, *, force: bool = False) -> Whole:
    def one(disk: DiskRecord, where: str) -> None:
        restore_disk(repo, record, disk, open_target(where, disk.size, force=force))

    return restore_vm(record, out, "raw", one, force=force)


@pytest.mark.parametrize("taken", ["vdb.raw", "vm.json", "attachments/note"])
def test_what_is_there_is_left_alone_before_anything_is_written(tmp_path: Path, taken: str) -> None:
    made = forged(tmp_path / "repo", DISKS, attachments={"note": "hello"})
    out = tmp_path / "out"
    (out / taken).parent.mkdir(parents=True)
    (out / taken).write_bytes(b"precious")
    with pytest.raises(RestoreError, match="exists"):
        _restore(*made, out)
    assert [(p, p.read_bytes()) for p in out.rglob("*") if p.is_file()] == [(out / taken, b"precious")]
    _restore(*made, out, force=True)
    assert {n: (out / f"{n}.raw").read_bytes() for n in DISKS} == DISKS
    assert (out / "attachments/note").read_text() == "hello"


@pytest.mark.parametrize("link", ["vda.raw", "vm.json", "attachments", "attachments/note"])
def test_no_link_is_followed(tmp_path: Path, link: str) -> None:
    made = forged(tmp_path / "repo", DISKS, attachments={"note": "hello"})
    precious, out = tmp_path / "precious", tmp_path / "out"
    precious.mkdir()
    (precious / "file").write_bytes(b"precious")
    (out / link).parent.mkdir(parents=True)
    (out / link).symlink_to(precious / ("" if link == "attachments" else "file"))
    with pytest.raises(RestoreError, match="is a link"):
        _restore(*made, out, force=True)
    assert [(p.name, p.read_bytes()) for p in precious.iterdir()] == [("file", b"precious")]


def test_what_the_user_names_is_what_the_user_means(tmp_path: Path) -> None:
    made = forged(tmp_path / "repo", DISKS)
    (tmp_path / "real").mkdir()
    (tmp_path / "alias").symlink_to(tmp_path / "real")
    _restore(*made, tmp_path / "alias")
    assert (tmp_path / "real" / "vda.raw").read_bytes() == DISKS["vda"]


def test_names_of_strangers_stay_inside(tmp_path: Path) -> None:
    """faults row 71: names are keys, never paths."""
    disks = {name: name.encode() * 1000 for name in HOSTILE}
    repo, record = forged(tmp_path / "repo", disks, attachments={f"{name}x": name for name in HOSTILE})
    out = tmp_path / "deep" / "er" / "out"
    _restore(repo, record, out)
    described = json.loads((out / "vm.json").read_text())
    assert {d["name"]: (out / d["file"]).read_bytes() for d in described["disks"]} == disks
    assert {name: (out / path).read_text() for name, path in described["attachments"].items()} == record.attachments
    files = [p for p in tmp_path.rglob("*") if p.is_file() and not p.is_relative_to(tmp_path / "repo")]
    assert all(p.resolve().is_relative_to(out) for p in files)
    assert len(files) == 2 * len(HOSTILE) + 1


@pytest.mark.parametrize("name", ["", "x" * 300, "\u00e9" * 120])
def test_what_is_no_name_stops_it_before_anything_is_written(tmp_path: Path, name: str) -> None:
    made = forged(tmp_path / "repo", DISKS, attachments={name: "x"})
    with pytest.raises(RestoreError) as caught:
        _restore(*made, tmp_path / "out")
    assert "one by one" in caught.value.hint
    assert not (tmp_path / "out").exists()


def test_an_attachment_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = forged(tmp_path / "repo", DISKS, attachments={"a": "1", "b": "2"})
    whole = module.durable.write_new

    def failing(path: Path, pieces: list[bytes], **more: bool) -> int:
        if path.name == "a":
            raise DurabilityError("no space left")
        return whole(path, pieces, **more)

    monkeypatch.setattr(module.durable, "write_new", failing)
    done = _restore(*made, tmp_path / "out")
    assert (list(done.files), list(done.attachments), list(done.failed)) == (list(DISKS), ["b"], ["attachment a"])

"""``restore --all``: a whole VM under safe names, all of it or told what not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from incbak.repo.record import Record
from incbak.repo.repository import Repository
from tests.kit.cli import Incbak
from tests.unit.restore.forged import DISKS, forged


def _made(root: Path, **more: object) -> tuple[Incbak, Record]:
    repo, record = forged(root / "repo", DISKS, **more)
    repo.close()
    return Incbak(root), record


@pytest.mark.parametrize("form", ["raw", "qcow2"])
def test_a_whole_vm(tmp_path: Path, form: str) -> None:
    out = tmp_path / "new" / "out"
    incbak, record = _made(tmp_path, attachments={"web1.xml": "<x/>"}, config={"block": [{"device": "vda"}]})
    told = incbak("restore", "latest", "--all", out, "--format", form).out
    assert f"2 of 2 disks, 1 attached file: in {out}" in told
    assert sorted(p.name for p in out.iterdir()) == ["attachments", "vda." + form, "vdb." + form, "vm.json"]
    if form == "raw":
        assert {n: (out / f"{n}.raw").read_bytes() for n in DISKS} == DISKS
    assert (out / "attachments" / "web1.xml").read_text() == "<x/>"
    described = json.loads((out / "vm.json").read_text())
    assert [(d["name"], d["file"], d["root"]) for d in described["disks"]] == [
        (d.name, f"{d.name}.{form}", d.root) for d in record.disks
    ]
    assert (described["config"], described["attachments"], described["failed"], described["backup"]) == (
        {"block": [{"device": "vda"}]}, {"web1.xml": "attachments/web1.xml"}, {}, record.id)  # fmt: skip


def _spoil(incbak: Incbak, record: Record, name: str) -> None:
    repo = Repository.open(incbak.repo)
    disk = record.disk(name)
    assert disk
    (place,) = repo.index.places(repo.tree(disk).digests(0, 1)[0].tobytes())
    path = incbak.repo / "packs" / place.pack
    data = bytearray(path.read_bytes())
    data[place.offset + place.stored // 2] ^= 1
    path.write_bytes(data)


def test_one_disk_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    incbak, record = _made(tmp_path, attachments={"note": "hello"})
    _spoil(incbak, record, "vda")
    out = tmp_path / "out"
    ran = incbak.run("restore", "latest", "--all", out)
    assert (ran.code, "disk vda: " in ran.err, "not all of backup" in ran.err) == (3, True, True)
    assert sorted(p.name for p in out.iterdir()) == ["attachments", "vdb.raw", "vm.json"]
    described = json.loads((out / "vm.json").read_text())
    assert ([d["file"] for d in described["disks"]], list(described["failed"])) == ([None, "vdb.raw"], ["disk vda"])
    ran = incbak.run("restore", "latest", "--all", out, "--force", "--salvage")
    assert (ran.code, "could not be read and are zeroes" in ran.err) == (13, True)
    (line,) = [line for line in ran.out.splitlines() if "to" in line and "vda.raw" in line]
    assert "verified and synced, but for 8192 bytes that are damaged and zeroes here" in line
    assert (out / "vda.raw").stat().st_size == len(DISKS["vda"])
    _spoil(incbak, record, "vdb")
    assert incbak.run("restore", "latest", "--all", tmp_path / "none").code == 13


def test_bad_arguments(tmp_path: Path) -> None:
    incbak, _ = _made(tmp_path)
    for more in (["--disk", "vda"], ["--in-place"]):
        assert incbak.run("restore", "latest", "--all", tmp_path / "out", *more).code == 2
    (tmp_path / "file").write_bytes(b"")
    ran = incbak.run("restore", "latest", "--all", tmp_path / "file")
    assert (ran.code, "directory" in ran.err) == (1, True)

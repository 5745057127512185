"""A record that is committed can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from incbak.errors import BackupError
from incbak.repo import record as records
from incbak.repo.fitting import MAX_ATTACHED, MAX_ATTACHMENTS, MAX_CONFIG, MAX_NOTES, fitted, proven
from incbak.repo.record import Record
from incbak.repo.repository import Repository

from .scene import back_up, new, record_of, writing

MIB = "x" * (1 << 20)


@pytest.fixture
def repo(tmp_path: Path) -> Repository:
    return new(tmp_path / "repo")


def _record(repo: Repository, **more: Any) -> Record:
    return record_of(repo, {"vda": (4096, bytes(32))}, **more)


@pytest.mark.parametrize(
    "more",
    [
        {"attachments": {f"{n}.xml": MIB for n in range(17)}},
        {"started": "yesterday"},
        {"cluster_size": 5},
        {"notes": ("\udcff",)},
        {"config": {"deep": None, "large": MIB * 17}},
    ],
    ids=lambda more: next(iter(more)),
)
def test_what_nobody_could_read_is_not_committed(repo: Repository, more: dict[str, Any]) -> None:
    kept = back_up(repo, [1])
    with writing(repo) as writer, pytest.raises(BackupError, match="could not be read again"):
        writer.commit(_record(repo, **more))
    assert [r.id for r in repo.backups()] == [kept.id]
    assert not repo.unreadable


def test_a_record_that_fits_stays_as_it_is(repo: Repository) -> None:
    made = _record(repo, config={"machine": "q35", "n": [1, 2.5, None]}, attachments={"a.xml": "<a/>"}, notes=("x",))
    assert fitted(made) == (made, [])
    assert records.decode(made.id, proven(made)) == made


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"config": {"large": "x" * MAX_CONFIG}}, "the configuration of the VM was left out"),
        ({"config": {"name": "\udcff"}}, "the configuration of the VM was left out"),
        ({"attachments": {f"{n}": MIB for n in range(MAX_ATTACHED >> 19)}}, "the attachment 7 was left out"),
        ({"attachments": {"c": "\0" * (MAX_ATTACHED // 5)}}, "the attachment c was left out"),
        ({"attachments": {f"{n}": "" for n in range(MAX_ATTACHMENTS + 1)}}, "attachment 256 was left out"),
        ({"notes": tuple(str(n) for n in range(MAX_NOTES + 5))}, "5 of 1005 notes"),
    ],
)
def test_a_part_that_is_too_large_is_left_out_loudly(repo: Repository, more: dict[str, Any], said: str) -> None:
    made, lost = fitted(_record(repo, **more))
    assert said in "\n".join(lost)
    assert set(lost) <= set(made.notes)
    assert records.decode(made.id, proven(made)) == made


def test_long_texts_are_cut_and_what_is_no_text_is_replaced(repo: Repository) -> None:
    base = _record(repo, notes=("x" * 100_000, "disk a\udcff failed: it"), tags=("t\udc80",), host="h" * 5000)
    disks = tuple(msgspec.structs.replace(d, detail="y" * 100_000) for d in base.disks)
    made, lost = fitted(msgspec.structs.replace(base, disks=disks))
    assert lost == []
    assert max(map(len, (*made.notes, made.host, made.disks[0].detail))) <= 2000
    assert made.incomplete
    assert len(proven(made)) < 10_000


def test_the_limits_together_are_below_that_of_a_record() -> None:
    assert MAX_CONFIG + MAX_ATTACHED < records.LIMIT - (2 << 20)

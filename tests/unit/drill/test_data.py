"""What a drill proves of the data: nothing that a restore could get wrong goes through."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from incbak.drill.data import prove_sample, prove_whole
from incbak.drill.drill import Options, drill
from incbak.drill.partitions import Part
from incbak.drill.scratch import Scratch
from incbak.repo.check import check
from incbak.repo.drills import read_drills
from incbak.repo.record import Record
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT
from incbak.restore import restore as restores
from tests.unit.repo.scene import CLUSTER, back_up, cluster, new

CONTENT = [0, 1, 2, 3, 0, 0, 1] + [0] * FANOUT + [5, 6] + [0] * FANOUT
"""Three leaves, the last is zero."""


@pytest.fixture
def made(tmp_path: Path) -> tuple[Repository, Record]:
    repo = new(tmp_path / "repo")
    return repo, back_up(repo, CONTENT)


def _spoil(repo: Repository, digest: bytes) -> None:
    for place in repo.index.places(digest):
        path = repo.storage.root / "packs" / place.pack
        data = bytearray(path.read_bytes())
        data[place.offset + place.stored // 2] ^= 1
        path.write_bytes(data)


def test_what_is_whole_is_proved_and_kept_apart(made: tuple[Repository, Record], tmp_path: Path) -> None:
    repo, record = made
    start, end = 2 * CLUSTER + 100, (FANOUT + 8) * CLUSTER + 7
    scratch = Scratch(Part(1, start, end - start), tmp_path)
    found = prove_whole(repo, record, record.disks[0], [scratch])
    assert (found.problems, found.damaged) == ([], set())
    assert (found.disk.clusters, found.disk.of, found.disk.wrong) == (len(CONTENT), len(CONTENT), 0)
    held = b"".join(cluster(n) for n in CONTENT)
    assert scratch.read(0, end) == held[start:end]
    scratch.close()
    assert [p.name for p in tmp_path.iterdir()] == ["repo"]


def _faulty(numbers: dict[int, int]) -> Any:
    put = restores._Restore._put

    def other(job: Any, number: int, content: Any) -> None:
        if (there := numbers.get(number, number)) >= 0:
            put(job, there, content)

    return other


@pytest.mark.parametrize("numbers", [{2: -1}, {2: 4}, {FANOUT + 7: FANOUT + 8, FANOUT + 8: FANOUT + 7}])
def test_a_restore_that_goes_wrong_is_noticed(
    made: tuple[Repository, Record], monkeypatch: pytest.MonkeyPatch, numbers: dict[int, int], tmp_path: Path
) -> None:
    """A cluster that is left out, put elsewhere, or swapped, though all that is read does verify."""
    repo, record = made
    monkeypatch.setattr(restores._Restore, "_put", _faulty(numbers))
    (problem,) = prove_whole(repo, record, record.disks[0], []).problems
    assert "what was restored has the root" in problem
    done = drill(repo, record, Options(tmp_path))
    assert (done.good, done.exit_code, repo.damage().backups) == (False, 1, frozenset())


def test_damage_is_told_noted_and_stored_again(made: tuple[Repository, Record], tmp_path: Path) -> None:
    repo, record = made
    digest = repo.tree(record.disks[0]).digests(2, 1)[0].tobytes()
    _spoil(repo, digest)
    done = drill(repo, record, Options(tmp_path))
    assert (done.exit_code, done.disks[0].wrong, "4096 bytes in 1 places" in done.problems[0]) == (13, 1, True)
    assert (repo.damage().digests, repo.damage().backups) == ({digest}, {record.id})
    assert [d.good for d in read_drills(repo.storage)] == [False]
    again = back_up(repo, CONTENT)
    repo = Repository.open(repo.storage.root)
    assert drill(repo, again, Options(tmp_path)).good
    assert drill(repo, record, Options(tmp_path)).good
    check(repo, read_data=True)
    assert not repo.damage().backups


@pytest.mark.parametrize("percent", [100.0, 50.0])
def test_a_damaged_page_is_noted_too(made: tuple[Repository, Record], tmp_path: Path, percent: float) -> None:
    repo, record = made
    for digest in (repo.tree(record.disks[0]).leaf_digest(0), bytes.fromhex(record.disks[0].root)):
        _spoil(repo, digest)
        repo = Repository.open(repo.storage.root)
        done = drill(repo, record, Options(tmp_path, percent))
        assert (done.exit_code, len(done.problems) >= 1) == (13, True)
        assert digest in repo.damage().digests


def test_a_sample_is_what_its_seed_draws(made: tuple[Repository, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    """At least one cluster of each leaf that holds something; never a hole."""
    repo, record = made
    reader = type(repo.reader())
    original, read = reader.read_many, []

    def spy(self: Any, digests: Any) -> Any:
        read.append(digests.tobytes())
        return original(self, digests)

    monkeypatch.setattr(reader, "read_many", spy)
    seen = []
    for seed in (1, 1, 2, 3, 4):
        read.clear()
        found = prove_sample(repo, record, record.disks[0], 0.001, seed)
        assert (found.disk.clusters, found.problems) == (2, [])
        seen.append(tuple(read))
    assert seen[0] == seen[1]
    assert len(set(seen)) > 1
    assert prove_sample(repo, record, record.disks[0], 99.99, 1).disk.clusters == 6


def test_a_sample_finds_what_it_reads(made: tuple[Repository, Record], monkeypatch: pytest.MonkeyPatch) -> None:
    repo, record = made
    digest = repo.tree(record.disks[0]).digests(3, 1)[0].tobytes()
    _spoil(repo, digest)
    found = prove_sample(repo, record, record.disks[0], 99.99, 1)
    assert (found.disk.wrong, found.damaged, "cluster 3" in found.problems[0]) == (1, {digest}, True)
    reader = type(repo.reader())
    monkeypatch.setattr(reader, "read_many", lambda self, digests: ((n, b"x" * CLUSTER) for n in range(len(digests))))
    assert prove_sample(repo, record, record.disks[0], 99.99, 1).disk.wrong == 6


def test_a_tree_that_is_not_of_the_disk(made: tuple[Repository, Record]) -> None:
    """Larger than the record says: a restore would not be what was backed up."""
    import msgspec

    repo, record = made
    disk = msgspec.structs.replace(record.disks[0], size=(FANOUT + 8) * CLUSTER)
    assert prove_whole(repo, record, disk, []).problems
    disk = msgspec.structs.replace(record.disks[0], size=record.disks[0].size - 100)
    assert prove_whole(repo, record, disk, []).problems == []  # the last cluster is zero, whatever its length


def test_an_incomplete_backup_is_no_good_drill(tmp_path: Path) -> None:
    import msgspec

    repo = new(tmp_path / "repo")
    record = msgspec.structs.replace(back_up(repo, [1]), notes=("disk vdb failed: no luck",))
    done = drill(repo, record, Options(tmp_path))
    assert (done.good, done.exit_code, "vdb failed: no luck" in done.problems[0]) == (False, 1, True)


def test_some_disks_are_no_drill_of_the_vm(made: tuple[Repository, Record], tmp_path: Path) -> None:
    repo, record = made
    assert drill(repo, record, Options(tmp_path, disks=("vda",))).good
    assert read_drills(repo.storage) == []

"""One backup for all: a disk of odd size, with data, holes, and more than one leaf in its tree."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from incbak import durable
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.tree import FANOUT
from tests.kit.cli import Content, content
from tests.kit.need import missing, need, need_root
from tests.unit.backup.scene import Disk, FakeEngine, back_up
from tests.unit.repo.scene import CLUSTER, new

SIZE = 3 * FANOUT * CLUSTER + 1000
"""Four leaves: the second is all zeroes, so are most clusters of the others."""
DATA = [0, 1, 2, 5, FANOUT - 1, 2 * FANOUT, 2 * FANOUT + 7, 3 * FANOUT]


@dataclass
class Made:
    """The repository, the backup, and what the disk held (pieces of a cluster that are not zero)."""

    repo: Repository
    record: Record
    held: Content

    @property
    def disk(self) -> DiskRecord:
        """Its only disk."""
        return self.record.disks[0]

    def spoil(self, digest: bytes) -> None:
        """Flip a byte in the middle of a stored blob."""
        (place,) = self.repo.index.places(digest)
        path = self.repo.storage.root / "packs" / place.pack
        at = place.offset + place.stored // 2
        with path.open("r+b") as f:
            f.seek(at)
            byte = f.read(1)[0]
            f.seek(at)
            f.write(bytes([byte ^ 1]))

    def cluster(self, number: int) -> bytes:
        """The digest of a cluster."""
        return self.repo.tree(self.disk).digests(number, 1)[0].tobytes()


@pytest.fixture(scope="session")
def _original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("original")
    data, rng = bytearray(SIZE), random.Random(1)
    for number in DATA:
        piece = rng.randbytes(min(CLUSTER, SIZE - number * CLUSTER))
        data[number * CLUSTER : number * CLUSTER + len(piece)] = piece
    back_up(new(directory / "repo"), FakeEngine({"vda": Disk(data)}), incremental=False)
    (directory / "disk").write_bytes(data)
    return directory


@pytest.fixture
def made(_original: Path, tmp_path: Path) -> Made:
    """A copy that a test may damage."""
    shutil.copytree(_original / "repo", tmp_path / "repo")
    repo = Repository.open(tmp_path / "repo")
    return Made(repo, repo.find("latest"), content(_original / "disk", CLUSTER))


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    durable.arm()


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Makes loop devices that are full of something else."""
    devices: list[str] = []

    def make(size: int) -> Path:
        need_root()
        need("losetup")
        backing = tmp_path / f"backing-{len(devices)}"
        backing.write_bytes(b"\xee" * size)
        ran = subprocess.run(["losetup", "--find", "--show", backing], capture_output=True, text=True, check=False)
        if ran.returncode:
            missing("root", f"no loop device can be had: {ran.stderr.strip()}")
        devices.append(ran.stdout.strip())
        return Path(devices[-1])

    yield make
    for device in devices:
        subprocess.run(["losetup", "--detach", device], check=True)


__all__ = ["CLUSTER", "DATA", "SIZE", "Made"]

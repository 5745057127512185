"""Repositories that somebody else wrote, or that rotted: a restore is right to the last bit, or refused."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random
from urllib.parse import unquote_to_bytes

import msgspec
from click.testing import CliRunner

from fuzzlib import forge, mutate
from fuzzlib.case import FuzzTarget, demand
from incbak.cli.main import cli
from incbak.errors import IncbakError
from incbak.repo import merge, pins
from incbak.repo.check import check, rebuild_index
from incbak.repo.prune import Options, prune
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.repo.retention import Policy
from incbak.restore.restore import restore_disk
from incbak.restore.targets import FileTarget, Target
from tests.unit.repo import scene

ROT, SEALED, FORGED = "rot", "sealed", "forged"
ENCRYPTED = 2
"""The sample that is: whatever is changed in it, nothing passes for ours that is not."""
_LARGEST = 1 << 44
"""Disks larger than this are restored to sparse files only: to zero them takes time, as it must."""
_NEW = [5, 0, 3, 1, 1, 2, 9]


class Input(msgspec.Struct):
    """Which sample, and what is changed in it.

    Contents by path (quoted as in a URL), ``None`` for a file that is gone; links by path.
    """

    kind: str
    sample: int
    files: dict[str, bytes | None] = {}
    links: dict[str, str] = {}


class Bounded(Target):
    """Takes nothing outside its size, and nothing empty."""

    def __init__(self, size: int) -> None:
        self.size, self.name = size, "bounded"

    def write(self, data: bytes | memoryview, offset: int) -> None:
        demand(offset >= 0 and len(data) > 0 and offset + len(data) <= self.size, f"a write outside: {offset}")

    def zero(self, offset: int, length: int) -> None:
        demand(offset >= 0 and length > 0 and offset + length <= self.size, f"zeroes outside: {offset} {length}")

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def _not_random(seed: int) -> None:
    """Ids and salts are the same each time: so are samples, and what a case does."""
    rng = Random(seed)
    secrets.token_hex = lambda count=16: rng.randbytes(count or 16).hex()  # type: ignore[assignment]
    secrets.token_bytes = lambda count=16: rng.randbytes(count or 16)  # type: ignore[assignment]
    os.urandom = rng.randbytes


class RepoTarget(FuzzTarget):
    """Samples are made once; every case works on a copy."""

    settle_every = 50

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        merge.FILES = 1
        _not_random(0)
        self.samples: list[Path] = []
        self.truth: dict[tuple[int, str], bytes] = {}
        passphrase = directory / "passphrase"
        passphrase.write_bytes(scene.PASSPHRASE)
        passphrase.chmod(0o600)
        os.environ["INCBAK_PASSWORD_FILE"] = str(passphrase)
        small = [[1, 2, 3, 0, 3, 9, 12] * 6, [1, 2, 3, 0, 4, 9] * 7]
        for contents in (small, [[0, 3, 1] * 400], small):
            path = directory / f"sample{len(self.samples)}"
            repo = scene.new(path, encrypted=len(self.samples) == ENCRYPTED)
            for content in contents:
                made = scene.back_up(repo, content)
                self.truth[len(self.samples), made.id] = b"".join(map(scene.cluster, content))
            gone = scene.back_up(repo, [7, 8, 10])
            repo.storage.remove("backups", gone.id)
            prune(repo, Policy(last=9))
            pins.pin(repo.storage, made.id)
            repo.storage.write("damaged", "0" * 32, b'{"digests":["' + b"ab" * 32 + b'"],"backups":[]}')
            repo.close()
            self.samples.append(path)
        self.work = directory / "work"
        self.runner = CliRunner()

    def make(self, rng: Random) -> bytes:
        number = rng.choice((0, 0, 0, 1, ENCRYPTED))
        sample = self.samples[number]
        made = Input(ROT if number == ENCRYPTED else rng.choice((ROT, ROT, SEALED, SEALED, FORGED)), number)
        if made.kind == FORGED:
            made.files = forge.forged(rng)
        elif made.kind == SEALED:
            made.files, made.links = forge.sealed(rng, sample)
        else:
            paths = sorted(p for p in sample.rglob("*") if p.is_file())
            for path in rng.sample(paths, rng.choice((1, 1, 1, 2))):
                name = str(path.relative_to(sample))
                made.files[name] = _rotten(rng, path, rng.choice(paths))
        return msgspec.msgpack.encode(made)

    def run(self, data: bytes) -> None:
        given = msgspec.msgpack.decode(data, type=Input)
        _not_random(1)
        for name in ("repo", "out", "outside"):
            (self.work / name).mkdir(parents=True)
        try:
            self._prepare(given)
            self._use(given)
            demand(sorted(os.listdir(self.work)) == ["out", "outside", "repo"], f"strays: {os.listdir(self.work)}")
            demand(
                not os.listdir(self.work / "outside"), f"outside the repository: {os.listdir(self.work / 'outside')}"
            )
        finally:
            shutil.rmtree(self.work)

    def _prepare(self, given: Input) -> None:
        repo = self.work / "repo"
        if given.kind == FORGED:
            for kind in ("packs", "index", "backups", "damaged", "locks", "pins", "condemned"):
                (repo / kind).mkdir()
        else:
            shutil.copytree(self.samples[given.sample], repo, dirs_exist_ok=True, copy_function=os.link)
        for name, content in given.files.items():
            path = repo / os.fsdecode(unquote_to_bytes(name))
            demand(path.resolve().is_relative_to(repo), "the fuzzer writes outside its place")
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        for name, to in given.links.items():
            shutil.rmtree(repo / name, ignore_errors=True)
            (repo / name).unlink(missing_ok=True)
            (repo / name).symlink_to(to)

    def _use(self, given: Input) -> None:
        try:
            repo = scene.opened(self.work / "repo")
            records = repo.backups()
            repo.damage()
        except IncbakError:
            self._commands([])
            return
        for record in records:
            for disk in record.disks:
                self._restore(given, repo, record, disk)
            self._refused(lambda r=record: repo.is_whole(r, set()))  # type: ignore[misc]
        self._refused(lambda: repo.find("latest"))
        self._refused(lambda: check(repo, read_data=True))
        self._commands(records)
        self._refused(lambda: check(repo))
        self._new_backup(given, repo)
        self._refused(lambda: rebuild_index(repo))
        restored = [r for r in records[:2] if all(self._restore(given, repo, r, d) for d in r.disks[:2])]
        self._refused(lambda: self._prune(given, repo, restored))
        repo.close()

    def _prune(self, given: Input, repo: Repository, restored: list[Record]) -> None:
        """A backup that could be restored and is still listed can be restored."""
        fresh = scene.opened(repo.storage.root)
        self._refused(lambda: prune(fresh, Policy(last=1), None, Options(grace=0.0, repack_below=1.0)))
        listed = scene.opened(repo.storage.root).storage.list("backups")
        for record in restored:
            if record.id in listed:
                right = all(self._restore(given, fresh, record, d) for d in record.disks[:2])
                demand(right, "a prune took away what a backup needs")

    def _refused(self, action: Callable[[], object]) -> bool:
        """True when it worked; anything but an error of ours is a finding."""
        try:
            action()
        except IncbakError:
            return False
        return True

    def _restore(self, given: Input, repo: Repository, record: Record, disk: DiskRecord) -> bool:
        path = self.work / "out" / "disk.raw"
        right = self._refused(lambda: restore_disk(repo, record, disk, FileTarget(path, disk.size, force=False)))
        left = os.listdir(path.parent)
        demand(left == (["disk.raw"] if right else []), f"left after a restore: {left}")
        if right:
            demand(path.stat().st_size == disk.size, "a restored disk has another size")
            truth = self.truth.get((given.sample, record.id))
            if truth is not None and given.kind == ROT:
                demand(path.read_bytes() == truth, "a restored disk has wrong content")
            path.unlink()
        if disk.size <= _LARGEST:
            self._refused(lambda: restore_disk(repo, record, disk, Bounded(disk.size), salvage=True))
        return right

    def _commands(self, records: list[Record]) -> None:
        base, out = ["-r", str(self.work / "repo")], self.work / "out"
        commands = [["list"], ["list", "--json"], ["check"]]
        small = [r for r in records if all(d.size < 1 << 40 for d in r.disks) and len(r.disks) < 9]
        commands += [["restore", r.id, str(out)] for r in small[:1]] + [["show", r.id] for r in records[:2]]
        for command in commands:
            ran = self.runner.invoke(cli, [*base, *command])
            if ran.exception and not isinstance(ran.exception, (IncbakError, SystemExit)):
                raise ran.exception
        for path in out.iterdir():
            demand(path.suffix == ".raw" and path.is_file(), f"restored to {path.name}")
            path.unlink()

    def _new_backup(self, given: Input, repo: Repository) -> None:
        """Content that is read again is stored again where a check found it damaged."""
        made: list[Record] = []
        if self._refused(lambda: made.append(scene.back_up(repo, _NEW))) and given.kind == ROT:
            repo.backups()
            got = b"".join(scene.restore(repo, made[0]))
            if repo.cluster_size == scene.CLUSTER:
                demand(got == b"".join(map(scene.cluster, _NEW)), "a new backup has wrong content")


def _rotten(rng: Random, path: Path, other: Path) -> bytes | None:
    choice = rng.random()
    if choice < 0.06:
        return None
    if choice < 0.12:
        return other.read_bytes()
    if choice < 0.16:
        return b""
    data = path.read_bytes()
    return mutate.mutated(rng, data, other.read_bytes()) if data else rng.randbytes(40)

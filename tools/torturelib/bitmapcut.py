"""Power cuts and kills under a tracked disk, in this process: what the bitmap says afterwards is never too little (I2).

Storage as a drive may leave it: of what was not synced, each page of 4 KiB (each sector of the bitmap's header) holds
any of the versions that it had since the last sync. A cut may come before and after every sync, and between any two
steps of a write. After each, the bitmap is opened as `incbak serve` does it: it is refused, with a reason, or every
block in which the image differs from the base is marked.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from unittest import mock

from incbak import durable, host
from incbak.bitmap.file import Bitmap, State
from incbak.bitmap.format import REGION, SECTOR
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import FileDisk, open_disk
from incbak.serve.tracker import TrackedDisk
from torturelib.world import LostError, Outcomes

PAGE = 4096
CLUSTER = 65536
SIZE = 3 * REGION + 5 * 512
NAME = "base"


class _Cut(Exception):
    pass


class _File:
    """The versions of one file's content since its last sync; the last is what a reader sees."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.versions = [path.read_bytes()]

    def look(self) -> None:
        """Note what is there now."""
        now = self.path.read_bytes()
        if now != self.versions[-1]:
            self.versions.append(now)

    def synced(self) -> None:
        """What is there now stays."""
        self.versions = [self.path.read_bytes()]

    def cut(self, rng: Random) -> None:
        """Let any version of each page have reached the disk."""
        self.look()
        if len(self.versions) == 1:
            return
        size = len(self.versions[-1])
        old = [v.ljust(size, b"\0") for v in self.versions]
        edges = [0, SECTOR, 2 * SECTOR, *range(PAGE, size, PAGE), size]
        mixed = b"".join(rng.choice(old)[a:b] for a, b in itertools.pairwise(edges))
        with self.path.open("r+b") as f:
            f.write(mixed)


class _Image:
    """The blocks that were written since the last flush, each with its versions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now: dict[int, bytes] = {}
        self.base: dict[int, bytes] = {}
        self.versions: dict[int, list[bytes]] = {}

    def write(self, disk: FileDisk, block: int, data: bytes) -> None:
        """One block."""
        self.versions.setdefault(block, [self.now.get(block, bytes(PAGE))]).append(data)
        disk.write(memoryview(data), block * PAGE)
        self.now[block] = data

    def cut(self, rng: Random) -> None:
        """Let any version of each block have reached the disk."""
        with self.path.open("r+b") as f:
            for block, versions in self.versions.items():
                self.now[block] = rng.choice(versions)
                f.seek(block * PAGE)
                f.write(self.now[block])
        self.versions = {}

    def changed(self) -> list[int]:
        """The blocks that are not what they were in the base."""
        return [b for b in self.now if self.now[b] != self.base.get(b, bytes(PAGE))]


class _World:
    def __init__(self, root: Path, rng: Random, outcomes: Outcomes) -> None:
        self.root, self.rng, self.outcomes = root, rng, outcomes
        root.mkdir(parents=True)
        with (root / "disk.raw").open("wb") as f:
            f.truncate(SIZE)
        self.image = _Image(root / "disk.raw")
        self.boot, self.countdown = 1, 0
        self.file: _File | None = None
        self.committed = True
        """The backup that the bitmap counts from exists: its job has ended well, and so flushed the disk."""

    def boot_id(self) -> bytes:
        return self.boot.to_bytes(16, "big")

    def moment(self) -> None:
        """The power may fail here."""
        self.countdown -= 1
        if self.countdown == 0:
            raise _Cut

    def sync(self, real: Callable[[int, str], None], fd: int, what: str) -> None:
        """A sync of the bitmap, with a moment before and one after."""
        if self.file:
            self.file.look()
        self.moment()
        real(fd, what)
        if self.file:
            self.file.synced()
        self.moment()

    # -- a session ------------------------------------------------------------------------------------------------

    def session(self) -> None:
        """Open, write, and end in one of three ways."""
        self.countdown = self.rng.randrange(1, 60) if self.rng.random() < 0.7 else 0
        store = BitmapStore(self.root / "state", "vm", "vda")
        store.lock()
        disk = open_disk(self.image.path)
        bitmap: Bitmap | None = None
        try:
            bitmap = self._opened(store, disk)
            self._write(disk, store, bitmap)
            if self.rng.random() < 0.5:
                self._flush(disk)
                bitmap.close(disk.fingerprint())
                self.boot += self.rng.randrange(2)
                self.outcomes.add("clean ends")
            else:
                self.outcomes.add("kills")
        except _Cut:
            self._fail()
        finally:
            self.countdown = 0
            if bitmap and bitmap.state is not State.CLOSED:
                bitmap.close(None)
            disk.close()
            store.unlock()

    def _fail(self) -> None:
        if self.file:
            self.file.cut(self.rng)
        self.image.cut(self.rng)
        self.boot += 1
        self.outcomes.add("power cuts")

    def _opened(self, store: BitmapStore, disk: FileDisk) -> Bitmap:
        found = None
        if store.path(NAME).exists() and not self.committed:
            store.remove(NAME)  # the runner takes a bitmap away whose backup was never finished
        if store.path(NAME).exists():
            self.file = _File(store.path(NAME))
            found = store.open(NAME, disk.fingerprint())
            self.file.look()
            if isinstance(found, Bitmap):
                self._believe(found)
                if self.rng.random() < 0.9:
                    return found
                found.close(None)
            else:
                self.outcomes.reason(found.value)
            self.file = None
            store.remove(NAME)
        self.committed = False
        made = store.create(NAME, SIZE, CLUSTER, disk.fingerprint())
        self.file = _File(store.path(NAME))
        self.image.base = dict(self.image.now)
        self._flush(disk)
        self.committed = True
        return made

    def _flush(self, disk: FileDisk) -> None:
        self.moment()
        disk.flush()
        self.image.versions = {}
        self.moment()

    def _believe(self, bitmap: Bitmap) -> None:
        for block in self.image.changed():
            if not bitmap.is_dirty(block * PAGE, PAGE):
                raise LostError(f"block {block} was changed, and the bitmap ({bitmap.found}) calls it clean")
        self.outcomes.add(f"bitmaps found {bitmap.found}")

    def _write(self, disk: FileDisk, store: BitmapStore, bitmap: Bitmap) -> None:
        tracked = TrackedDisk("vda", disk, store)
        tracked.bitmaps[NAME] = bitmap
        tracked.refresh()
        for _ in range(self.rng.randrange(30)):
            block = self.rng.choice((0, 1, 16, REGION // PAGE, 2 * REGION // PAGE)) + self.rng.randrange(64)
            tracked.before_write(block * PAGE, PAGE)
            self.moment()
            self.image.write(disk, block, self.rng.randbytes(16) * (PAGE // 16))
            if self.file:
                self.file.look()
            self.moment()
            if self.rng.random() < 0.1:
                self._flush(disk)
            if self.rng.random() < 0.1:
                bitmap.heartbeat(disk.beat())
        self.moment()


def campaign(root: Path, seed: str, sessions: int, outcomes: Outcomes) -> None:
    """So many sessions on one disk. Raises `LostError`."""
    rng = Random(seed)
    world = _World(root, rng, outcomes)
    real = durable.sync_file
    with (
        mock.patch.object(host, "boot_id", world.boot_id),
        mock.patch.object(host, "boot_began_ns", time.time_ns),
        mock.patch.object(durable, "sync_file", lambda fd, what: world.sync(real, fd, what)),
    ):
        for _ in range(sessions):
            world.session()

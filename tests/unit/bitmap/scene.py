"""A disk image with its bitmap store, in sessions that end well, are killed, or lose their host."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import pytest

from incbak.bitmap.file import Bitmap
from incbak.bitmap.format import REGION
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk
from incbak.fingerprint import Beat, Fingerprint
from incbak.reasons import Reason

CLUSTER = 65536
SIZE = 4 * REGION + 1024
NAME = "incbak-00000001-00000002"

_SESSION = """
import json, sys, time
from pathlib import Path
from incbak.bitmap.format import BUSY
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk

state, image, name, writes = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
disk = open_disk(image)
store = BitmapStore(state, "vm", "disk")
store.lock()
bitmap = store.open(name, disk.fingerprint())
for offset, length in writes:
    bitmap.mark(offset, length)
    bitmap.heartbeat(disk.beat())
    bitmap.note_writes(time.time_ns() + 20_000_000 | BUSY)
    disk.write(b"new!" * (length // 4), offset)
    bitmap.note_writes(time.time_ns() & ~BUSY)
    print(json.dumps([offset, length]), flush=True)
disk.flush()
bitmap.close(disk.fingerprint())
"""


class Scene:
    """``image`` and the store of its bitmaps below ``state``; `boot` is the host's boot id for this and child
    processes.
    """

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state, self.image, self._boot = directory / "state", directory / "image", directory / "boot-id"
        with self.image.open("wb") as f:
            f.truncate(SIZE)
        self.reboot()
        monkeypatch.setenv("INCBAK_BOOT_ID_FILE", str(self._boot))
        self.store = BitmapStore(self.state, "vm", "disk")
        self.store.lock()
        self.store.note_image(self.image)

    @property
    def path(self) -> Path:
        """The bitmap's file."""
        return self.store.path(NAME)

    def reboot(self) -> None:
        """The host comes up again."""
        self._boot.write_text(f"{uuid.uuid4()}\n")

    def fingerprint(self) -> Fingerprint:
        """Of the image as it is now."""
        disk = open_disk(self.image, read_only=True, lock=False)
        try:
            return disk.fingerprint()
        finally:
            disk.close()

    def beat(self) -> Beat:
        """A sign of life of the image's owner."""
        clock, seen = time.time_ns(), self.image.stat()
        return Beat(clock, seen.st_mtime_ns, seen.st_ctime_ns)

    def create(self) -> Bitmap:
        """A new bitmap."""
        return self.store.create(NAME, SIZE, CLUSTER, self.fingerprint())

    def clean(self, *marks: tuple[int, int]) -> None:
        """A first session that writes ``marks`` and ends well."""
        bitmap = self.create()
        self.write(bitmap, *marks)
        bitmap.close(self.fingerprint())

    def write(self, bitmap: Bitmap, *writes: tuple[int, int]) -> None:
        """Mark, then write, as a tracker does."""
        with self.image.open("r+b") as f:
            for offset, length in writes:
                bitmap.mark(offset, length)
                f.seek(offset)
                f.write(b"old!" * (length // 4))
        bitmap.heartbeat(self.beat())

    def session(self, writes: Sequence[tuple[int, int]], crash_at: str) -> list[tuple[int, int]]:
        """Another process opens, writes, and is killed at a crash point (or ends well); returns what it wrote."""
        self.store.unlock()
        command = [sys.executable, "-c", _SESSION, str(self.state), str(self.image), NAME, json.dumps(list(writes))]
        env = {**os.environ, "INCBAK_CRASH_AT": crash_at}
        child = subprocess.run(command, env=env, stdout=subprocess.PIPE, timeout=60, check=False)
        assert child.returncode == (-signal.SIGKILL if crash_at else 0)
        self.store.lock()
        return [tuple(json.loads(line)) for line in child.stdout.splitlines()]

    def open(self) -> Bitmap | Reason:
        """What the next owner finds."""
        return self.store.open(NAME, self.fingerprint())

    def opened(self) -> Bitmap:
        """The same, where it must be a bitmap."""
        found = self.open()
        assert isinstance(found, Bitmap), found
        return found

    def poke(self, offset: int, value: bytes) -> None:
        """Change the bitmap's file behind its back."""
        with self.path.open("r+b") as f:
            f.seek(offset)
            f.write(value)


def dirty(bitmap: Bitmap) -> set[int]:
    """The marked clusters."""
    return {c for first, count in bitmap.runs().tolist() for c in range(first, first + count)}


def clusters(*ranges: tuple[int, int]) -> set[int]:
    """The clusters that ranges touch."""
    return {c for o, n in ranges for c in range(o // CLUSTER, (o + n - 1) // CLUSTER + 1)}


def regions(*numbers: int) -> set[int]:
    """All clusters of regions."""
    per_region = REGION // CLUSTER
    last = -(-SIZE // CLUSTER)
    return {c for r in numbers for c in range(r * per_region, min((r + 1) * per_region, last))}

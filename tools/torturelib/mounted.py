"""A real file system on a disk that remembers: mounted while a story happens on it, and mounted again as a cut left it.

The kernel's file system is on a loop device, that on a FUSE file (``nbdfuse``), and that on the `recorder`; so the log
has what the kernel wrote, in which order, and where it waited for a flush. A disk promises no more than that: at a cut,
of what was written since the last flush each page of 4 KiB holds any of the versions that it has had. (Where only 512
bytes are atomic, XFS itself does not always mount again.)

Mounts are made in a mount namespace of this process (`private_mounts`), so that they go when it does.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from torturelib.recorder import FLUSH, HEAD, WRITE

PAGE = 4096
_CLONE_NEWNS = 0x00020000
_PATIENCE = 30.0


class MountError(Exception):
    """The file system has not recovered."""


@dataclass(frozen=True)
class Kind:
    """A file system: how it is made and mounted, and the least size in bytes that it takes."""

    name: str
    make: tuple[str, ...]
    size: int
    options: tuple[str, ...] = ("defaults",)


KINDS = (
    Kind(
        "ext4",
        ("mkfs.ext4", "-q", "-F"),
        256 << 20,
        ("defaults", "noauto_da_alloc", "noauto_da_alloc,data=writeback", "data=journal"),
    ),
    Kind("xfs", ("mkfs.xfs", "-q", "-f"), 320 << 20),
    Kind("btrfs", ("mkfs.btrfs", "-q", "-f"), 256 << 20),
)


def available() -> list[Kind]:
    """The kinds that can be made here; none without root, FUSE and loop devices."""
    programs = ("setpriv", "nbdfuse", "fusermount3", "mount", "umount")
    if os.geteuid() or not all(map(shutil.which, programs)) or not Path("/dev/loop-control").exists():
        return []
    return [kind for kind in KINDS if shutil.which(kind.make[0])]


def private_mounts() -> None:
    """What this process and its children mount from now on is theirs alone."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "unshare")
    _run("mount", "--make-rprivate", "/")


def _run(*argv: str | Path) -> str:
    done = subprocess.run(
        list(map(str, argv)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, argv))} exited {done.returncode}: {done.stdout.strip()}")
    return done.stdout.strip()


@contextmanager
def recording(root: Path, kind: Kind, options: str) -> Iterator[Path]:
    """A new file system below ``root``, mounted at what is yielded; its log is ``root/log``."""
    image = root / "device"
    image.touch()
    command = [sys.executable, "-m", "torturelib.recorder", str(root), str(kind.size)]
    with ExitStack() as stack:
        recorder = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        assert recorder.stdout
        if recorder.stdout.readline() != b"ready\n":
            raise RuntimeError("the recorder has not started")
        stack.enter_context(_fuse(image, root / "sock", kind.size))
        _run(*kind.make, image)
        yield stack.enter_context(mount(image, kind, options, root / "mounted"))


@contextmanager
def _fuse(image: Path, sock: Path, size: int) -> Iterator[None]:
    """The disk behind ``sock`` as the file ``image``."""
    server = ["nbdfuse", str(image), f"nbd+unix:///?socket={sock}"]
    process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *server])
    try:
        end = time.monotonic() + _PATIENCE
        while image.stat().st_size != size:
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("nbdfuse has not mounted the disk")
            time.sleep(0.01)
        yield
    finally:
        _unmount("fusermount3", "-u", image)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def mount(image: Path, kind: Kind, options: str, place: Path) -> Iterator[Path]:
    """``image`` at ``place``; after a cut, the file system recovers by itself."""
    place.mkdir(exist_ok=True)
    try:
        _run("mount", "-t", kind.name, "-o", f"loop,{options}", image, place)
    except RuntimeError as e:
        raise MountError(str(e)) from e
    try:
        yield place
    finally:
        _unmount("umount", place)


def _unmount(*command: str | Path) -> None:
    """Whoever still has files open there is waited for, then left alone; an error would hide why it is so."""
    end = time.monotonic() + 5
    while subprocess.run(command, capture_output=True, check=False).returncode:
        if time.monotonic() > end:
            subprocess.run([*command[:-1], "-z" if command[0] == "fusermount3" else "-l", command[-1]], check=False)
            return
        time.sleep(0.1)


class Log:
    """What was written and flushed, in order."""

    def __init__(self, path: Path) -> None:
        self._data = path.read_bytes()
        self._ends: list[int] = []
        position = 0
        while position < len(self._data):
            _, _, length = HEAD.unpack_from(self._data, position)
            position += HEAD.size + length
            self._ends.append(position)

    def __len__(self) -> int:
        return len(self._ends)

    def position(self, size: int) -> int:
        """How many records there were when the log had ``size`` bytes."""
        return bisect_right(self._ends, size)

    def record(self, number: int) -> tuple[bytes, int, memoryview]:
        """Kind, offset and data."""
        start = self._ends[number - 1] if number else 0
        kind, offset, length = HEAD.unpack_from(self._data, start)
        return kind, offset, memoryview(self._data)[start + HEAD.size : start + HEAD.size + length]


class Disk:
    """What the disk holds for certain behind some number of records, and what is open there."""

    def __init__(self, log: Log, path: Path, size: int) -> None:
        self._log, self._path = log, path
        self._number = 0
        self._open: list[tuple[int, memoryview]] = []
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._fd, size)

    def forward(self, number: int) -> None:
        """Let records up to ``number`` happen."""
        for each in range(self._number, number):
            kind, offset, data = self._log.record(each)
            if kind == WRITE:
                self._open.append((offset, data))
            elif kind == FLUSH:
                for offset, data in self._open:
                    os.pwrite(self._fd, data, offset)
                self._open.clear()
        self._number = number

    def cut(self, target: Path, rng: Random) -> int:
        """The disk after a cut here; the number of pieces that were not flushed."""
        _run("cp", "--sparse=auto", self._path, target)
        pieces = [piece for offset, data in self._open for piece in _pieces(offset, data)]
        versions = Counter(number for number, _, _ in pieces)
        bias = rng.choice((0.0, 1.0, rng.random(), rng.random()))
        keep = {n: count if rng.random() < bias else rng.randrange(count + 1) for n, count in versions.items()}
        if not rng.randrange(8):
            keep = dict.fromkeys(versions, 0)
        seen: Counter[int] = Counter()
        fd = os.open(target, os.O_WRONLY)
        try:
            for number, offset, data in pieces:
                seen[number] += 1
                if seen[number] <= keep[number]:
                    os.pwrite(fd, data, offset)
        finally:
            os.close(fd)
        return len(versions)

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def _pieces(offset: int, data: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """(number of the page, offset, bytes) of each piece of a write."""
    end = offset + len(data)
    edges = [offset, *range(offset // PAGE * PAGE + PAGE, end, PAGE), end]
    for a, b in pairwise(edges):
        yield a // PAGE, a, data[a - offset : b - offset]

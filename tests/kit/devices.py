"""Block devices to be had on any Linux host, for root: loop devices, and partitions of them."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.kit.need import missing, need, need_root

SECTOR = 512


@contextmanager
def loop_device(backing: Path, *options: str) -> Iterator[Path]:
    """A loop device of a file or another device."""
    need_root()
    need("losetup")
    ran = subprocess.run(
        ["losetup", *options, "--find", "--show", backing], capture_output=True, text=True, check=False
    )
    if ran.returncode:
        missing("losetup", "no loop device can be had here")
    path = Path(ran.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", path], check=True)


@contextmanager
def partition(whole: Path, number: int, start: int, size: int, node: Path) -> Iterator[Path]:
    """A partition from byte ``start``, which only the kernel knows, at a ``node`` that no udev makes."""
    need("addpart", "delpart")
    command = ["addpart", whole, str(number), str(start // SECTOR), str(size // SECTOR)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        missing("addpart", "no partition can be had here")
    try:
        found = Path(f"/sys/class/block/{whole.name}p{number}/dev").read_text(encoding="ascii")
        os.mknod(node, 0o600 | 0o060000, os.makedev(*map(int, found.split(":"))))
        yield node
    finally:
        subprocess.run(["delpart", whole, str(number)], check=True)
        node.unlink(missing_ok=True)


def written(path: Path, offset: int = 0, length: int = 4096) -> None:
    """Bytes other than zero there, and on the device when this returns."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, os.urandom(length), offset)
        os.fsync(fd)
    finally:
        os.close(fd)

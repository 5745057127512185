"""A tree of block devices as sysfs shows them, for kinds that the kernel of the tests may not have."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from incbak.disk import stacking
from incbak.disk.stacking import Key


class Sysfs:
    """Stands in for ``/sys`` of `incbak.disk.stacking`. Device numbers of the caller's choice, sizes in sectors."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._root = root
        (root / "dev" / "block").mkdir(parents=True)
        monkeypatch.setattr(stacking, "_SYS", root)
        self._next = 0

    def device(self, name: str, rdev: int = 0, size: int = 1 << 20) -> Key:
        """A whole device."""
        return self._node(self._root / "devices" / name, rdev, size)

    def partition(self, disk: str, name: str, start: int, size: int) -> Key:
        """A partition of a device."""
        place = self._root / "devices" / disk / name
        key = self._node(place, 0, size)
        (place / "partition").write_text("1\n")
        (place / "start").write_text(f"{start}\n")
        return key

    def built(self, name: str, *, on: str) -> None:
        """``name`` is built on another device, or on a partition (``sda/sda1``)."""
        upper, lower = (self._root / "devices" / each for each in (name, on))
        (lower / "holders" / upper.name).symlink_to(upper)
        (upper / "slaves" / lower.name).symlink_to(lower)

    def _node(self, place: Path, rdev: int, size: int) -> Key:
        self._next += 1
        rdev = rdev or os.makedev(240, self._next)
        for part in ("holders", "slaves"):
            (place / part).mkdir(parents=True)
        number = f"{os.major(rdev)}:{os.minor(rdev)}"
        (place / "dev").write_text(f"{number}\n")
        (place / "size").write_text(f"{size}\n")
        (self._root / "dev" / "block" / number).symlink_to(place)
        return Key(rdev=rdev)

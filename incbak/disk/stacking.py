"""Which block devices and files hold bytes of an image: the rule by which its users are looked for, in both directions.

The walk starts at the image and goes through sysfs and the kernel's loop devices, with a bound on both:

- **upwards**: the image's partitions, the loop devices that are backed by it, and the devices that are built on it
  (device-mapper, md, bcache: ``holders``); and what stands on those in turn. All of them are the image;
- **downwards**: the disk of a partition, the file or device behind a loop device, the devices below a device-mapper or
  md device (``slaves``); and what those stand on in turn. Who writes there directly, writes the image;
- **sideways**: from what is below up again, through partitions and loop devices whose range of bytes overlaps that of
  the image (two loop devices of one file; a disk's other partition does not overlap), and through ``holders`` of those
  that lie within the image as a whole.

What is *not* the image: the other holders of a device below it. A logical volume is not its neighbours on the same
physical volume, and where on it each lies is nowhere in sysfs; so below device-mapper and md only direct users count.

`Stack.image` is what is the image, and all of its users count; `Stack.beside` is what lies below and beside it: there
readers do not matter, since nothing that they keep in memory is written back.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TypeVar

DEPTH, MOST = 16, 4096
"""Levels of devices that are walked, and devices in all."""
_SYS = Path("/sys")
_SECTOR = 512  # in sysfs, whatever the device has
_LOOP_GET_STATUS64, _LOOP_INFO = 0x4C05, struct.Struct("=QQQQQIIII")
_LOOP_READ_ONLY = 1

P = TypeVar("P")
Range = tuple[int, int]
"""First byte and end of the part of a device or file that belongs to the image."""
_WHOLE: Range = (0, 1 << 63)


@dataclass(frozen=True)
class Key:
    """A file by the device that it is on and its inode, or (``rdev``) a block device by its number."""

    device: int = 0
    inode: int = 0
    rdev: int = 0


def key_of(found: os.stat_result) -> Key:
    """Return the identity of what was looked at."""
    return Key(rdev=found.st_rdev) if stat.S_ISBLK(found.st_mode) else Key(found.st_dev, found.st_ino)


@dataclass(frozen=True)
class Loop:
    """A loop device, and the ``part`` of ``backing`` that it shows."""

    name: str
    key: Key
    backing: Key
    part: Range
    read_only: bool


@dataclass(frozen=True)
class Stack:
    """What holds bytes of an image. ``complete``: the walk came to its end within its bounds."""

    image: frozenset[Key]
    beside: frozenset[Key]
    loops: tuple[Loop, ...]
    complete: bool

    @cached_property
    def keys(self) -> frozenset[Key]:
        """All of them."""
        return self.image | self.beside


def stack_of(key: Key) -> Stack:
    """Walk from the image ``key`` in all directions; see the module."""
    walk = _Walk(list(_loops()))
    image = walk.up({key: _WHOLE})
    below = walk.down(key)
    known = {k: part for k, part in below.items() if part}
    beside = walk.up(known, but=frozenset(image))
    others = frozenset(below.keys() | beside.keys()) - image.keys()
    loops = tuple(loop for loop in walk.met if loop.key in image or not loop.read_only)
    return Stack(frozenset(image), others, loops, walk.complete)


def share_bytes(disks: Mapping[str, Collection[Key]]) -> tuple[str, str] | None:
    """Return the names of two disks of which one has bytes of the other in its images, if there are any.

    What is written to one of them changes the other, and a bitmap of the other does not tell.
    """
    names = sorted(disks)
    for number, name in enumerate(names[:-1]):
        keys = {key for image in disks[name] for key in stack_of(image).keys}
        for other in names[number + 1 :]:
            if not keys.isdisjoint(disks[other]):
                return name, other
    return None


@dataclass
class _Walk:
    """One walk. ``met``: the loop devices that were found on the way up."""

    loops: list[Loop]
    met: list[Loop] = field(default_factory=list)
    complete: bool = True

    def up(self, start: dict[Key, Range], but: frozenset[Key] = frozenset()) -> dict[Key, Range]:
        """Return ``start``, with the image's part of each, and what stands on these parts, without ``but``."""
        found = self._spread(start, but, self._above)
        self.met += [loop for loop in self.loops if loop.key in found and loop.key not in start]
        return found

    def _spread(
        self, start: dict[Key, P], but: Collection[Key], step: Callable[[Key, P], Iterable[tuple[Key, P]]]
    ) -> dict[Key, P]:
        """Return ``start`` and all that ``step`` leads to from there, without ``but``, within the bounds."""
        found, level = dict(start), start
        for _ in range(DEPTH):
            reached = (each for key, part in level.items() for each in step(key, part))
            level = {key: part for key, part in reached if key not in found and key not in but}
            found.update(level)
            if not level:
                return found
            if len(found) > MOST:
                break
        self.complete = False
        return found

    def _above(self, key: Key, part: Range) -> Iterator[tuple[Key, Range]]:
        for loop in self.loops:
            if loop.backing == key and (shown := _within(part, loop.part)):
                yield loop.key, shown
        if not key.rdev:
            return
        for place in _at(key).glob("*/partition"):
            inner, at = _number(place.with_name("dev")), _extent(place.parent)
            if inner and at and (shown := _within(part, at)):
                yield inner, shown
        if _covers(part, key):
            for place in _at(key).glob("holders/*/dev"):
                if holder := _number(place):
                    yield holder, _WHOLE

    def down(self, key: Key) -> dict[Key, Range | None]:
        """Return what the image stands on, each with the image's part of it, as far as that can be known."""
        start: dict[Key, Range | None] = {key: _WHOLE}
        found = self._spread(start, (), self._below)
        return {below: part for below, part in found.items() if below != key}

    def _below(self, key: Key, part: Range | None) -> Iterator[tuple[Key, Range | None]]:
        for loop in self.loops:
            if loop.key == key:
                yield loop.backing, _shifted(part, loop.part)
        if not key.rdev:
            return
        place = _at(key)
        if (place / "partition").exists() and (disk := _number(place.resolve().parent / "dev")):
            yield disk, _shifted(part, at) if (at := _extent(place)) else None
        for slave in place.glob("slaves/*/dev"):
            if lower := _number(slave):
                yield lower, None


def _within(part: Range, shown: Range) -> Range | None:
    """Return ``part`` as seen through a device that shows ``shown`` of what it stands on; none if they do not meet."""
    start, end = max(part[0], shown[0]), min(part[1], shown[1])
    return (start - shown[0], end - shown[0]) if start < end else None


def _shifted(part: Range | None, shown: Range) -> Range | None:
    """The other way: return the ``part`` of a device in the bytes of what it stands on, of which it shows ``shown``."""
    if part is None:
        return None
    start, end = shown[0] + part[0], min(shown[0] + part[1], shown[1])
    return (start, end) if start < end else None


def _covers(part: Range, key: Key) -> bool:
    """Whether a device belongs to the image as a whole."""
    size = _value(_at(key) / "size")
    return part == _WHOLE or (part[0] == 0 and size is not None and part[1] >= size * _SECTOR)


# -- sysfs and loop devices --------------------------------------------------------------------------------------------


def _at(key: Key) -> Path:
    return _SYS / "dev" / "block" / f"{os.major(key.rdev)}:{os.minor(key.rdev)}"


def _number(place: Path) -> Key | None:
    with suppress(OSError, ValueError):
        major, _, minor = place.read_text().strip().partition(":")
        return Key(rdev=os.makedev(int(major), int(minor)))
    return None


def _extent(partition: Path) -> Range | None:
    start, size = _value(partition / "start"), _value(partition / "size")
    return None if start is None or size is None else (start * _SECTOR, (start + size) * _SECTOR)


def _value(place: Path) -> int | None:
    with suppress(OSError, ValueError):
        return int(place.read_text())
    return None


def _loops() -> Iterator[Loop]:
    """Every loop device that is backed by something, as the kernel has it: names of backing files may be outdated."""
    for place in _SYS.glob("block/loop*/loop"):
        name = place.parent.name
        with suppress(OSError):
            fd = os.open(f"/dev/{name}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                info = bytearray(232)
                fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
                device, inode, rdev, offset, limit, *_, flags = _LOOP_INFO.unpack_from(info)
                backing = Key(rdev=rdev) if rdev and rdev != device else Key(device, inode)
                part = (offset, offset + limit if limit else _WHOLE[1])
                yield Loop(name, Key(rdev=os.fstat(fd).st_rdev), backing, part, bool(flags & _LOOP_READ_ONLY))
            finally:
                os.close(fd)

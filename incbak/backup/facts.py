"""Which files and block devices hold bytes of a disk, what of them is compared, and what is believed.

The rule: everything below a disk's node in the engine's graph holds bytes of it, through whatever child: a backing
file, a data file, an extent, a member of a quorum. Only the targets and logs of filters do not. There are three parts:

- **image**: the file that the disk's own format stands on. What is written there without the format's knowledge is
  found by the format, or by the bitmap's owner; it is not compared between two runs;
- **data**: other files that the disk's own node writes to, as the data file of a qcow2 image. A bitmap that the format
  *stores* says nothing of who writes there while the image is closed. So it is believed only where all of these files
  are what they were when its base was made of the image that was off: nobody has written at all since. A bitmap in an
  engine's memory was never without its engine: a running engine gets only such bitmaps there, and they are believed as
  long as it has the same files;
- **below**: backing files and what they stand on. Nobody writes there, and no bitmap would mark it, so they must be
  what they were.

Of a file its size, inode, ``mtime`` and ``ctime`` are compared. Managers of VMs that change the owner of backing files
at each start move the latter; and a ctime that moved proves nothing, whatever else moved
(`incbak.bitmap.continuity`). So it is left out only where the owner says so (``--ignore-ctime``), and below a running
engine during a run. Of a block device, what `incbak.device` tells is compared. Of anything else nothing is known: an
NBD export, a name that this host cannot look at, a file that a running engine does not have open under the name that
it gives, a file whose times show nothing (`incbak.times`). What is not known is never believed, unless its owner says
that the name never changes.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from incbak import device, times
from incbak.disk.stacking import Key, key_of
from incbak.engine.base import Description

Facts = list[list[Any]]
"""One entry for each file or device, from the top: its name, and what is known; ``None``: it is not known."""
Looked = dict[str, list[tuple["Leaf", list[Any]]]]
"""Of each disk, by its name."""
_SETTLE_SECONDS = 3.0
_THROUGH_BACKING = frozenset({"mirror_top", "commit_top"})
_NO_DATA = frozenset({"target", "log"})
_PROTOCOL = re.compile(r"[^/]*:")  # as QEMU tells a protocol from a path


class Part(StrEnum):
    """What a file is to the disk: see the module."""

    IMAGE = "image"
    DATA = "data"
    BELOW = "below"


@dataclass(frozen=True)
class Leaf:
    """A file or device at the end of the graph. ``read_only``: the engine does not write there now."""

    name: str
    part: Part
    read_only: bool


def leaves(description: Description, node: str) -> list[Leaf]:
    """Return everything that holds bytes of the disk of ``node``, from the top."""
    blocks: dict[str, Any] = {b["node"]: b for b in description.config.get("blocks", ())}
    if node not in blocks:
        return []
    found: list[Leaf] = []
    seen, to_do = {(node, Part.IMAGE)}, [(node, Part.IMAGE)]
    while to_do:
        name, part = to_do.pop()
        block = blocks.get(name)
        if block is None:  # a node of our own, which a dead run has left in the middle: another one next time
            found.append(Leaf(name, part, read_only=True))
            continue
        below = list(_below(block, part))
        if not below:
            found.append(Leaf(str(block.get("file", "")), part, bool(block.get("read_only", True))))
        to_do += [each for each in reversed(below) if each not in seen]
        seen.update(below)
    return found


def _below(block: dict[str, Any], part: Part) -> Iterator[tuple[str, Part]]:
    driver = block.get("driver", "")
    for edge, child in block.get("children", {}).items():
        if edge in _NO_DATA:
            continue
        if edge == "backing" and driver not in _THROUGH_BACKING:
            yield child, Part.BELOW
        elif edge not in ("file", "backing") and part is Part.IMAGE:
            yield child, Part.DATA
        else:
            yield child, part


class Peer:
    """The process of an engine. ``open``: what it has open; empty for a process that is not seen, or not the engine."""

    def __init__(self, pid: int | None, names: Collection[str]) -> None:
        self._pid = pid
        self.open: frozenset[Key] = frozenset(_open_files(pid)) if pid else frozenset()
        if not any(key_of(found) in self.open for n in names if (found := self._stat(n))):
            self.open = frozenset()

    def look(self, name: str) -> tuple[Path, os.stat_result] | None:
        """Return what the engine has under that name, as far as that is known."""
        found = self._stat(name)
        if found is None or (key_of(found) not in self.open if self.open else not name.startswith("/")):
            return None
        return self._path(name), found

    def _path(self, name: str) -> Path:
        return Path(name) if name.startswith("/") else Path(f"/proc/{self._pid}/cwd") / name

    def _stat(self, name: str) -> os.stat_result | None:
        if not name or (_PROTOCOL.match(name) and not name.startswith("/")):
            return None
        with suppress(OSError, ValueError):
            return os.stat(self._path(name))
        return None


def _open_files(pid: int) -> Iterator[Key]:
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                yield key_of(fd.stat())


def facts_of(leaf: Leaf, peer: Peer) -> list[Any]:
    """Return what is known of a leaf, ``ctime`` last. Facts with a ``None`` among them do not prove anything."""
    looked = peer.look(leaf.name)
    if looked is None:
        return [leaf.name, None]
    path, found = looked
    if stat.S_ISBLK(found.st_mode):
        told = ""
        with suppress(OSError):
            told = device.settled(path)
        return [leaf.name, told or None]
    if not stat.S_ISREG(found.st_mode):
        return [leaf.name, None]
    size = found.st_size if times.are_kept(path) else None
    return [leaf.name, size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns]


def without_ctime(facts: list[Any]) -> list[Any]:
    """Return what is known of each, apart from that."""
    return [list(each)[:4] if isinstance(each, list | tuple) else each for each in facts]


def settled(look: Callable[[], Looked]) -> Looked:
    """Return what is found once a later write to a file must show: its times cannot come again."""
    deadline = time.monotonic() + _SETTLE_SECONDS
    while True:
        found = look()
        changes = [t for each in found.values() for _, facts in each for t in facts[3:]]
        now = time.time_ns()
        if not any(device.may_come_again(t, now) for t in changes) or time.monotonic() > deadline:
            return found
        time.sleep(0.002)


def is_known(facts: Facts, trusted: Collection[str] = ()) -> bool:
    """Whether something is known of each; ``trusted``: the names that need not be."""
    return all(None not in each or each[0] in trusted for each in facts)


def are_same(then: list[Any], now: Facts, trusted: Collection[str] = ()) -> bool:
    """Whether nothing was changed, as far as it is known. ``then``: from a record, which may hold anything."""
    if len(then) != len(now):
        return False
    for before, each in zip(then, now, strict=True):
        if not isinstance(before, list | tuple) or not before or before[0] != each[0]:
            return False
        if list(before)[: len(each)] != each and None not in each and each[0] not in trusted:
            return False
    return True


def are_one(then: list[Any], now: Facts) -> bool:
    """Whether they are the same files and devices, whatever was written to them."""
    return [_identity_of(e) for e in then if isinstance(e, list | tuple)] == [_identity_of(e) for e in now]


def _identity_of(facts: Sequence[Any]) -> list[Any]:
    name, *known = facts or [None]
    if known and isinstance(known[0], str):
        return [name, known[0].partition(";")[0]]
    return [name, *known[1:2]]

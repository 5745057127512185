"""What a disk may hold after a power cut.

The harshest reading of POSIX: until a file is synced, each 4 KiB page of it holds what it held at the last sync or any
version written since, each independently, and its size is any size it has had since; until a directory is synced, each
creation, link, rename and removal in it has happened or not, independently. A sync of a file says nothing of its name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from random import Random

from torturelib.trace import Op

PAGE = 4096
ALL_UP_TO = 10
"""Up to so many independent choices at one cut, all of them are tried."""


@dataclass
class Inode:
    """A file: what is durable, and the versions since; or a directory (``is_dir``)."""

    is_dir: bool = False
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pages: dict[int, list[bytes]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data``; the pages it touches have one more version."""
        if len(self.data) < offset + len(data):
            self.data.extend(bytes(offset + len(data) - len(self.data)))
            self.sizes.append(len(self.data))
        self.data[offset : offset + len(data)] = data
        for page in range(offset // PAGE, (offset + len(data) - 1) // PAGE + 1):
            self.pages.setdefault(page, []).append(bytes(self.data[page * PAGE : (page + 1) * PAGE]))

    def truncate(self, size: int) -> None:
        """Cut or extend."""
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))
        self.sizes.append(size)

    def sync(self) -> None:
        """What is there is durable."""
        self.durable = bytes(self.data)
        self.pages.clear()
        self.sizes.clear()


@dataclass(frozen=True)
class Change:
    """One entry operation: names that go and names that come, with the directories that must be synced."""

    gone: tuple[str, ...]
    come: tuple[tuple[str, int], ...]


class Storage:
    """Takes the effects of a trace one by one; tells the possible states after a cut."""

    def __init__(self) -> None:
        self.inodes: dict[int, Inode] = {0: Inode(is_dir=True)}
        self.names: dict[str, int] = {".": 0}
        self.durable: dict[str, int] = {".": 0}
        self.pending: list[Change] = []

    def _new(self, path: str, *, is_dir: bool) -> None:
        number = len(self.inodes)
        self.inodes[number] = Inode(is_dir=is_dir)
        self._change((), ((path, number),))

    def _change(self, gone: tuple[str, ...], come: tuple[tuple[str, int], ...]) -> None:
        for name in gone:
            self.names.pop(name, None)
        self.names.update(come)
        self.pending.append(Change(gone, come))

    def take(self, op: Op) -> None:
        """Let one effect happen in memory, or become durable."""
        if op.kind in ("create", "mkdir"):
            self._new(op.path, is_dir=op.kind == "mkdir")
        elif op.kind == "write":
            self.inodes[self.names[op.path]].write(op.offset, op.data)
        elif op.kind == "truncate":
            self.inodes[self.names[op.path]].truncate(op.offset)
        elif op.kind == "sync":
            self.inodes[self.names[op.path]].sync()
        elif op.kind == "link":
            self._change((), ((op.other, self.names[op.path]),))
        elif op.kind == "rename":
            self._change((op.path,), ((op.other, self.names[op.path]),))
        elif op.kind in ("unlink", "rmdir"):
            self._change((op.path,), ())
        elif op.kind == "syncdir":
            self._sync_dir(op.path)

    def _sync_dir(self, path: str) -> None:
        rest = []
        for change in self.pending:
            names = [*change.gone, *(name for name, _ in change.come)]
            if any(str(PurePosixPath(name).parent) == path for name in names):
                _apply(self.durable, change)
            else:
                rest.append(change)
        self.pending = rest

    def choices(self) -> list[tuple[str, object, int]]:
        """What is open at this moment: (what, key, number of possibilities)."""
        found: list[tuple[str, object, int]] = [("entry", i, 2) for i in range(len(self.pending))]
        reachable = set(self.names.values()) | set(self.durable.values())
        for number in sorted(reachable):
            inode = self.inodes[number]
            found += [("page", (number, page), len(v) + 1) for page, v in sorted(inode.pages.items())]
            if inode.sizes:
                found.append(("size", number, len(inode.sizes) + 1))
        return found

    def schedules(self, rng: Random, sample: int) -> Iterator[tuple[int, ...]]:
        """All combinations of the open choices where there are few, else none, all, and ``sample`` random ones."""
        counts = [count for _, _, count in self.choices()]
        if len(counts) <= ALL_UP_TO and all(c == 2 for c in counts):
            yield from product(*(range(c) for c in counts))
            return
        yield tuple(0 for _ in counts)
        yield tuple(c - 1 for c in counts)
        for _ in range(sample):
            bias = rng.random()
            yield tuple(c - 1 if rng.random() < bias else rng.randrange(c) for c in counts)

    def state(self, schedule: tuple[int, ...]) -> dict[str, bytes | None]:
        """The files (and directories: ``None``) that are there after a cut with these choices."""
        names, files = dict(self.durable), {}
        picked = {(what, key): pick for (what, key, _), pick in zip(self.choices(), schedule, strict=True)}
        for i, change in enumerate(self.pending):
            if picked["entry", i]:
                _apply(names, change)
        for path, number in sorted(names.items()):
            parent = str(PurePosixPath(path).parent)
            if path != "." and (parent not in names or not self.inodes[names[parent]].is_dir):
                continue
            inode = self.inodes[number]
            files[path] = None if inode.is_dir else _content(inode, number, picked)
        return files


def _apply(names: dict[str, int], change: Change) -> None:
    for name in change.gone:
        names.pop(name, None)
    names.update(change.come)


def _content(inode: Inode, number: int, picked: dict[tuple[str, object], int]) -> bytes:
    sizes = [len(inode.durable), *inode.sizes]
    size = sizes[picked.get(("size", number), 0)]
    data = bytearray(inode.durable[:size].ljust(size, b"\0"))
    for page, versions in inode.pages.items():
        pick = picked["page", (number, page)]
        if pick and page * PAGE < size:
            data[page * PAGE : (page + 1) * PAGE] = versions[pick - 1]
    return bytes(data[:size])


def materialize(state: dict[str, bytes | None], root: Path) -> None:
    """Write a state below ``root``, which must not exist."""
    for path, content in state.items():
        target = root / path
        if content is None:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
        else:
            target.write_bytes(content)
            target.chmod(0o600)


def digest(state: dict[str, bytes | None]) -> bytes:
    """Tells states apart, so that none is examined twice."""
    h = hashlib.blake2b(digest_size=16)
    for path, content in sorted(state.items()):
        h.update(f"{path}\0{-1 if content is None else len(content)}\0".encode())
        h.update(content or b"")
    return h.digest()


Examine = Callable[[dict[str, bytes | None], int], None]


def cuts(ops: list[Op], epochs: list[int], rng: Random, sample: int, examine: Examine) -> tuple[int, int]:
    """Examine every different state after a cut behind each effect; (schedules, different states).

    ``epochs`` are the positions in ``ops`` behind which more is promised: the same state is examined again there.
    """
    storage, seen, schedules = Storage(), set(), 0
    for position in range(len(ops) + 1):
        if position:
            storage.take(ops[position - 1])
        for schedule in storage.schedules(rng, sample):
            schedules += 1
            state = storage.state(schedule)
            key = digest(state), sum(position >= e for e in epochs)
            if key not in seen:
                seen.add(key)
                examine(state, position)
    return schedules, len(seen)

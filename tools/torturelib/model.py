"""What a disk must hold: the writes that were issued, in order, and the state after any number of them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

BLOCK = 4096
State = dict[int, bytes]
"""Content by block number; a block that is not there is zero."""


@dataclass(frozen=True)
class Write:
    """One guest request; ``data`` of ``None`` means zeroes."""

    offset: int
    length: int
    data: bytes | None
    unmap: bool = False


@dataclass
class Model:
    """``base`` plus ``writes``; the first ``acknowledged`` of them were answered."""

    size: int
    base: State = field(default_factory=dict)
    writes: list[Write] = field(default_factory=list)
    acknowledged: int = 0

    def __post_init__(self) -> None:
        self._known = 0, self.base  # a count that was asked for before, and the state after it

    def state(self, count: int) -> State:
        """The disk after the first ``count`` writes."""
        since, known = self._known if self._known[0] <= count else (0, self.base)
        state = dict(known)
        for write in self.writes[since:count]:
            apply(state, write)
        self._known = count, state
        return dict(state)

    def settle(self, truth: State) -> str | None:
        """Take ``truth``, read from the image, as the new base, if it can be explained; else say what cannot.

        All acknowledged writes must be there. The one in flight may have been written in part, block by block.
        """
        expected = self.state(self.acknowledged)
        touched = {b for w in self.writes[self.acknowledged :] for b in blocks_of(w)}
        for block in expected.keys() | truth.keys():
            if block not in touched and expected.get(block) != truth.get(block):
                return f"block {block} (offset {block * BLOCK}) of the image lost an acknowledged write"
        self.base, self.writes, self.acknowledged = truth, [], 0
        self._known = 0, truth
        return None


def blocks_of(write: Write) -> range:
    return range(write.offset // BLOCK, (write.offset + write.length - 1) // BLOCK + 1)


def apply(state: State, write: Write) -> None:
    """Do ``write`` on ``state``."""
    position = 0
    for block in blocks_of(write):
        start = max(write.offset - block * BLOCK, 0)
        end = min(write.offset + write.length - block * BLOCK, BLOCK)
        piece = bytes(end - start) if write.data is None else write.data[position : position + end - start]
        position += end - start
        old = state.get(block, bytes(BLOCK))
        new = old[:start] + piece + old[end:]
        if any(new):
            state[block] = new
        else:
            state.pop(block, None)


def random_write(rng: Random, size: int, number: int) -> Write:
    """Mostly small writes on a few hot places in every region, of any alignment; some zeroes and trims."""
    spot = rng.choice((0, size // 3, size // 2, size - 600_000)) + rng.randrange(512) * 1024
    offset = min(spot + rng.choice((0, 0, 512, 37)), size - 1)
    length = min(rng.choice((512, 4096, 4096, 65536, 70_001, 200_000)), size - offset)
    if rng.random() < 0.15:
        return Write(offset, length, None, unmap=rng.random() < 0.5)
    stamp = number.to_bytes(8, "little") + rng.randbytes(24)
    return Write(offset, length, (stamp * (length // 32 + 1))[:length])


def read_state(path: Path) -> State:
    """The non-zero blocks of a file; holes are skipped."""
    state: State = {}
    fd = os.open(path, os.O_RDONLY)
    try:
        size, position = os.fstat(fd).st_size, 0
        while position < size:
            try:
                begin = os.lseek(fd, position, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(fd, begin, os.SEEK_HOLE)
            for offset in range(begin // BLOCK * BLOCK, end, BLOCK):
                data = os.pread(fd, BLOCK, offset).ljust(BLOCK, b"\0")
                if any(data):
                    state[offset // BLOCK] = data
            position = end
    finally:
        os.close(fd)
    return state


def difference(expected: State, found: State) -> str | None:
    """The first block that differs, in words."""
    wrong = sorted(b for b in expected.keys() | found.keys() if expected.get(b) != found.get(b))
    if not wrong:
        return None
    return f"{len(wrong)} blocks differ, the first at offset {wrong[0] * BLOCK}"

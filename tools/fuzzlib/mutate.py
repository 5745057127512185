"""The mutator: bytes changed at random, and values that programs get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

EDGES = sorted(
    {0, 1, 2, 3, 7, 255, 256, 511, 512, 513, 4095, 4096, 4097, 10**18}
    | {(1 << n) + d for n in (15, 16, 20, 24, 25, 31, 32, 40, 47, 56, 60, 63, 64) for d in (-1, 0, 1)}
)
"""Numbers at which something changes."""
LIMIT = 1 << 18
"""No mutation makes an input longer than this."""
STRINGS = (
    "", ".", "..", "../x", "/etc/passwd", "a/b", "a\0b", "\x1b[31m", "%2e%2e%2f", "x" * 129, "x" * 5000, "\u202e", "é",
    "\ud800", "nan", "-1", "'", '"', "\\", "\n", "vda", "latest",
)  # fmt: skip


def number(rng: Random, bits: int = 64) -> int:
    """An integer that fits into ``bits`` unsigned: an edge, near one, or any."""
    top = (1 << bits) - 1
    choice = rng.random()
    if choice < 0.6:
        return rng.choice(EDGES) & top
    if choice < 0.8:
        return rng.getrandbits(rng.randint(1, bits))
    return rng.choice((top, top - 1, top >> 1, (top >> 1) + 1))


def text(rng: Random) -> str:
    """A string that somebody may have forgotten."""
    return rng.choice(STRINGS) if rng.random() < 0.8 else "".join(chr(rng.randrange(0xD7FF)) for _ in range(9))


def _flip(rng: Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at = rng.randrange(len(data))
        data[at] ^= 1 << rng.randrange(8)


def _set(rng: Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 2, 8))):
        data[rng.randrange(len(data))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _integer(rng: Random, data: bytearray) -> None:
    width = rng.choice((1, 2, 4, 8))
    if len(data) >= width:
        at = rng.randrange(len(data) - width + 1)
        if rng.random() < 0.5:
            at -= at % width
        order = rng.choice(("big", "little"))
        old = int.from_bytes(data[at : at + width], order)  # type: ignore[arg-type]
        new = number(rng, width * 8) if rng.random() < 0.7 else old + rng.randint(-3, 3)
        data[at : at + width] = (new % (1 << width * 8)).to_bytes(width, order)  # type: ignore[arg-type]


def _truncate(rng: Random, data: bytearray) -> None:
    del data[rng.randrange(len(data)) :]


def _cut(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    del data[at : at + rng.randint(1, max(1, len(data) // 4))]


def _double(rng: Random, data: bytearray) -> None:
    start = rng.randrange(len(data))
    piece = bytes(data[start : start + rng.randint(1, 4096)])
    at = rng.randrange(len(data) + 1)
    data[at:at] = piece * rng.choice((1, 1, 2, 16))


def _insert(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data) + 1)
    count = rng.choice((1, 2, 4, 8, 64, 4096))
    data[at:at] = rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count)))


def _fill(rng: Random, data: bytearray) -> None:
    at = rng.randrange(len(data))
    count = min(rng.choice((4, 16, 512, 4096)), len(data) - at)
    data[at : at + count] = rng.choice((bytes(count), b"\xff" * count, rng.randbytes(count)))


_CHANGES: Sequence[Callable[[Random, bytearray], None]] = (
    _flip, _flip, _set, _integer, _integer, _truncate, _cut, _double, _insert, _fill,
)  # fmt: skip


def mutated(rng: Random, data: bytes, other: bytes = b"") -> bytes:
    """``data`` with a few changes; ``other`` is a second sample, of which a part may be spliced in."""
    made = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        if other and rng.random() < 0.1:
            at = rng.randrange(len(other))
            made[rng.randrange(len(made) + 1) :] = other[at:]
        elif made:
            rng.choice(_CHANGES)(rng, made)
        else:
            made += rng.randbytes(rng.randint(0, 64))
    return bytes(made[:LIMIT]) if len(data) <= LIMIT else bytes(made)


def shuffled(rng: Random, pieces: list[bytes]) -> list[bytes]:
    """Whole messages left out, doubled, swapped."""
    made = list(pieces)
    for _ in range(rng.choice((0, 0, 1, 2))):
        if not made:
            break
        at, choice = rng.randrange(len(made)), rng.random()
        if choice < 0.4:
            del made[at]
        elif choice < 0.7:
            made[at:at] = [made[rng.randrange(len(made))]] * rng.choice((1, 1, 3, 70))
        else:
            to = rng.randrange(len(made))
            made[at], made[to] = made[to], made[at]
    return made

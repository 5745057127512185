"""Records that a guest writes and a test looks for: numbered, checksummed, their content known from the number.

This module runs in the test and in the guest, so it imports little. Record ``n`` of a stream goes to target
``n % targets`` and there to slot ``(n // targets) * 7919 % slots``. A writer syncs each record before it begins the
next; so a disk at one instant holds exactly the records up to some number, and perhaps the one after, on all targets
together.
"""

import struct
import zlib

SIZE = 4096
_HEAD = struct.Struct("<8sQQI")
_MAGIC = b"incbakrc"
_STEP = 7919


def make(stream, n):  # type: ignore[no-untyped-def]
    """The 4096 bytes of record ``n`` of ``stream``."""
    body = (b"%d:%d;" % (stream, n)) * (SIZE // 4)
    body = body[: SIZE - _HEAD.size]
    return _HEAD.pack(_MAGIC, stream, n, zlib.crc32(body, n & 0xFFFFFFFF)) + body


def number(stream, block):  # type: ignore[no-untyped-def]
    """Which record of ``stream`` the block holds; -1 for none; raises ValueError for a torn or spoilt one."""
    magic, found, n, _ = _HEAD.unpack_from(block)
    if magic != _MAGIC or found != stream:
        return -1
    if bytes(block) != make(stream, n):
        raise ValueError(f"record {n} of stream {stream} is spoilt")
    return n


def place(n, targets, slots):  # type: ignore[no-untyped-def]
    """``(target, slot)`` of record ``n``; ``slots`` must not be a multiple of 7919."""
    return n % targets, (n // targets) * _STEP % slots


def check(images, stream, slots, acknowledged):  # type: ignore[no-untyped-def]
    """The newest record in ``images`` (one list of slot blocks per target), or AssertionError saying what is wrong.

    All records up to the newest must be in place, except those overwritten by later ones; and the newest must be
    at least ``acknowledged`` (the last number the guest had reported when the instant was taken).
    """
    count = len(images)
    found = {}
    for target, blocks in enumerate(images):
        for slot, block in enumerate(blocks):
            n = number(stream, block)
            if n >= 0:
                assert place(n, count, slots) == (target, slot), f"record {n} is in slot {slot} of target {target}"
                found[target, slot] = n
    newest = max(found.values(), default=-1)
    assert newest >= acknowledged, f"record {acknowledged} was acknowledged before the instant, the newest is {newest}"
    for n in range(max(0, newest - count * slots + 1), newest):
        held = found.get(place(n, count, slots))
        assert held == n, f"record {n} is missing (its slot holds {held}; the newest is {newest})"
    return newest

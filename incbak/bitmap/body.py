"""The content of one bitmap file in memory, and how what is stored there reaches the file.

The rule: nothing here may raise SIGBUS. The process would die, and the guest with it. A store into a shared mapping
faults when the file system refuses it: it has to find a block and has none (copy-on-write, or a file that was copied
with holes), or it went read-only after an error of its own. So each store is a ``pwrite``: what is refused is an error
of that call, and the bitmap becomes invalid, as after any other failure to record. What is read is

- `MappedBody`, a mapping for reading, on ext2 to ext4 and tmpfs, where it shows what is written at once. Its pages are
  locked in memory, since one that the system drops, and cannot read again, would be a SIGBUS;
- `WrittenBody`, a copy in memory of this process: everywhere else, and where the limit of the process does not allow to
  lock a mapping (``RLIMIT_MEMLOCK``; root has none).

Both keep what the protocol builds on: after `Body.put` or `Body.set_bit` has returned, the page cache has the bytes,
so that they outlive this process; a sync of the file makes them durable. In memory a byte never has a bit that the
page cache lacks, since another thread may see it without a lock and issue its write. Both read the whole file by
``pread`` when they open it: a sector that cannot be read is an `OSError`.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
from blake3 import blake3

from incbak.bitmap import bits as kernels
from incbak.bitmap.bits import Bits
from incbak.bitmap.format import NOTE, NOTE_SIZE, TOUCHED, Slot, layout

_EXT, _TMPFS, _BTRFS = 0xEF53, 0x01021994, 0x9123683E
_SHOWS_WRITES = {_EXT, _TMPFS}
_GET_FLAGS, _SET_FLAGS, _NO_COPY_ON_WRITE = 0x80086601, 0x40086602, 0x00800000  # linux/fs.h
_CHUNK = 1 << 20
_LOCKED = 64 << 20
"""Bytes of a mapping that are locked in memory: the bitmap of a disk of 32 TiB."""
_libc = ctypes.CDLL(None, use_errno=True)


class Body:
    """The bytes of the file ``fd``. The arrays are for reading; the caller holds a lock around all that stores.

    ``array`` is all of it (uint8); its first 4096 bytes are the header as it was on open. ``bits`` and ``coarse`` are
    the parts that `format` tells. What stores raises `OSError`; then any part of it may be in the file.
    """

    kind = ""

    def __init__(self, fd: int, array: Bits, slot: Slot) -> None:
        self._fd = fd
        self._bits_at, self._coarse_at, _end = layout(slot)
        self.array = array
        self.bits = array[self._bits_at : self._bits_at + kernels.bytes_for(slot.clusters)]
        self.coarse = array[self._coarse_at : self._coarse_at + slot.regions]
        self._view = memoryview(self.bits)  # type: ignore[arg-type]

    def put(self, at: int, data: Bits) -> None:
        """Store ``data`` from byte ``at`` of the file on."""
        left, position = memoryview(data.tobytes()), at
        while left:
            written = os.pwrite(self._fd, left, position)
            left, position = left[written:], position + written
        self._show(at, data)

    def _show(self, at: int, data: Bits) -> None:
        """Let the arrays show ``data`` too; a mapping shows it already."""

    def note(self, word: int) -> None:
        """Store the owner's note, at once: no kill leaves half of it. Without a lock, and fast."""
        os.pwrite(self._fd, word.to_bytes(NOTE_SIZE, sys.byteorder), NOTE)

    def set_bit(self, at: int, mask: int) -> None:
        """Set the bits of ``mask`` in byte ``at`` of the bits."""
        byte = self._view[at] | mask
        os.pwrite(self._fd, bytes((byte,)), self._bits_at + at)
        self._show_bit(at, byte)

    def _show_bit(self, at: int, byte: int) -> None:
        """As `_show`, of one byte of the bits."""

    def set_range(self, first: int, last: int) -> None:
        """Set the bits ``first`` to ``last``, both included."""
        head, end = first >> 3, (last >> 3) + 1
        part = np.array(self.bits[head:end])
        kernels.set_range(part, first - head * 8, last - head * 8)
        self.put(self._bits_at + head, part)

    def put_bits(self, bits: Bits) -> None:
        """Store all bits."""
        self.put(self._bits_at, bits)

    def put_coarse(self, coarse: Bits) -> None:
        """Store the whole coarse map."""
        self.put(self._coarse_at, coarse)

    def touch(self, first: int, end: int) -> None:
        """Store that the regions from ``first`` on, before ``end``, are touched."""
        self.put(self._coarse_at + first, np.full(end - first, TOUCHED, dtype=np.uint8))


class MappedBody(Body):
    """A mapping of the file that is read, and locked. Raises `OSError` where that is not allowed."""

    kind = "mapped"

    def __init__(self, fd: int, path: Path, slot: Slot) -> None:
        size = layout(slot)[2]
        for at in range(0, size, _CHUNK):
            read_exactly(fd, at, min(_CHUNK, size - at))
        array = np.memmap(path, dtype=np.uint8, mode="r", shape=(size,))
        if _libc.mlock(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(size)):
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        super().__init__(fd, array, slot)


class WrittenBody(Body):
    """A copy in memory; each store is written to the file before it is to be seen here."""

    kind = "written through"

    def __init__(self, fd: int, path: Path, slot: Slot) -> None:
        size = layout(slot)[2]
        super().__init__(fd, np.empty(size, dtype=np.uint8), slot)
        for at in range(0, size, _CHUNK):
            length = min(_CHUNK, size - at)
            self.array[at : at + length] = np.frombuffer(read_exactly(fd, at, length), dtype=np.uint8)

    def _show(self, at: int, data: Bits) -> None:
        self.array[at : at + len(data)] = data

    def _show_bit(self, at: int, byte: int) -> None:
        self._view[at] = byte


def open_body(fd: int, path: Path, slot: Slot) -> Body:
    """Return the content of the file ``path``, open as ``fd``, with the header ``slot``. Raises `OSError`."""
    if layout(slot)[2] <= _LOCKED and shows_writes(fd):
        with suppress(OSError):  # a sector that cannot be read is found again below
            return MappedBody(fd, path, slot)
    return WrittenBody(fd, path, slot)


def digest_of(body: Bits) -> bytes:
    """Return the BLAKE3 digest of bits and coarse map with their padding, 32 bytes."""
    return blake3(memoryview(body)).digest()  # type: ignore[arg-type]


def shows_writes(fd: int) -> bool:
    """Return whether a mapping of a file is known to show at once what is written to it."""
    return filesystem_magic(fd) in _SHOWS_WRITES


def filesystem_magic(fd: int) -> int:
    """Return ``f_type`` of fstatfs(2). Raises `OSError`."""
    found = ctypes.create_string_buffer(512)
    if _libc.fstatfs(fd, found) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    kind: int = ctypes.c_long.from_buffer(found).value
    return kind & 0xFFFFFFFF


def keep_in_place(fd: int) -> None:
    """Ask btrfs to overwrite the blocks of a new, empty file in place; a failure or another file system is no error.

    A full file system then still takes the stores, unless a snapshot shares the blocks.
    """
    if filesystem_magic(fd) != _BTRFS:
        return
    with suppress(OSError):
        (flags,) = struct.unpack("L", fcntl.ioctl(fd, _GET_FLAGS, bytes(struct.calcsize("L"))))
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("L", flags | _NO_COPY_ON_WRITE))


def read_exactly(fd: int, at: int, length: int) -> bytes:
    """Return ``length`` bytes of the file from ``at`` on. Raises `OSError`, also where it has fewer."""
    data = os.pread(fd, length, at)
    if len(data) != length:
        raise OSError(f"the file ends within its first {at + length} bytes")
    return data

"""A disk that remembers the order in which it was written and flushed: an NBD server in a process of its own.

``python -m torturelib.recorder DIR SIZE`` serves ``DIR/sock`` until its standard input ends. What is written goes to
``DIR/disk`` and, before it is answered, to ``DIR/log``: records of `HEAD` and, for a write, the data. A flush is logged
when it comes, so every write that was answered before stands in front of it.
"""

from __future__ import annotations

import os
import struct
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from incbak.nbd.server import NbdServer

HEAD = struct.Struct("<cQQ")  # WRITE or FLUSH, offset, length
WRITE, FLUSH = b"W", b"F"


class Recorder:
    """The only export, and its device."""

    name = description = ""
    read_only, multi_conn = False, True

    def __init__(self, root: Path, size: int) -> None:
        self.size = size
        self._disk = os.open(root / "disk", os.O_RDWR | os.O_CREAT, 0o600)
        os.ftruncate(self._disk, size)
        self._log = os.open(root / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._lock = threading.Lock()

    def contexts(self) -> Sequence[str]:
        """None."""
        return ()

    def open(self) -> Recorder:
        """All connections share it."""
        return self

    def read_into(self, buf: memoryview, offset: int) -> None:
        """See `Device`."""
        os.preadv(self._disk, [buf], offset)

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        """See `Device`."""
        self.read_into(buf, offset)
        return True

    def may_block(self, offset: int, length: int) -> bool:
        """See `Device`."""
        return False

    def write(self, buf: memoryview | bytes, offset: int) -> None:
        """See `Device`."""
        with self._lock:
            os.pwrite(self._disk, buf, offset)
            self._append(WRITE, offset, buf)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """See `Device`."""
        self.write(bytes(length), offset)

    def trim(self, offset: int, length: int) -> None:
        """See `Device`: nothing happens, which is allowed."""

    def cache(self, offset: int, length: int) -> None:
        """See `Device`."""

    def flush(self) -> None:
        """See `Device`."""
        with self._lock:
            self._append(FLUSH, 0, b"")

    def status(self, offset: int, length: int, context: str, limit: int) -> Sequence[tuple[int, int]]:
        """See `Device`."""
        return [(length, 0)]

    def close(self) -> None:
        """See `Device`."""

    def _append(self, kind: bytes, offset: int, data: memoryview | bytes) -> None:
        os.writev(self._log, [HEAD.pack(kind, offset, len(data)), data])


def _main(root: Path, size: int) -> None:
    recorder = Recorder(root, size)
    server = NbdServer(lambda: {"": recorder})
    server.listen_unix(root / "sock")
    print("ready", flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    _main(Path(sys.argv[1]), int(sys.argv[2]))

"""What jobs write to, and one kind of it: exports of other NBD servers."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Protocol

from incbak.errors import IncbakError, NbdError, NbdRequestError
from incbak.nbd import protocol
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.serve.schema import QmpError

CONNECT_TIMEOUT = 10.0
"""Seconds to connect and negotiate."""
_ZEROES = bytes(1 << 20)
_WINDOW = 16


class JobTarget(Protocol):
    """Where one job writes. `take`, `begin`, then content and zeroes, `flush`, and in any case `release`.

    Offsets are those of the disk. Methods of the copying raise `TargetError` or `NbdError` when the target fails.
    """

    name: str
    size: int

    def take(self, job: str) -> None:
        """Be used by ``job``, while the guest goes on. Raises `QmpError`: it cannot be."""

    def begin(self) -> None:
        """The job starts: what was there may go."""

    def release(self) -> None:
        """The job is over, or is not going to be; after `take`."""

    def write(self, data: memoryview, offset: int) -> None:
        """Content; ``data`` may be reused at once. An error may also be that of something earlier."""

    def zeroes(self, offset: int, length: int) -> None:
        """As `write`, of zeroes."""

    def confirm(self) -> None:
        """All that was written has been taken, though it may not be durable; or what was not may be written again."""

    def flush(self) -> None:
        """All that was written is durable."""

    def settle(self) -> list[tuple[int, int]]:
        """After a failure: (offset, length) of what was refused; all else that was written is durable, or it raises."""

    def abort(self) -> None:
        """Wake whoever waits for it, from any thread."""

    def close(self) -> None:
        """Let it go."""


class Target:
    """A connection to an export, used by one job at a time; after a break the next job gets a new one."""

    def __init__(self, name: str, uri: NbdUri) -> None:
        """Raises `QmpError` when there is no connection to be had."""
        self.name, self.uri = name, uri
        self.user: str | None = None
        self._lock = threading.Lock()
        self._broken = False
        self._client = self._connect()
        self.size = self._client.size

    def _connect(self) -> NbdClient:
        try:
            return NbdClient.connect(self.uri, timeout=CONNECT_TIMEOUT, window=_WINDOW)
        except (IncbakError, OSError) as e:
            where = self.uri.path or f"{self.uri.host}:{self.uri.port}"
            cause = e.__cause__.strerror if isinstance(e.__cause__, OSError) else None
            raise QmpError(f"Failed to connect to '{where}': {cause or e}") from e

    def take(self, job: str) -> None:
        """Be used by ``job``, with a live connection. Raises `QmpError` when another one uses it."""
        with self._lock:
            if self.user is not None:
                raise QmpError(f"Node '{self.name}' is busy: block device is in use by block job: backup")
            self.user = job
        try:
            if self._broken:
                self._client = self._connect()
                self._broken = False
            if self._client.size != self.size:
                raise QmpError(f"Node '{self.name}' has another size than it had")
            self._client.refused.clear()
        except QmpError:
            self.release()
            raise

    def begin(self) -> None:
        """The job starts."""

    def release(self) -> None:
        """Be free for another job."""
        with self._lock:
            self.user = None

    def write(self, data: memoryview, offset: int) -> None:
        """Send; ``data`` may be reused at once. An error of an earlier write may surface here (`NbdError`)."""
        step = self._client.max_payload
        for start in range(0, len(data), step):
            self._client.submit_write(data[start : start + step], offset + start)

    def zeroes(self, offset: int, length: int) -> None:
        """As `write`, of zeroes."""
        if self._client.can(protocol.SEND_ZEROES):
            self._client.submit_zeroes(offset, length)
            return
        for start in range(0, length, len(_ZEROES)):
            self.write(memoryview(_ZEROES)[: length - start], offset + start)

    def confirm(self) -> None:
        """Everything sent has been answered. Raises `NbdError`; then it may be sent again, as if it had not been."""
        try:
            self._client.drain()
        finally:
            self._client.refused.clear()

    def flush(self) -> None:
        """Everything sent has been answered, and is durable there if the server can tell. Raises `NbdError`."""
        self._client.drain()
        if self._client.can(protocol.SEND_FLUSH):
            self._client.flush()

    def settle(self) -> list[tuple[int, int]]:
        """After a failure: (offset, length) of what the peer refused. All else that was sent is durable there.

        Raises `NbdError` where that cannot be known, as after a flush that failed: the next one proves nothing.
        """
        with suppress(NbdRequestError):
            self._client.drain()
        self.flush()
        refused = list(self._client.refused)
        if any(not length for _offset, length in refused):
            raise NbdError(f"an earlier flush of node {self.name} failed")
        return refused

    def abort(self) -> None:
        """Wake whoever waits for the peer, from any thread."""
        self._broken = True
        self._client.abort()

    def close(self) -> None:
        """Let the connection go."""
        self._client.close()


class OwnTarget(Target):
    """A `Target` that is no node: one job's own, and gone with it."""

    def release(self) -> None:
        """Close it."""
        self.close()

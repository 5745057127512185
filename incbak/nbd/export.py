"""What a server serves: the obligations of an export and of its per-connection device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Device(Protocol):
    """One connection's way to a disk. Called from the connection's thread and its few workers at once.

    Offsets and lengths have been validated against `size`. Failures are `OSError`; its errno goes to the client. A
    method ``rest``, if there is one, is called before replies are sent: what they are about has been done. It may be
    given a function that says whether the client's next request has come, as ``poll(0)`` does.
    """

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused."""

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``; may wait for the storage."""

    def read_nowait(self, buf: memoryview, offset: int) -> bool:
        """Fill ``buf`` without waiting; false where that is not possible."""

    def may_block(self, offset: int, length: int) -> bool:
        """Whether a write there may take long; then a worker does it."""

    def write(self, buf: memoryview, offset: int) -> None:
        """Write all of ``buf``; the server reuses it afterwards."""

    def write_zeroes(self, offset: int, length: int, *, unmap: bool, fast: bool) -> None:
        """Zeroes; with ``fast`` and no quick way, ``ENOTSUP`` at once."""

    def trim(self, offset: int, length: int) -> None:
        """Discard."""

    def cache(self, offset: int, length: int) -> None:
        """Prefetch, as a hint."""

    def flush(self) -> None:
        """All writes completed on any connection to the export are durable."""

    def status(self, offset: int, length: int, context: str, limit: int) -> Sequence[tuple[int, int]]:
        """(length, flags) from ``offset`` on; tiles a prefix: one extent to ``limit``, none of length 0."""

    def close(self) -> None:
        """The connection is gone."""


class Export(Protocol):
    """A named disk that clients can ask for. Names are keys, never paths; under a key that is not its name it is found,
    not listed.
    """

    @property
    def name(self) -> str:
        """By which clients ask."""

    @property
    def description(self) -> str:
        """For people."""

    @property
    def size(self) -> int:
        """Bytes."""

    @property
    def read_only(self) -> bool:
        """Advertised."""

    @property
    def multi_conn(self) -> bool:
        """Whether a flush on one connection covers the writes of all."""

    def contexts(self) -> Sequence[str]:
        """Meta contexts on offer."""

    def open(self) -> Device:
        """Called once per connection, when negotiation is over and not before."""

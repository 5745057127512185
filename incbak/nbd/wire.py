"""Exact reads from a socket, with a deadline."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable

from incbak.errors import NbdError, NbdProtocolError


class ClosedError(NbdError):
    """The peer closed the connection between two messages."""

    code = "nbd-closed"


class Wire:
    """Reads and writes whole messages on ``sock`` while negotiating; ``deadline`` is a `time.monotonic` time."""

    def __init__(self, sock: socket.socket, deadline: float | None = None) -> None:
        self.sock, self.deadline = sock, deadline

    def _arm(self) -> None:
        if self.deadline is None:
            return
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise NbdProtocolError("the peer took too long over the handshake")
        self.sock.settimeout(left)

    def recv(self, count: int) -> bytes:
        """Exactly ``count`` bytes. Raises `ClosedError` on an end before the first, `NbdProtocolError` within."""
        buf = bytearray(count)
        view, done = memoryview(buf), 0
        while done < count:
            self._arm()
            try:
                got = self.sock.recv_into(view[done:])
            except TimeoutError:
                raise NbdProtocolError("the peer took too long over the handshake") from None
            if not got:
                raise (NbdProtocolError if done else ClosedError)("the peer closed the connection")
            done += got
        return bytes(buf)

    def send(self, data: bytes) -> None:
        """All of ``data``."""
        self._arm()
        try:
            self.sock.sendall(data)
        except TimeoutError:
            raise NbdProtocolError("the peer does not read") from None


def keep_alive(sock: socket.socket) -> None:
    """Find out within two minutes that the other host is gone."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in ((socket.TCP_KEEPIDLE, 60), (socket.TCP_KEEPINTVL, 15), (socket.TCP_KEEPCNT, 4)):
        sock.setsockopt(socket.IPPROTO_TCP, option, value)


def bound_waits(sock: socket.socket, seconds: float, *options: int) -> None:
    """Let a call that waits on a blocking socket end after so many seconds in which not a byte went (0: never).

    ``options``: ``SO_RCVTIMEO``, ``SO_SNDTIMEO``. The call raises `BlockingIOError` then. Unlike a timeout of Python's
    it costs no further system call, and what is slow but goes on is not ended.
    """
    whole = int(seconds)
    for option in options:
        sock.setsockopt(socket.SOL_SOCKET, option, struct.pack("@ll", whole, int((seconds - whole) * 1_000_000)))


def poller(sock: socket.socket) -> Callable[[int], object]:
    """Return ``poll`` for what has come on a socket. One thread at a time may call it."""
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    return poll.poll


def close_hard(sock: socket.socket) -> None:
    """Shut down, so that threads blocked on it wake, and close."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()

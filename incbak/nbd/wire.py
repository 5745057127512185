"""Exact reads from a socket, with a deadline."""

from __future__ import annotations

import socket
import time

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


def close_hard(sock: socket.socket) -> None:
    """Shut down, so that threads blocked on it wake, and close."""
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    sock.close()

"""For monitors that cannot take descriptors: a Unix socket of our own, relayed to a target's.

It costs a copy of every byte, but keeps what the guest's safety needs: the connection can be cut at any time.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress

from incbak.private import PrivateDirectory

_CHUNK = 1 << 20
_CONNECT_SECONDS = 60.0


class Relay:
    """Accepts one connection on `path` and passes everything between it and ``inner``, which it takes over."""

    def __init__(self, inner: socket.socket) -> None:
        self._inner = inner
        self._directory = PrivateDirectory()
        self.path = self._directory.path / "sink.sock"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(1)
        self._listener.settimeout(_CONNECT_SECONDS)
        threading.Thread(target=self._accept, name="incbak-relay", daemon=True).start()

    def _accept(self) -> None:
        try:
            outer, _ = self._listener.accept()
        except OSError:
            self._inner.close()
            return
        outer.settimeout(None)
        back = threading.Thread(target=_pass, args=(self._inner, outer), name="incbak-relay", daemon=True)
        back.start()
        _pass(outer, self._inner)
        back.join()
        outer.close()
        self._inner.close()

    def close(self) -> None:
        """Nobody else can connect; what is connected goes on."""
        self._listener.close()
        self._directory.close()


def _pass(source: socket.socket, sink: socket.socket) -> None:
    buffer = memoryview(bytearray(_CHUNK))
    with suppress(OSError):
        while count := source.recv_into(buffer):
            sink.sendall(buffer[:count])
    for sock in (source, sink):
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)

"""Where engines push to: the sinks of a run behind an NBD server of its own."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from pathlib import Path

from incbak.backup.sink import DiskSink, SinkExport
from incbak.nbd.server import NbdServer
from incbak.private import PrivateDirectory


class SinkServer:
    """Serves the sinks on a Unix socket in a private directory, or on sockets that are handed over already connected.

    The path exists only once somebody asks for it. Use as a context manager.
    """

    def __init__(self, sinks: Mapping[str, DiskSink]) -> None:
        self._exports = {name: SinkExport(sink) for name, sink in sinks.items()}
        self._server = NbdServer(lambda: self._exports, max_connections=4 * max(len(sinks), 1))
        self._directory: PrivateDirectory | None = None

    def __enter__(self) -> SinkServer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def path(self) -> Path:
        """A Unix socket that only this user can reach."""
        if self._directory is None:
            self._directory = PrivateDirectory()
            self._server.listen_unix(self._directory.path / "sink.sock")
        return self._directory.path / "sink.sock"

    def serve(self, sock: socket.socket) -> None:
        """Take over a connected socket, the engine being at the other end."""
        self._server.start_connection(sock)

    def close(self) -> None:
        """End all connections."""
        self._server.stop(timeout=5)
        if self._directory:
            self._directory.close()
            self._directory = None


class SinkTarget:
    """One disk's target, as engines see it: see `incbak.engine.base.Target`."""

    def __init__(self, sink: DiskSink, server: SinkServer) -> None:
        self.sink, self._server = sink, server
        self.name, self.size = sink.name, sink.size

    def write(self, offset: int, data: memoryview, *, owned: bool = False) -> None:
        """In this process, without NBD."""
        self.sink.write(offset, data, owned=owned)

    def write_zeroes(self, offset: int, length: int) -> None:
        """In this process, without NBD."""
        self.sink.write_zeroes(offset, length)

    def flush(self) -> None:
        """In this process, without NBD."""
        self.sink.flush()

    def address(self) -> tuple[Path, str]:
        """Socket and export, for an engine that connects by path."""
        return self._server.path(), self.name

    def serve(self, sock: socket.socket) -> None:
        """Take over a connection that an engine has made elsewhere."""
        self._server.serve(sock)

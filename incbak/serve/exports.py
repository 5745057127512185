"""Exports that a monitor adds: a disk under another name, read-only or not, on an NBD server of their own.

What ``incbak serve`` exports by itself is apart from this, on its own sockets, and cannot be removed. As in QEMU there
is one such server, each of its exports has an id, and one that is removed is gone when the last of its clients is:
only then is BLOCK_EXPORT_DELETED told, and a bitmap that was on offer may be used for something else again.
"""

from __future__ import annotations

import errno
import ssl
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from incbak.errors import UsageError
from incbak.nbd.server import Device, NbdServer
from incbak.serve.export import ALLOCATION, DIRTY, DiskExport, TrackedDevice
from incbak.serve.schema import QmpError
from incbak.serve.tracker import TrackedDisk

_CLIENTS = 100
STOP = 5.0
"""Seconds that connections get to finish their requests when the server is stopped."""


@dataclass(frozen=True)
class ExportSpec:
    """What is asked for; ``bitmaps`` are those on offer, which exist."""

    id: str
    name: str
    description: str = ""
    writable: bool = False
    bitmaps: Sequence[str] = ()


class AddedExport(DiskExport):
    """One disk under a name of its own."""

    def __init__(self, tracked: TrackedDisk, spec: ExportSpec, gone: Callable[[AddedExport], None]) -> None:
        super().__init__(tracked)
        self.spec, self.name, self.description = spec, spec.name, spec.description
        self.read_only = not spec.writable
        self.clients, self.closing = 0, False
        self._gone = gone
        self._lock = threading.Lock()

    def contexts(self) -> list[str]:
        """``base:allocation``, and the bitmaps that were chosen."""
        return [ALLOCATION, *(DIRTY + name for name in self.spec.bitmaps)]

    @property
    def node(self) -> str:
        """The name of what is exported."""
        return self.tracked.name

    def device(self) -> Device:
        """One connection's way in, which calls `left` when it is closed."""
        return _Device(self)

    def open(self) -> Device:
        """Raises `OSError` when the export is being removed."""
        with self._lock:
            if self.closing:
                raise OSError(errno.ESHUTDOWN, f"export {self.name} is being removed")
            self.clients += 1
        try:
            return self.device()
        except BaseException:
            self.left()
            raise

    def left(self) -> None:
        """A client is gone, and nothing that it asked for is under way."""
        with self._lock:
            self.clients -= 1
            over = self.closing and not self.clients
        if over:
            self._gone(self)

    def remove(self, *, hard: bool) -> None:
        """Let nobody in any more. Raises `QmpError`: not ``hard``, and somebody is in."""
        with self._lock:
            if self.closing:
                raise QmpError(f"Export '{self.spec.id}' is already shutting down")
            if self.clients and not hard:
                raise QmpError(f"export '{self.spec.id}' still in use")
            self.closing = True
            over = not self.clients
        if over:
            self._gone(self)


class _Device(TrackedDevice):
    def __init__(self, export: AddedExport) -> None:
        super().__init__(export.tracked, read_only=export.read_only)
        self._export = export

    def close(self) -> None:
        super().close()
        self._export.left()


class ExportTable:
    """The server and its exports by id. Changed by one command at a time, and by clients that leave."""

    def __init__(self, emit: Callable[[str, dict[str, object]], None], tls: ssl.SSLContext | None = None) -> None:
        self.tls = tls
        """What clients on TCP must use, if anything."""
        self._emit = emit
        self._server: NbdServer | None = None
        self._exports: dict[str, AddedExport] = {}
        self._lock = threading.Lock()

    def start(self, place: Path | tuple[str, int], max_connections: int = 0) -> None:
        """Listen. Raises `QmpError`."""
        if self._server:
            raise QmpError("NBD server already running")
        server = NbdServer(self._by_name, max_connections=max_connections or _CLIENTS, tls=self.tls)
        try:
            if not isinstance(place, Path):
                server.listen_tcp(*place)
            elif place.parent.is_dir():
                server.listen_unix(place)
            else:
                raise QmpError(f"Failed to bind socket to {place}: No such file or directory")
        except UsageError as e:
            raise QmpError(f"Failed to bind socket to {place}: {e.message}") from e
        self._server = server

    def _by_name(self) -> dict[str, AddedExport]:
        return {e.name: e for e in self.all() if not e.closing}

    def all(self) -> list[AddedExport]:
        """Every export, oldest first, with those that are being removed."""
        with self._lock:
            return list(self._exports.values())

    def add(self, spec: ExportSpec, make: Callable[[Callable[[AddedExport], None]], AddedExport]) -> None:
        """One more, which ``make`` makes. Raises `QmpError`; that its bitmaps can be on offer has been checked."""
        self.check_id(spec.id)
        self.check_running()
        if spec.name in self._by_name():
            raise QmpError(f"NBD server already has export named '{spec.name}'")
        export = make(self._gone)
        for name in spec.bitmaps:
            export.tracked.busy[name] = f"export {spec.id}"
        with self._lock:
            self._exports[spec.id] = export

    def check_id(self, ident: str) -> None:
        """Raises `QmpError` when the id is taken."""
        if ident in self._exports:
            raise QmpError(f"Block export id '{ident}' is already in use")

    def check_running(self) -> None:
        """Raises `QmpError` when there is no server."""
        if not self._server:
            raise QmpError("NBD server not running")

    def remove(self, ident: str, *, hard: bool = False) -> None:
        """Remove an export; its clients are cut off with ``hard``, else there may be none. Raises `QmpError`."""
        with self._lock:
            export = self._exports.get(ident)
        if export is None:
            raise QmpError(f"Export '{ident}' is not found")
        export.remove(hard=hard)
        if self._server:
            self._server.disconnect(export)

    def _gone(self, export: AddedExport) -> None:
        for name in export.spec.bitmaps:
            export.tracked.busy.pop(name, None)
        with self._lock:
            self._exports.pop(export.spec.id, None)
        self._emit("BLOCK_EXPORT_DELETED", {"id": export.spec.id})

    def stop(self, timeout: float = STOP) -> None:
        """Everything goes; requests that run get ``timeout`` seconds. Without a server nothing happens."""
        server, self._server = self._server, None
        for export in self.all():
            if not export.closing:
                export.remove(hard=True)
        if server:
            server.stop(timeout)

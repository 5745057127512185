"""The NBD server: listeners, connections, and their bounds. Sockets are private to the user; names are keys."""

from __future__ import annotations

import logging
import os
import socket
import ssl
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from pathlib import Path

from incbak import durable
from incbak.errors import NbdError, UsageError
from incbak.nbd.connection import Connection
from incbak.nbd.export import Device, Export
from incbak.nbd.handshake import Negotiation
from incbak.nbd.slots import Slot, Slots
from incbak.nbd.wire import close_hard, keep_alive

__all__ = ["Device", "Export", "NbdServer", "bind_unix"]

log = logging.getLogger(__name__)

Exports = Callable[[], Mapping[str, Export]]


class NbdServer:
    """Serves whatever ``exports`` returns when a client connects. Every connection has a thread of its own.

    At most ``max_connections`` at once over TCP, and as many local ones; further ones are closed unheard, unless
    somebody gives way to them: see `incbak.nbd.slots`. ``handshake_timeout`` seconds for the whole negotiation. With
    ``tls`` clients on TCP must use it, others may.
    """

    def __init__(
        self,
        exports: Exports,
        *,
        max_connections: int = 100,
        handshake_timeout: float = 10.0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.exports, self.handshake_timeout, self.tls = exports, handshake_timeout, tls
        self._listeners: list[socket.socket] = []
        self._paths: list[Path] = []
        self._slots = Slots(max_connections)
        self._using: dict[socket.socket, Export] = {}
        self._lock = threading.Lock()
        self._stopping = False

    # -- listening ------------------------------------------------------------------------------------------------

    def listen_unix(self, path: Path) -> Path:
        """Listen on a socket that only this user can reach. Raises `UsageError` when the path cannot be taken."""
        self.add_listener(bind_unix(path))
        self._paths.append(path)
        return path

    def listen_tcp(self, host: str, port: int) -> tuple[str, int]:
        """Listen on TCP; the address really bound. Without TLS for loopback and trusted networks only."""
        try:
            sock = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        except OSError as e:
            raise UsageError(f"cannot listen on {host}:{port}: {e.strerror or e}") from e
        self.add_listener(sock)
        address = sock.getsockname()
        return str(address[0]), int(address[1])

    def add_listener(self, sock: socket.socket) -> None:
        """Accept on a socket that listens already, such as one from systemd."""
        self._listeners.append(sock)
        threading.Thread(target=self._accept, args=(sock,), name="nbd-accept", daemon=True).start()

    def _accept(self, listener: socket.socket) -> None:
        while not self._stopping:
            try:
                sock, _address = listener.accept()
            except OSError as e:
                if self._stopping:
                    return
                log.warning("cannot accept a connection: %s", e)
                time.sleep(0.05)
                continue
            self._start(sock)

    def _start(self, sock: socket.socket) -> None:
        thread = threading.Thread(target=lambda: self._serve(slot), name="nbd-connection", daemon=True)
        slot = None if self._stopping else self._slots.enter(sock, thread)
        if slot is None:
            close_hard(sock)
            return
        try:
            thread.start()
        except RuntimeError:
            self._slots.leave(sock)
            close_hard(sock)

    # -- serving --------------------------------------------------------------------------------------------------

    def serve_connection(self, sock: socket.socket) -> None:
        """Serve one connected socket in this thread until its client is gone."""
        self._serve(self._slots.enter(sock, threading.current_thread(), bounded=False))

    def start_connection(self, sock: socket.socket) -> None:
        """Serve one connected socket in a thread of its own."""
        self._start(sock)

    def _serve(self, slot: Slot | None) -> None:
        assert slot
        sock = slot.sock
        try:
            if slot.tcp:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                keep_alive(sock)
            must = slot.tcp and self.tls is not None
            negotiation = Negotiation(sock, self.exports(), self.handshake_timeout, tls=self.tls, must=must)
            with closing(negotiation):
                agreed = negotiation.run()
                if agreed is None:
                    return
                with self._lock:
                    self._using[sock] = agreed.export
                device = agreed.export.open()
                try:
                    Connection(negotiation.sock, device, agreed, slot, self._slots.relieve).run()
                finally:
                    device.close()
        except (NbdError, OSError) as e:
            log.info("NBD connection ended: %s", e)
        except Exception:
            log.exception("NBD connection ended by an error of our own")
        finally:
            self._forget(sock)

    def _forget(self, sock: socket.socket) -> None:
        close_hard(sock)
        self._slots.leave(sock)
        with self._lock:
            self._using.pop(sock, None)

    def disconnect(self, export: Export) -> None:
        """Cut the clients of an export off; requests that run are finished. Who opens it later is not meant."""
        with self._lock:
            using = [sock for sock, used in self._using.items() if used is export]
        for sock in using:
            with suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def connections(self) -> int:
        """How many clients there are."""
        return len(self._slots)

    def stop(self, timeout: float = 10.0) -> None:
        """Accept no more, end the connections (requests that run are finished), wait at most ``timeout`` seconds."""
        self._stopping = True
        for listener in self._listeners:
            close_hard(listener)
        for path in self._paths:
            with suppress(OSError):
                path.unlink()
        deadline = time.monotonic() + timeout
        open_now = self._slots.all()
        for slot in open_now:
            with suppress(OSError):
                slot.sock.shutdown(socket.SHUT_RD)
        for slot in open_now:
            slot.thread.join(max(deadline - time.monotonic(), 0.01))
            if slot.thread.is_alive():
                close_hard(slot.sock)


def bind_unix(path: Path) -> socket.socket:
    """A listening Unix socket, mode 0600 before anybody can connect, in directories that are made 0700 if missing.

    A socket that nobody listens on is replaced; anything else in the way raises `UsageError`.
    """
    durable.make_dir(path.parent)
    _clear_way(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        os.chmod(path, 0o600)
        sock.listen(128)
    except OSError as e:
        sock.close()
        raise UsageError(f"cannot listen on {path}: {e.strerror or e}", hint="Choose another path.") from e
    return sock


def _clear_way(path: Path) -> None:
    try:
        info = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(info.st_mode):
        raise UsageError(f"cannot listen on {path}: something else is there", hint="Choose another path.")
    probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        probe.settimeout(1)
        probe.connect(str(path))
    except (ConnectionRefusedError, FileNotFoundError):
        with suppress(FileNotFoundError):
            path.unlink()
        return
    except OSError:
        pass
    finally:
        probe.close()
    raise UsageError(f"cannot listen on {path}: another process does", hint="Choose another path, or stop it.")

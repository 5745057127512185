"""From an address to a connected socket."""

from __future__ import annotations

import socket

from incbak.errors import NbdError, UsageError
from incbak.nbd.uri import NbdUri


def dial(uri: NbdUri, timeout: float | None) -> socket.socket:
    """A connection to the server of ``uri``.

    Raises `NbdError` when nobody answers within ``timeout`` seconds, `UsageError` for what can be no address: a path
    with a zero byte, a host name that is none, a port over 65535.
    """
    if "\0" in (uri.path or "") or not 0 < uri.port < 1 << 16:  # the system would cut both, and connect elsewhere
        raise UsageError(f"not an address of an NBD server: {uri}")
    try:
        if uri.path is not None:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(timeout)
            try:
                sock.connect(uri.path)
            except BaseException:
                sock.close()
                raise
            return sock
        sock = socket.create_connection((uri.host or "", uri.port), timeout)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return sock
    except OSError as e:
        raise NbdError(f"cannot connect to {uri}: {e.strerror or e}", hint="Is the server running?") from e
    except ValueError as e:
        raise UsageError(f"not an address of an NBD server: {uri}: {e}") from e

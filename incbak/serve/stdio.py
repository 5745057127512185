"""One NBD connection on stdin and stdout, which may be one socket or two pipes."""

from __future__ import annotations

import os
import socket
import stat
import sys
import threading


def stdio_socket() -> socket.socket:
    """A connected socket that speaks on stdin and stdout. Whatever is printed from now on goes to stderr."""
    incoming, outgoing = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    sys.stdout.flush()
    if stat.S_ISSOCK(os.fstat(incoming).st_mode) and os.path.sameopenfile(incoming, outgoing):
        os.close(outgoing)
        return socket.socket(fileno=incoming)
    ours, theirs = socket.socketpair()
    threading.Thread(target=_pump, args=(incoming, theirs), daemon=True).start()
    threading.Thread(target=_drain, args=(theirs, outgoing), daemon=True).start()
    return ours


def _pump(incoming: int, sock: socket.socket) -> None:
    try:
        while data := os.read(incoming, 1 << 16):
            sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def _drain(sock: socket.socket, outgoing: int) -> None:
    try:
        while data := sock.recv(1 << 16):
            view = memoryview(data)
            while view:
                view = view[os.write(outgoing, view) :]
    except OSError:
        pass
    finally:
        os.close(outgoing)

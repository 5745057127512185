"""The way by which QEMU connects to a target: a Unix socket for one connection, which can never be dialled again.

QEMU's NBD node keeps the address that it was given, and dials it again whenever somebody (a flush, a drain, a
``job-resume``) has a request for it after the connection was cut. A descriptor that was handed over is kept as its
*number*: by then it may be another connection of QEMU (a monitor, VNC, a migration), which is taken over and closed.
So the address is a path, and nothing is ever found there again:

- The socket has a random name in a directory, ``PRIVATE/sink``. The first connection closes the listener, and the
  directory is removed.
- Where the monitor takes descriptors, QEMU gets one of that directory, and the path ``/proc/self/fd/N/NAME``. It leads
  into the directory for any user that QEMU runs as, and nobody else: ``PRIVATE`` has mode 0700. If QEMU closes N and
  uses the number for something else, that has no file of this NAME; in a removed directory nothing can be made.
- Over TCP the path is the real one, which QEMU has to reach by itself.

The guard process accepts the connection, and hands it on to the runner: so it can cut whatever QEMU may wait for, even
if the runner is stopped in the midst of connecting.
"""

from __future__ import annotations

import os
import secrets
import socket
from contextlib import suppress
from pathlib import Path

from incbak.private import DIRECTORY, PrivateDirectory


class Door:
    """A listening socket, and the directory that it is in. `close` when QEMU has connected, or will not."""

    def __init__(self) -> None:
        self._private = PrivateDirectory()
        try:
            directory = self._private.path / DIRECTORY
            directory.mkdir()
            directory.chmod(0o711)  # for QEMU's user, who gets here by the descriptor only
            self.directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            self.name = secrets.token_hex(8)
            self.path = directory / self.name
            self.listener: socket.socket | None = self._listen()
        except BaseException:
            self._private.close()
            raise

    def _listen(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX)
        try:
            inside = Path(f"/proc/self/fd/{self.directory}", self.name)  # no longer than a socket's path may be
            listener.bind(str(inside))
            inside.chmod(0o666)
            listener.listen(1)
        except BaseException:
            listener.close()
            os.close(self.directory)
            raise
        return listener

    def give_listener(self) -> socket.socket:
        """Return the listener, which is the caller's now."""
        assert self.listener
        given, self.listener = self.listener, None
        return given

    def close(self) -> None:
        """Remove the directory. Idempotent; raises nothing."""
        if self.listener:
            self.listener.close()
            self.listener = None
        if self.directory >= 0:
            with suppress(OSError):
                os.close(self.directory)
            self.directory = -1
        self._private.close()

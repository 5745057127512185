"""Connecting to the Unix socket of a monitor, and telling which socket is none."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

_AGAIN_SECONDS = 0.05
_AGENT = "org.qemu.guest_agent"
_LONGEST_COMMAND_LINE = 1 << 20


def connect_unix(path: str, timeout: float) -> socket.socket:
    """Connect within ``timeout`` seconds. Raises `OSError`; `TimeoutError` where others wait for the socket already.

    Where more clients wait than the listener's backlog has room for, the kernel answers EAGAIN at once, whatever the
    socket's timeout: that is a busy monitor too, and the wait goes on here.
    """
    end = time.monotonic() + timeout
    sock = socket.socket(socket.AF_UNIX)
    try:
        while True:
            sock.settimeout(max(end - time.monotonic(), 0.001))
            try:
                sock.connect(path)
                return sock
            except BlockingIOError:
                if time.monotonic() >= end:
                    raise TimeoutError("the backlog is full") from None
                time.sleep(_AGAIN_SECONDS)
    except BaseException:
        sock.close()
        raise


def is_agent_socket(path: str, pid: int) -> bool:
    """Return whether ``path`` is the guest agent's, by the command line of the QEMU that listens there, or its name.

    Nothing is written to find out: behind the socket may be a console into which it would be typed.
    """
    if _AGENT in Path(path).name:
        return True
    try:
        with Path(f"/proc/{pid}/cmdline").open("rb") as f:
            arguments = f.read(_LONGEST_COMMAND_LINE).decode(errors="replace").split("\0")
    except OSError:
        return False
    names = {name for a in arguments if path in _values(a, "path") for name in _values(a, "id")}
    return any(_AGENT in a and names & _values(a, "chardev") for a in arguments)


def _values(argument: str, key: str) -> set[str]:
    """What ``key`` is in ``key=value,...`` or in JSON."""
    pairs = re.findall(rf'(?:^|,){key}=([^,]*)|"{key}":\s*"([^"]*)"', argument)
    return {value for pair in pairs for value in pair if value}

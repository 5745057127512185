"""What systemd hands over (sockets: ``LISTEN_FDS``) and wants to hear (``NOTIFY_SOCKET``): readiness, signs of life."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import MutableMapping

_FIRST_FD = 3
MONITOR = "monitor"
"""A socket with this name (``FileDescriptorName=``) is for the monitor; all others are for NBD."""


def listen_sockets(environ: MutableMapping[str, str] = os.environ) -> list[tuple[str, socket.socket]]:
    """The listening sockets passed to this very process, with their names; the variables are taken out."""
    pid, count = environ.pop("LISTEN_PID", ""), environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []
    found = []
    for number in range(min(int(count), 64)):
        fd = _FIRST_FD + number
        os.set_inheritable(fd, False)
        found.append((names[number] if number < len(names) else "", socket.socket(fileno=fd)))
    return found


def notify(state: str, environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell the service manager, if there is one, such as ``READY=1``."""
    path = environ.get("NOTIFY_SOCKET", "")
    if not path:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        try:
            sock.sendto(state.encode(), "\0" + path[1:] if path.startswith("@") else path)
        except OSError:
            pass


async def watchdog(environ: MutableMapping[str, str] = os.environ) -> None:
    """Tell the service manager twice in each of its intervals that the event loop runs, if it wants to hear that.

    It does not tell that disks answer: a guest whose storage stalls is not helped by an end of its disks.
    """
    usec, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
    if not usec.isdecimal() or not int(usec) or pid not in ("", str(os.getpid())):
        return
    while True:
        notify("WATCHDOG=1", environ)
        await asyncio.sleep(int(usec) / 2e6)

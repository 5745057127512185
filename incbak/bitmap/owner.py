"""Who owns a disk's bitmaps: written into their lock, for whoever finds it taken. Only the lock itself decides."""

from __future__ import annotations

import enum
import os
from contextlib import suppress

_LIMIT = 100


class Owner(enum.StrEnum):
    """What a process does that owns bitmaps."""

    RUN = "a run"
    SERVE = "incbak serve"
    WATCH = "incbak watch"
    COMMAND = "another command"


_HINTS = {
    Owner.RUN: "Wait until it has ended; a backup waits with --lock-wait TIME.",
    Owner.SERVE: "Use its monitor as the source, or stop it.",
    Owner.WATCH: "Use the VM's monitor as the source, or end its watch.",
}
_HINT = "Stop the process that serves it, or use its monitor as the source."


def say_owner(fd: int, owner: Owner) -> None:
    """Write into the lock file ``fd``, which this process has locked, who that is. Raises nothing."""
    with suppress(OSError):  # a full disk: the lock is held all the same
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {owner}\n".encode(), 0)


def said_owner(fd: int) -> tuple[str, str]:
    """Return who has locked the file, as the end of a sentence, and what to do then."""
    try:
        pid, _, what = os.pread(fd, _LIMIT, 0).decode("ascii").strip().partition(" ")
        owner = Owner(what)
    except (OSError, ValueError):
        return "", _HINT
    if not pid.isdecimal():
        return "", _HINT
    return f" by {owner} (process {pid})", _HINTS.get(owner, _HINT)

"""That an image is watched: one process does, whatever it calls the VM and wherever it keeps bitmaps.

A second one on another monitor would record, pause and save beside the first, and each would take what the other does
for the end of the VM. The lock is a file in the runtime directory, named after the image itself.
"""

from __future__ import annotations

import fcntl
import os
import stat
from pathlib import Path

from incbak import durable, host
from incbak.errors import DurabilityError, LockedError

_DIRECTORY = ".watched"  # no name of a VM begins with a dot there


class Claim:
    """One image that is ours to watch, from `take` until `leave` or death."""

    def __init__(self) -> None:
        self._fd: int | None = None

    def take(self, image: Path) -> None:
        """Raise `LockedError` while another process watches it, `DurabilityError` where there is no place to say so."""
        directory = host.runtime_dir() / _DIRECTORY
        try:
            durable.make_dir(directory)
            fd = os.open(directory / _key(image), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as e:
            raise DurabilityError(f"cannot note in {directory} that {image} is watched: {e.strerror}") from e
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            hint = "One process watches one VM, by whatever monitor: end the other one first."
            raise LockedError(f"{image} is watched by another incbak watch", hint=hint) from None
        self._fd = fd

    def leave(self) -> None:
        """Let others watch it. Idempotent."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def _key(image: Path) -> str:
    info = image.stat()
    if stat.S_ISBLK(info.st_mode):
        return f"device-{os.major(info.st_rdev)}-{os.minor(info.st_rdev)}"
    return f"file-{info.st_dev}-{info.st_ino}"

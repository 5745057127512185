"""The kernel's tables of mounts: lines that end with a newline and nothing else, and the type of a file system.

The kernel escapes a newline in a name, and in most tables a space. `str.splitlines` and `str.split` also split at other
characters, as a form feed, which any user may put into the name of a file or of a mount point.
"""

from __future__ import annotations

import os
from pathlib import Path

PASSING = tuple(
    f"fuse.{n}" for n in ("mergerfs", "bindfs", "mhddfs", "rofs", "unionfs", "unionfs-fuse", "fuse-overlayfs")
)
"""Types of FUSE file systems that show files of another one, and pass on what that says of them."""
_MOUNTS = Path("/proc/self/mountinfo")


def lines_of(table: Path) -> list[str]:
    """Return the lines of a table of the kernel. Raises `OSError`."""
    content = table.read_bytes().decode("utf-8", "surrogateescape")  # reading text would translate carriage returns
    return content.removesuffix("\n").split("\n") if content else []


def kind_of(path: Path) -> str:
    """Return the type of the file system that ``path`` is on, as ``ext4`` or ``fuse.sshfs``.

    It is empty where the mount is not one of this process's namespace. A server is not asked. Raises `OSError`.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        facts = dict(line.partition(":")[::2] for line in lines_of(Path(f"/proc/self/fdinfo/{fd}")))
    finally:
        os.close(fd)
    ident = facts.get("mnt_id", "").strip()
    for line in lines_of(_MOUNTS):
        mount, _, source = line.partition(" - ")
        if mount.split(" ", 1)[0] == ident:
            return source.split(" ", 1)[0]
    return ""

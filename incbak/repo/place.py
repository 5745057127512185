"""Where a repository may be, and what a directory without a ``config`` is.

A path is one of a local directory. What looks like an address (``s3:bucket/x``, ``ssh://host/x``, ``user@host:x``,
``C:\\x``) is refused rather than made a directory of that name below the current one, where nobody would look for
backups; a directory that has such a name is named by its absolute path.

A directory without a ``config`` that holds files of any other kind was a repository: `init` makes nothing in it, and
removes nothing from it, least of all a key, without which what is stored is lost for good.
"""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from incbak.errors import LostConfigError, UsageError
from incbak.repo.storage.base import KINDS

_ADDRESS = re.compile(r"[^/]*:")
"""A relative path whose first part has a colon."""


def refuse_address(path: Path) -> None:
    """Raises `UsageError` for what can only be meant as something else than a local directory."""
    if _ADDRESS.match(str(path)) and not (path / "config").is_file():
        what = f"{str(path)!r} is not the path of a local directory"
        raise UsageError(
            what, hint=f"Other storage must be mounted. If a directory has this name, write it as {Path.cwd()}/..."
        )


def refuse_remains(path: Path) -> None:
    """Raise `LostConfigError` if ``path`` has no config but files of a repository."""
    held = [kind for kind in KINDS if kind != "locks" and _holds_any(path / kind)]
    if held:
        what = f"{path} has no config, but holds files of a repository ({', '.join(held)})"
        raise LostConfigError(
            what,
            hint="Nothing was changed. Bring config back from a copy; for a new repository choose another path.",
        )


def room_for_one(path: Path) -> Path:
    """Return a path at or below ``path``, or beside it where that is a file, in which `init` makes a repository."""
    with suppress(OSError):
        if path.is_dir():
            return path / "incbak" if any(path.iterdir()) else path
        if path.exists():
            return path.with_name(f"{path.name}.incbak")
    return path


def _holds_any(folder: Path) -> bool:
    with suppress(FileNotFoundError, NotADirectoryError):
        return any(not each.name.startswith(".") for each in folder.iterdir())
    return False

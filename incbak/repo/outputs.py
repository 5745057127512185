"""What a user names to be written is never one of incbak's own files, whatever is forced.

A restore, a report, an exported key, units, metrics, copied files, a socket: each goes to a path that a user typed, and
``--force`` replaces what is there. Only incbak itself writes in a repository and in the state directory. So a path is
refused (`refuse_own`) when

1. it, or what it leads to by links, is a repository or is below one: the one in use, known by device and inode (a bind
   mount is another path to it), and any other directory that looks like one;
2. the same for the state directory in use;
3. it is another name (a hard link) of a file in one of these two.

Every command that takes such a path asks through `incbak.cli.settings.Settings.refuse_own` before it writes anything.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from incbak.errors import UsageError

_FOLDERS = ("packs", "index", "backups")
"""Each repository has had these from the first version on, also one that lost its config."""

_DEPTH = 3
"""How deep the files of a state directory are; those of a repository are less deep."""


def refuse_own(path: Path, own: Mapping[str, Path]) -> None:
    """Raise `UsageError` where ``path`` cannot be written: see the module's docstring. ``own``: places in use, by what
    each of them is."""
    with suppress(ValueError):  # no path at all; what opens it says so
        places = {what: info for what, place in own.items() if (info := _stat(place))}
        for each in _ways(path):
            for what, info in places.items():
                if (there := _stat(each)) and os.path.samestat(there, info):
                    raise _refused(path, f"in {what} {own[what]}")
            if all(os.path.isdir(each / folder) for folder in _FOLDERS):
                raise _refused(path, f"in the repository {each}")
        if (info := _stat(path)) and stat.S_ISREG(info.st_mode) and info.st_nlink > 1:
            for what in places:
                if (twin := _twin(info, own[what], _DEPTH)) is not None:
                    raise _refused(path, f"a hard link of {twin}, in {what}")


def _ways(path: Path) -> Iterator[Path]:
    """Yield what ``path`` is, and all directories above: as it is named, and where it leads."""
    named = Path(os.path.realpath(path.absolute().parent)) / path.name
    for each in dict.fromkeys((named, Path(os.path.realpath(path)))):
        yield each
        yield from each.parents


def _stat(path: Path) -> os.stat_result | None:
    try:
        return os.stat(path)
    except OSError:
        return None


def _twin(info: os.stat_result, directory: Path, depth: int) -> Path | None:
    """Return the file below ``directory`` that is the same, if there is one."""
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                if depth and (found := _twin(info, Path(entry.path), depth - 1)) is not None:
                    return found
            elif entry.inode() == info.st_ino and os.path.samestat(entry.stat(follow_symlinks=False), info):
                return Path(entry.path)
    return None


def _refused(path: Path, why: str) -> UsageError:
    hint = "Nothing is written there but by incbak itself. Choose a path outside it."
    return UsageError(f"{path} is {why}", hint=hint)

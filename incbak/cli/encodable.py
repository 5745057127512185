"""Names and paths that go into records, bitmaps and URIs, which are UTF-8: refused before anything is done.

A repository may be anywhere: its path is in no record.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from incbak.errors import UsageError


def refuse_unencodable(what: str, texts: Iterable[str]) -> None:
    """Raise `UsageError` for the first text that is not UTF-8, called ``what``."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError:
            hint = "Rename it, or make a symbolic link with another name."
            raise UsageError(f"{what} is not UTF-8: {os.fsencode(text)!r}", hint=hint) from None


def refuse_unencodable_path(what: str, paths: Iterable[Path | str]) -> None:
    """As `refuse_unencodable`, of the whole path: that of the working directory counts."""
    refuse_unencodable(what, (os.path.abspath(path) for path in paths))

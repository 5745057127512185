"""Names of things in a repository: random, never from a clock, never from a path."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping

_ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    """32 hex digits that nobody else has."""
    return secrets.token_hex(16)


def ids(listed: Mapping[str, int]) -> dict[str, int]:
    """Of the files of a folder those that are named as ours are: others are strays, which are left alone."""
    return {name: size for name, size in listed.items() if is_id(name)}


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of an id; what does not is never used as a file name."""
    return _ID.fullmatch(text) is not None

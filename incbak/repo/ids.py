"""Names of things in a repository: random, never from a clock, never from a path."""

from __future__ import annotations

import re
import secrets

_ID = re.compile(r"[0-9a-f]{32}")


def new_id() -> str:
    """32 hex digits that nobody else has."""
    return secrets.token_hex(16)


def is_id(text: str) -> bool:
    """Whether ``text`` has the form of an id; what does not is never used as a file name."""
    return _ID.fullmatch(text) is not None

"""Text that does nothing to a terminal."""

from __future__ import annotations


def printable(text: str) -> str:
    """``text`` without control characters: names may come from a repository that somebody else wrote."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)

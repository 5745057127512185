"""Text that does nothing to a terminal."""

from __future__ import annotations


def one_line(text: str) -> str:
    """``text`` as a part of one line: a newline in a name would begin a line of its own, and say what it likes."""
    return printable(text).replace("\n", "\N{REPLACEMENT CHARACTER}")


def printable(text: str) -> str:
    """``text`` without control characters: names may come from a repository that somebody else wrote."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)

"""One request of the client's, until its last reply has come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Request:
    """What was asked, and what has come of the answer. ``slow``: the server has to write to its storage first."""

    command: int
    offset: int
    length: int
    into: memoryview | None = None
    filled: int = 0
    error: int = 0
    errors: int = 0
    slow: bool = False
    contexts: frozenset[int] = frozenset()
    """Whose status is asked for."""
    extents: dict[int, bytes] = field(default_factory=dict)
    """As they came, by context."""

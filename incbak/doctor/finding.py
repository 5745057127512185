"""What a look found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from incbak.errors import IncbakError


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    FAULT = "fault"


@dataclass(frozen=True)
class Finding:
    """``what`` was looked at; ``text`` says what was found; ``hint`` is the next step, where there is one."""

    level: Level
    what: str
    text: str
    hint: str = ""


def ok(what: str, text: str) -> Finding:
    """As it should be."""
    return Finding(Level.OK, what, text)


def warning(what: str, text: str, hint: str = "") -> Finding:
    """Works, but."""
    return Finding(Level.WARNING, what, text, hint)


def fault(what: str, text: str, hint: str = "") -> Finding:
    """Does not work."""
    return Finding(Level.FAULT, what, text, hint)


def guarded(what: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of ``look``; what it raises is one of them: a doctor does not faint."""
    try:
        return look()
    except IncbakError as e:
        return [fault(what, str(e), e.hint)]
    except OSError as e:
        return [fault(what, f"{e.filename or what}: {e.strerror or e}")]

"""What the library reports while it works. The core never prints: it tells a `Reporter`, which is silent by default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from incbak.reasons import Reason


@dataclass(frozen=True)
class Progress:
    """``done`` of ``total`` bytes of ``disk`` (or of all, when empty); ``total`` may grow, and is 0 if it is not known.

    ``what`` is done, where a command does several things one after another; ``unit``: what is counted, if not bytes.
    """

    disk: str
    done: int
    total: int
    what: str = ""
    unit: str = ""


@dataclass(frozen=True)
class Fallback:
    """``disk`` is read whole instead of incrementally, because of ``reason``."""

    disk: str
    reason: Reason
    detail: str = ""


@dataclass(frozen=True)
class Notice:
    """Something a user should know that stopped nothing."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something a user should look at: goes to stderr even when all else is quiet."""

    text: str


Event = Progress | Fallback | Notice | Warned


class Reporter(Protocol):
    """Takes events; called from any thread, so an implementation locks; must not raise."""

    def __call__(self, event: Event, /) -> None:
        """Take one event."""


def silent(event: Event, /) -> None:
    """The default reporter: says nothing."""

"""What every target shares: findings, the clock, the memory, and the watch over logs and threads."""

from __future__ import annotations

import faulthandler
import logging
import os
import resource
import sys
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from random import Random

from incbak.errors import IncbakError

SECONDS = 10.0
"""A case that takes longer hangs."""
MEMORY = 1 << 30
"""Resident bytes that the whole fuzzer may take."""
ADDRESS_SPACE = 8 << 30


class FoundError(Exception):
    """A promise that was not kept."""


def demand(condition: object, what: str) -> None:
    """Raise `FoundError` saying ``what`` unless ``condition`` holds."""
    if not condition:
        raise FoundError(what)


def allowed(action: Callable[[], object]) -> bool:
    """Run it; true when it worked, false when it was refused in the ways that are allowed."""
    try:
        action()
    except (IncbakError, OSError):
        return False
    return True


class FuzzTarget(ABC):
    """``make`` is a pure function of the generator (and of samples that are made when the target is)."""

    settle_every = 50

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @abstractmethod
    def make(self, rng: Random) -> bytes:
        """The input of a case."""

    @abstractmethod
    def run(self, data: bytes) -> None:
        """Run a case. Any exception is a finding."""

    def settle(self) -> None:  # noqa: B027
        """Now and then, and in the end: whether all is as at first. Any exception is a finding."""

    def close(self) -> None:  # noqa: B027
        """The end."""


class Watch(logging.Handler):
    """Collects what goes wrong where no caller sees it: in threads, in logs; and ends the run when a case hangs."""

    def __init__(self, on_hang: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.troubles: list[str] = []
        self._on_hang = on_hang
        self._until: float | None = None
        logging.getLogger("incbak").addHandler(self)
        logging.getLogger("incbak").propagate = False
        threading.excepthook = self._thread_died
        sys.unraisablehook = self._unraisable
        threading.Thread(target=self._guard, name="watch", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info or record.levelno >= logging.ERROR:
            why = "".join(traceback.format_exception(record.exc_info[1])) if record.exc_info else ""
            self.troubles.append(f"logged: {record.getMessage()}\n{why}")

    def _thread_died(self, args: threading.ExceptHookArgs) -> None:
        self.troubles.append("a thread died: " + "".join(traceback.format_exception(args.exc_value)))

    def _unraisable(self, args: object) -> None:
        error = getattr(args, "exc_value", None)
        if not isinstance(error, ResourceWarning):
            self.troubles.append("unraisable: " + "".join(traceback.format_exception(error)))

    def _guard(self) -> None:
        while True:
            time.sleep(0.25)
            until = self._until
            if until is not None and time.monotonic() > until:
                faulthandler.dump_traceback(file=sys.stderr)
                self._on_hang(f"no end after {SECONDS:g} s")
                os._exit(1)

    def run(self, action: Callable[[], None], patience: float = SECONDS) -> str | None:
        """Run it under the clock; what went wrong, or ``None``."""
        self._until = time.monotonic() + patience
        try:
            action()
        except BaseException as e:
            if isinstance(e, KeyboardInterrupt):
                raise
            self.troubles.append("".join(traceback.format_exception(e)))
        finally:
            self._until = None
        if (used := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10) > MEMORY:
            self.troubles.append(f"{used >> 20} MiB of memory")
            _more_memory()
        found, self.troubles = self.troubles, []
        return "\n".join(found) or None


def _more_memory() -> None:
    """The peak never falls: the next one is told only when it is higher still."""
    global MEMORY
    MEMORY += 512 << 20


def limit_memory() -> None:
    """What asks for absurd amounts fails with `MemoryError`, which is a finding."""
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, resource.getrlimit(resource.RLIMIT_AS)[1]))


def wait_until(what: Callable[[], object], why: str, seconds: float = 5.0) -> None:
    """Poll; a finding when it does not come true."""
    end = time.monotonic() + seconds
    while not what():
        demand(time.monotonic() < end, f"waited {seconds:g} s in vain: {why}")
        time.sleep(0.002)

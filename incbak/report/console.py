"""The reporter of the command line: progress on a terminal, warnings on stderr, nothing else unless it is asked for."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import TextIO

from incbak.events import Event, Fallback, Notice, Progress, Warned
from incbak.report.meter import Meter
from incbak.report.printable import one_line

_EVERY = 0.2


class Console:
    """Takes events from any thread. ``verbosity``: -1 quiet, 0 normal, 1 tells notices too.

    Progress is one line that is drawn over itself and gone in the end, on a terminal only. A library for it
    (rich) was weighed: it would bring four packages for one line.
    """

    def __init__(
        self, verbosity: int = 0, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._verbosity = verbosity
        self._lock = threading.Lock()
        self._shows_progress = verbosity >= 0 and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._clock = clock
        self._meter = Meter(clock)
        self._drawn = -_EVERY
        self._width = 0

    def __call__(self, event: Event, /) -> None:
        with self._lock:
            if isinstance(event, Progress):
                self._progress(event)
            elif isinstance(event, Fallback):
                detail = f" ({event.detail})" if event.detail else ""
                self._line(f"disk {event.disk} is read whole: {event.reason.text}{detail} [{event.reason}]")
            elif isinstance(event, Warned):
                self._line(f"warning: {event.text}")
            elif isinstance(event, Notice) and self._verbosity > 0:
                self._line(event.text)

    def _line(self, text: str) -> None:
        self._wipe()
        print(one_line(f"incbak: {text}"), file=self._stream, flush=True)

    def _progress(self, event: Progress) -> None:
        if not self._shows_progress:
            return
        self._meter.take(event)
        now = self._clock()
        if now < self._drawn + _EVERY:
            return
        self._drawn = now
        text = one_line(self._meter.line())[: self._columns() - 1]
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def _columns(self) -> int:
        """A line that is wrapped could not be taken away again."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        except (OSError, ValueError):
            return 80

    def _wipe(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0

    def end(self) -> None:
        """Take the progress line away."""
        with self._lock:
            self._wipe()
            self._stream.flush()

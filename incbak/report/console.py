"""The reporter of the command line: progress on a terminal, warnings on stderr, nothing else unless it is asked for."""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from incbak.events import Event, Fallback, Notice, Progress, Warned
from incbak.units import format_duration, format_size

_EVERY = 0.2


class Console:
    """Takes events from any thread. ``verbosity``: -1 quiet, 0 normal, 1 tells notices too."""

    def __init__(self, verbosity: int = 0, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._verbosity = verbosity
        self._lock = threading.Lock()
        self._shows_progress = verbosity >= 0 and self._stream.isatty()
        self._done: dict[str, tuple[int, int]] = {}
        self._began = self._drawn = 0.0
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
        print(f"incbak: {text}", file=self._stream, flush=True)

    def _progress(self, event: Progress) -> None:
        if not self._shows_progress:
            return
        now = time.monotonic()
        self._began = self._began or now
        self._done[event.disk] = (event.done, event.total)
        if now < self._drawn + _EVERY:
            return
        self._drawn = now
        done, total = (sum(column) for column in zip(*self._done.values(), strict=True))
        text = f"{format_size(done)} of {format_size(total)}"
        if (elapsed := now - self._began) > 1 and done:
            rate = done / elapsed
            text += f", {format_size(rate)}/s, {format_duration((total - done) / rate)} left"
        self._stream.write("\r" + text.ljust(self._width))
        self._stream.flush()
        self._width = len(text)

    def _wipe(self) -> None:
        if self._width:
            self._stream.write("\r" + " " * self._width + "\r")
            self._width = 0

    def end(self) -> None:
        """Take the progress line away."""
        with self._lock:
            self._wipe()
            self._stream.flush()

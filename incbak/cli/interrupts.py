"""Ctrl-C before, during and after a command: at once, as an exception, and not at all."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = 130


def until_begun() -> None:
    """Let Ctrl-C end the process at once, with one line and `INTERRUPTED`, until `begin`; unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def _quit(_number: int, _frame: Any) -> None:
    os.write(2, b"incbak: error: interrupted\n")
    os._exit(INTERRUPTED)


def begin() -> None:
    """Let it be a `KeyboardInterrupt` from here on, so that a command can clean up; if `until_begun` was called."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def over() -> None:
    """Ignore it: the exit code is known, and the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

"""Ctrl-C before, during and after a command: at once, as an exception, and not at all.

The modules that this one imports are loaded by the interpreter itself; others would take a while, unprotected.
"""

from __future__ import annotations

import _signal as signal  # type: ignore[import-not-found,unused-ignore]  # without the imports of signal
import os

INTERRUPTED = 130


def until_begun() -> None:
    """Let Ctrl-C end the process at once, with one line and `INTERRUPTED`, until `begin`; unless it is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _quit)


def _quit(_number: int, _frame: object) -> None:
    os.write(2, b"incbak: error: interrupted\n")
    os._exit(INTERRUPTED)


def begin() -> None:
    """Let it be a `KeyboardInterrupt` from here on, so that a command can clean up; if `until_begun` was called."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def over() -> None:
    """Ignore it: the exit code is known, and the process ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

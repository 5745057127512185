"""The entry point: what must be in order before anything else is imported.

Imports take some tenths of a second, and an interrupt within them would be a traceback in the midst of somebody else's
code. Nothing has been done by then, so Ctrl-C ends the process at once, until a command begins (`begin`).
"""

from __future__ import annotations

import os
import signal
from typing import Any, NoReturn

INTERRUPTED = 130


def _quit(_number: int, _frame: Any) -> None:
    os.write(2, b"incbak: error: interrupted\n")
    os._exit(INTERRUPTED)


def begin() -> None:
    """From here on Ctrl-C is a `KeyboardInterrupt`, so that a command can clean up; if it was `main` that started."""
    if signal.getsignal(signal.SIGINT) is _quit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def over() -> None:
    """The exit code is known: an interrupt while the process ends changes nothing."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def main() -> NoReturn:
    """The console script. Always raises `SystemExit`."""
    from incbak.cli.main import main as run

    run()


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or a program has imported this
    signal.signal(signal.SIGINT, _quit)

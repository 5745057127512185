"""Which signals end a command in an orderly way."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Number = signal.Signals

LOOK_SECONDS = 0.2
"""How long a main thread may wait before it looks whether a signal came. Its handler runs in that thread only, and a
signal that another thread takes, or that comes just before the wait, does not wake it."""


def ending() -> tuple[Number, ...]:
    """Return SIGINT, SIGTERM, and SIGHUP unless it is ignored: ``nohup`` means that the terminal may go."""
    hangup = () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)
    return (signal.SIGINT, signal.SIGTERM, *hangup)


def on_ending(call: Callable[[], object]) -> None:
    """Call ``call`` for each of them, instead of what is usual."""
    for number in ending():
        signal.signal(number, lambda *_: call())


def interrupt_on_ending() -> None:
    """Let each of them raise `KeyboardInterrupt`, as Ctrl-C does."""
    for number in ending():
        signal.signal(number, signal.default_int_handler)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let each of them raise `KeyboardInterrupt` within a context only."""
    before = {number: signal.getsignal(number) for number in ending()}
    interrupt_on_ending()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

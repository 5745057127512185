"""Other programs that are run: what they print is bounded in memory, and they are ended with what they have started.

A program may print anything: megabytes, bytes that are no text. It may end and leave a child behind that has inherited
its output: who reads until the end of the pipe then waits for that child. So what is printed is read until the program
itself ends, and no longer.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from types import FrameType
from typing import IO

KEPT = 1 << 20
"""Bytes that are kept of an output."""
_PIECE = 1 << 16
_DRAINED = 2 << 20
"""Bytes that are read after the end of a program: more than any pipe holds."""
_LOOK = 0.2
"""Seconds from one look for signals to the next."""
_PATIENCE = 5.0
"""Seconds from SIGTERM to SIGKILL."""


@dataclass(frozen=True)
class Ended:
    """How a program ended, and what it has printed."""

    code: int
    out: bytes
    err: bytes

    @property
    def said(self) -> str:
        """Its complaint as text."""
        return text(self.err).strip()


def text(data: bytes) -> str:
    """Return what a program has printed as text, whatever it is."""
    return data.decode(errors="backslashreplace")


def run(
    argv: Sequence[str],
    *,
    timeout: float | None = None,
    kept: int = KEPT,
    send: bytes = b"",
    out: int = subprocess.PIPE,
    err: int | None = subprocess.PIPE,
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    user: int | None = None,
    terminal: bool = False,
) -> Ended:
    """Run a program and wait until it ends; ``send`` goes to its standard input.

    It gets a session of its own unless it may use the ``terminal``. After ``timeout`` seconds, and on any exception, it
    is ended with all that are left of its group. ``user``: uid and gid that it gets. Raises
    `subprocess.TimeoutExpired`; `OSError` and `ValueError` where it cannot be started.
    """
    with _Held() as signals:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE if send else subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=env,
            pass_fds=pass_fds,
            start_new_session=not terminal,
            user=user,
            group=user,
            extra_groups=None if user is None else [],
        )
        try:
            return collect(process, timeout=timeout, kept=kept, send=send, look=signals.look)
        except BaseException:
            _end(process, group=not terminal)
            raise


def collect(
    process: subprocess.Popen[bytes],
    *,
    timeout: float | None = None,
    kept: int = KEPT,
    send: bytes = b"",
    look: Callable[[], None] = lambda: None,
) -> Ended:
    """Return how a process ended, and at most about ``kept`` bytes of each of its outputs, the first and the last.

    The rest is read and dropped, so that it never waits. ``look`` is called some times a second. Raises
    `subprocess.TimeoutExpired`, and what ``look`` raises; the process still runs then.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    outputs = {stream: _Kept(kept) for stream in (process.stdout, process.stderr) if stream}
    with ExitStack() as stack:
        selector = stack.enter_context(selectors.DefaultSelector())
        for stream in (*outputs, process.stdin):
            if stream:
                stack.callback(_close, stream)
                os.set_blocking(stream.fileno(), False)
        for stream in outputs:
            selector.register(stream, selectors.EVENT_READ)
        if process.stdin:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        ended = os.pidfd_open(process.pid)
        stack.callback(os.close, ended)
        selector.register(ended, selectors.EVENT_READ)
        rest = memoryview(send)
        while True:
            look()
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                assert timeout is not None
                raise subprocess.TimeoutExpired(process.args, timeout)
            for key, _ in selector.select(_LOOK if left is None else min(left, _LOOK)):
                if key.fileobj is process.stdin:
                    rest = _sent(process.stdin, rest)
                    if not rest:
                        selector.unregister(process.stdin)
                        _close(process.stdin)
                elif key.fd == ended:
                    for stream, output in outputs.items():
                        _drain(stream, output)
                    out, err = (outputs[s].data if s else b"" for s in (process.stdout, process.stderr))
                    return Ended(process.wait(), out, err)
                elif not _read(key.fd, outputs[key.fileobj]):  # type: ignore[index]
                    selector.unregister(key.fileobj)


class _Kept:
    """The first and the last half of what fits."""

    def __init__(self, size: int) -> None:
        self._half, self._head, self._total = size // 2, b"", 0
        self._tail: deque[bytes] = deque()
        self._behind = 0

    def add(self, piece: bytes) -> None:
        """Take one more piece."""
        self._total += len(piece)
        room = self._half - len(self._head)
        self._head += piece[:room]
        if rest := piece[room:]:
            self._tail.append(rest)
            self._behind += len(rest)
        while self._tail and self._behind - len(self._tail[0]) >= self._half:
            self._behind -= len(self._tail.popleft())

    @property
    def data(self) -> bytes:
        """What is kept, with a line that tells what is not."""
        tail = b"".join(self._tail)[-self._half :]
        if dropped := self._total - len(self._head) - len(tail):
            return self._head + f"\n... {dropped} bytes are left out ...\n".encode() + tail
        return self._head + tail


def _sent(stream: IO[bytes], rest: memoryview) -> memoryview:
    """Return what is still to be sent; nothing where nobody reads it any more."""
    try:
        return rest[os.write(stream.fileno(), rest[:_PIECE]) :]
    except BlockingIOError:
        return rest
    except BrokenPipeError:
        return rest[:0]


def _read(fd: int, output: _Kept) -> int:
    """Return how much was there; 0 at its end."""
    piece = os.read(fd, _PIECE)
    output.add(piece)
    return len(piece)


def _drain(stream: IO[bytes], output: _Kept) -> None:
    done = 0
    with suppress(BlockingIOError):
        while done < _DRAINED and (count := _read(stream.fileno(), output)):
            done += count


def _close(stream: IO[bytes]) -> None:
    with suppress(OSError):  # nothing is buffered in it
        stream.close()


def _end(process: subprocess.Popen[bytes], *, group: bool) -> None:
    """End a process, unless it was waited for: its id may be another's then."""
    if process.returncode is not None:
        return
    with ExitStack() as stack:
        try:
            ended = os.pidfd_open(process.pid)
        except OSError:  # no descriptor is left
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if group else process.kill()
            process.wait()
            return
        stack.callback(os.close, ended)
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number) if group else os.kill(process.pid, number)
            if select.select([ended], [], [], _PATIENCE)[0]:
                break
        if group:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # whoever has not heard SIGTERM
        with suppress(subprocess.TimeoutExpired):
            process.wait(_PATIENCE)


class _Held:
    """Signals that raise an exception raise it where a program is looked at, never while it is started or ended.

    A context of the main thread; in another one it does nothing, since signals interrupt only the main thread. What
    came and was not looked at is raised when the context is left.
    """

    def __init__(self) -> None:
        self._came: list[int] = []
        self._before: dict[int, Callable[[int, FrameType | None], object]] = {}

    def __enter__(self) -> _Held:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                handler = signal.getsignal(number)
                if callable(handler):
                    self._before[number] = handler
                    signal.signal(number, lambda came, _: self._came.append(came))
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        for number in self._came:
            signal.raise_signal(number)

    def look(self) -> None:
        """Handle what came; raises what a handler raises."""
        while self._came:
            number = self._came.pop(0)
            self._before[number](number, None)

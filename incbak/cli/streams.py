"""Standard streams that are there, and that fail no command which has something else to do.

A parent may have closed them (``>&-``, a daemon): then the next file that is opened would get the number 1 or 2, and
what is printed would go into it. So they are opened on ``/dev/null`` before anything else is.

Output may fail: a full disk, a reader that has gone. Where printing is what a command is for (``list``, ``show``) that
is an error. Where the work is another (``full``, ``restore``, ``serve``), the exit code says what was done; that the
output is lost is said on stderr, if that is there.
"""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO

CLOSED: set[int] = set()
"""Which of the standard descriptors were closed when the process began."""


class Descriptor(io.RawIOBase):
    """Writes to a descriptor. Unless ``strict``, what cannot be written is dropped; ``error`` is the first failure."""

    def __init__(self, fd: int, *, strict: bool) -> None:
        self._fd, self.strict = fd, strict
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, data: object, /) -> int:
        view = memoryview(data)  # type: ignore[arg-type]
        try:
            if self.error is None or self.strict:
                return os.write(self._fd, view)
        except OSError as e:
            self.error = self.error or e
            if self.strict:
                raise
        return view.nbytes


_stdout: Descriptor | None = None


def adopt() -> None:
    """Put `sys.stdout` and `sys.stderr` upon descriptors that are open. Once for each process."""
    global _stdout
    if _stdout is not None:
        return
    _open_all()
    _stdout, errors = Descriptor(1, strict=True), Descriptor(2, strict=False)
    sys.stdout = _text(_stdout, sys.stdout, line_buffering=os.isatty(1))
    sys.stderr = _text(errors, sys.stderr, line_buffering=True)


def _open_all() -> None:
    for fd in (0, 1, 2):  # in this order: the lowest number that is free is taken
        try:
            os.fstat(fd)
        except OSError:
            CLOSED.add(fd)
            os.open(os.devnull, os.O_RDWR)


def _text(raw: Descriptor, was: TextIO | None, *, line_buffering: bool) -> TextIO:
    """What cannot be encoded in the terminal's encoding is escaped, whatever it is."""
    encoding = getattr(was, "encoding", None) or "utf-8"
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", line_buffering=line_buffering
    )


def output_is_beside_the_point() -> None:
    """The command that runs has done its work whether or not its output can be written."""
    if _stdout is not None:
        _stdout.strict = False


def lost() -> OSError | None:
    """Drop what is still to be written and cannot be; the first error of standard output, if there was one."""
    if _stdout is None:
        return None
    output_is_beside_the_point()
    sys.stdout.flush()
    return _stdout.error

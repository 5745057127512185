"""A command on a terminal: what it draws there, and what is left in the end."""

from __future__ import annotations

import errno
import fcntl
import os
import pty
import struct
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.kit.cli import DEADLINE, Incbak


@dataclass(frozen=True)
class Shown:
    """``drawn``: all that was written to stderr, a terminal; ``out``: stdout, which is none."""

    code: int
    out: str
    drawn: str

    @property
    def frames(self) -> list[str]:
        """Each drawing of a line."""
        return [frame.rstrip() for frame in self.drawn.replace("\n", "\r").split("\r") if frame.strip()]

    @property
    def screen(self) -> list[str]:
        """The lines that stand there in the end."""
        lines, column = [""], 0
        for char in self.drawn:
            if char == "\r":
                column = 0
            elif char == "\n":
                lines.append("")
                column = 0
            else:
                line = lines[-1].ljust(column)
                lines[-1] = line[:column] + char + line[column + 1 :]
                column += 1
        return [line.rstrip() for line in lines if line.strip()]


def on_terminal(incbak: Incbak, *argv: str | Path, columns: int = 80, env: Mapping[str, str] | None = None) -> Shown:
    """Run a command with stderr on a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = incbak.popen(*argv, stderr=theirs, env={"TERM": "xterm", **(env or {})})
    os.close(theirs)
    drawn, deadline = b"", time.monotonic() + DEADLINE
    try:
        while time.monotonic() < deadline:
            try:
                part = os.read(ours, 65536)
            except OSError as e:
                if e.errno != errno.EIO:  # the other side is closed
                    raise
                break
            if not part:
                break
            drawn += part
    finally:
        os.close(ours)
    out, _ = process.communicate(timeout=DEADLINE)
    text = drawn.decode().replace("\r\n", "\n")
    assert "Traceback" not in text, text
    return Shown(process.returncode, out, text)

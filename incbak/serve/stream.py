"""Cutting a byte stream into JSON objects where the braces close: QMP clients need not send newlines."""

from __future__ import annotations

import re

MAX_BYTES = 1 << 20
MAX_DEPTH = 64

_STRUCTURE = re.compile(rb'["{}\[\]]')
_IN_STRING = re.compile(rb'["\\]')
_SPACE = b" \t\r\n"


class StreamError(Exception):
    """Bytes that cannot be the start of an object, or too many of them."""


class Splitter:
    """Feed bytes in, take whole objects out. Holds little more than `MAX_BYTES`; looks at each byte once."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._at = 0
        self._depth = 0
        self._quoted = False

    def feed(self, data: bytes) -> None:
        """Add what was received."""
        self._buffer += data

    def take(self) -> bytes | None:
        """The next whole object, or ``None`` when more bytes are needed.

        Raises `StreamError`; what has been received is then dropped, so that the caller may answer and go on.
        """
        if not self._at:
            del self._buffer[: len(self._buffer) - len(self._buffer.lstrip(_SPACE))]
        try:
            if self._buffer and self._buffer[0] != 0x7B:
                raise StreamError("expecting an object")
            end = self._scan()
            if max(end or 0, self._at) > MAX_BYTES:
                raise StreamError(f"longer than {MAX_BYTES} bytes")
        except StreamError:
            self._reset(len(self._buffer))
            raise
        if end is None:
            return None
        message = bytes(self._buffer[:end])
        self._reset(end)
        return message

    def _scan(self) -> int | None:
        """Where the object ends, if its end is here."""
        while match := (_IN_STRING if self._quoted else _STRUCTURE).search(self._buffer, self._at):
            byte = match[0]
            self._at = match.end()
            if byte == b"\\":
                if self._at == len(self._buffer):
                    self._at -= 1
                    return None
                self._at += 1
            elif byte == b'"':
                self._quoted = not self._quoted
            else:
                self._depth += 1 if byte in b"{[" else -1
                if self._depth > MAX_DEPTH:
                    raise StreamError("nested too deeply")
                if not self._depth:
                    return self._at
        self._at = len(self._buffer)
        return None

    def _reset(self, end: int) -> None:
        del self._buffer[:end]
        self._at = self._depth = 0
        self._quoted = False

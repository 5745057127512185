"""A blocking QMP client for tests: a second eye on the engine, with a deadline on everything."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import Any


class QmpFailed(Exception):
    """The peer answered with an error; ``error`` is its ``class: desc``."""


class Qmp:
    """One connection. Events are kept in ``events`` in order."""

    def __init__(self, path: Path, *, timeout: float = 20) -> None:
        self.events: list[dict[str, Any]] = []
        self._sock = socket.socket(socket.AF_UNIX)
        self._rest = b""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self._sock.settimeout(timeout)
                self._sock.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.02)
        self.greeting = self._next(timeout)
        self("qmp_capabilities")

    def __call__(self, command: str, timeout: float = 20, /, **arguments: Any) -> Any:
        """Run ``command``; underscores in argument names become dashes."""
        request = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._sock.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + timeout
        while True:
            message = self._next(deadline - time.monotonic())
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpFailed(f"{command}: {message['error']['class']}: {message['error']['desc']}")
            else:
                return message["return"]

    def wait_event(self, *names: str, timeout: float = 30) -> dict[str, Any]:
        """The first event of ``names`` not yet taken."""
        deadline = time.monotonic() + timeout
        while True:
            for i, event in enumerate(self.events):
                if event["event"] in names:
                    return self.events.pop(i)
            message = self._next(deadline - time.monotonic())
            if "event" in message:
                self.events.append(message)

    def _next(self, timeout: float) -> dict[str, Any]:
        deadline = time.monotonic() + timeout
        while b"\n" not in self._rest:
            self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
            data = self._sock.recv(1 << 20)
            if not data:
                raise ConnectionError("the monitor went away")
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Qmp:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

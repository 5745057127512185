"""A QMP session with a deadline on every wait."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import ConnectError

from incbak.errors import EngineError, UsageError

CONNECT_TIMEOUT = 10.0
COMMAND_TIMEOUT = 30.0

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)


class CommandError(EngineError):
    """The engine refused a command; ``error_class`` is QMP's."""

    code = "command"

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


def parse_address(text: str) -> str | tuple[str, int]:
    """A Unix socket's path, or (host, port), from what follows ``qmp:``. Raises `UsageError`."""
    host, colon, port = text.rpartition(":")
    if colon and port.isdigit() and "/" not in text:
        return host or "localhost", int(port)
    if not text or "/" not in text:
        raise UsageError(f"not a monitor: qmp:{text}", hint="Write qmp:/path/to/qmp.sock or qmp:HOST:PORT.")
    return text


class Session:
    """One connection to a monitor. Raises `EngineError` on every failure, with the command's name."""

    def __init__(self, client: QMPClient, name: str) -> None:
        self._client, self.name = client, name

    @classmethod
    async def connect(cls, address: str | tuple[str, int], timeout: float = CONNECT_TIMEOUT) -> Session:
        """Connect and negotiate. A monitor serves one client at a time: a busy one does not answer in time."""
        name = address if isinstance(address, str) else f"{address[0]}:{address[1]}"
        client = QMPClient("incbak")
        try:
            await asyncio.wait_for(client.connect(address), timeout)
        except TimeoutError:
            hint = (
                "It may be busy with another client, such as a management tool: try again, or give it another monitor."
            )
            raise EngineError(f"monitor {name} does not answer within {timeout:g} s", hint=hint) from None
        except (ConnectError, QMPError, OSError) as e:
            raise EngineError(f"cannot connect to monitor {name}: {_cause(e)}", hint="Is the VM running?") from e
        return cls(client, name)

    @property
    def is_unix(self) -> bool:
        """Whether descriptors can be passed."""
        return "/" in self.name

    async def execute(self, command: str, /, _timeout: float = COMMAND_TIMEOUT, **arguments: Any) -> Any:
        """Run a command; underscores in argument names become dashes. Raises `CommandError` or `EngineError`."""
        return await self.call(command, {k.replace("_", "-"): v for k, v in arguments.items()}, _timeout)

    async def call(self, command: str, arguments: Mapping[str, Any], timeout: float = COMMAND_TIMEOUT) -> Any:
        """Run a command with its arguments as they are."""
        try:
            execute = self._client.execute(command, cast("dict[str, object]", dict(arguments)) or None)
            return await asyncio.wait_for(execute, timeout)
        except TimeoutError:
            raise EngineError(f"monitor {self.name}: {command} did not return within {timeout:g} s") from None
        except ExecuteError as e:
            raise CommandError(f"{command}: {e.error.desc}", e.error.class_) from e
        except (QMPError, OSError) as e:
            raise EngineError(f"monitor {self.name} went away during {command}", hint="Is the VM still running?") from e

    async def pass_descriptor(self, sock: socket.socket | int, command: str, **arguments: Any) -> Any:
        """Send a descriptor along with the command that takes it (``getfd``, ``add-fd``); Unix monitors only."""
        try:
            self._client.send_fd_scm(sock if isinstance(sock, int) else sock.fileno())
        except (QMPError, OSError, ValueError) as e:
            raise EngineError(f"cannot pass a descriptor to monitor {self.name}: {e}") from e
        return await self.execute(command, **arguments)

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[EventListener]:
        """Listen for events of these names from now on."""
        with self._client.listener(names or None) as listener:
            yield listener

    async def close(self) -> None:
        """Disconnect; raises nothing."""
        try:
            await asyncio.wait_for(self._client.disconnect(), 5)
        except (QMPError, OSError, TimeoutError, asyncio.CancelledError, EOFError):
            pass


def _cause(e: BaseException) -> str:
    while e.__cause__ is not None:
        e = e.__cause__
    if isinstance(e, OSError) and e.strerror:
        return e.strerror
    return str(e) or type(e).__name__

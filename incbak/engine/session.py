"""A QMP session with a deadline on every wait.

A QEMU monitor serves one client at a time: while another is connected, ours gets no greeting. So `connect` waits for
the greeting until its deadline, and then says that the monitor is busy. Every command has a deadline too, since a
monitor that hangs must not hang a backup: `deadline`, not `asyncio.wait_for`, which in Python 3.11 forgets a
cancellation that comes with the answer. Failures are `EngineError`; those that QEMU reports are `CommandFailed`.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPError, Runstate, StateError

from incbak.engine.deadline import deadline
from incbak.engine.dial import connect_unix, is_agent_socket
from incbak.engine.qmp_client import BoundedClient, Heard
from incbak.engine.qmp_types import decoded
from incbak.errors import EngineError, UsageError

GREETING_SECONDS = 20.0
COMMAND_SECONDS = 60.0
_LONGEST_REASON = 2000


class CommandFailed(EngineError):
    """The engine answered a command with an error; ``error_class`` and ``description`` are its own words."""

    def __init__(self, command: str, error_class: str, description: str) -> None:
        super().__init__(f"{command}: {description}")
        self.error_class, self.description = error_class, description


class EngineGone(EngineError):
    """The connection to the engine ended."""

    retry = True


class EngineSilent(EngineError):
    """The engine did not answer within the deadline."""

    retry = True


@dataclass(frozen=True)
class Address:
    """Where a monitor listens: a Unix socket's ``path``, or ``host`` and ``port``."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Address:
        """From ``/run/x.qmp``, ``qmp:/run/x.qmp``, ``host:port`` or ``qmp:host:port``. Raises `UsageError`."""
        text = text.removeprefix("qmp:")
        host, colon, port = text.rpartition(":")
        if "/" not in text and colon and port.isdecimal():
            return cls(host=host.strip("[]") or "localhost", port=int(port))
        if not text:
            raise UsageError("the monitor's address is empty", hint="Write qmp:/path/of/socket or qmp:host:port.")
        return cls(path=text)

    @property
    def is_unix(self) -> bool:
        """Whether descriptors can be passed."""
        return bool(self.path)

    def __str__(self) -> str:
        return self.path or f"{self.host}:{self.port}"


class Session:
    """One connection to a monitor. Use from one event loop."""

    def __init__(self, address: Address, client: BoundedClient, sock: socket.socket) -> None:
        self.address = address
        self._client = client
        self._socket = sock
        self._listeners: list[EventListener] = []

    @classmethod
    async def connect(cls, address: Address, *, timeout: float = GREETING_SECONDS) -> Session:
        """Connect and negotiate. Raises `EngineError` when nobody listens, or the monitor is busy or silent."""
        sock = await asyncio.to_thread(_dial, address, timeout)
        held = sock.dup()  # asyncio owns the other; this one lives until close, for peers and guards
        client = BoundedClient()
        try:
            async with deadline(timeout):
                await client.connect(sock)
        except TimeoutError as e:
            held.close()
            raise EngineSilent(
                f"monitor {address} is busy: no greeting within {timeout:g} s",
                hint="A monitor serves one client at a time; give QEMU another -qmp socket, or end the other client.",
            ) from e
        except (QMPError, OSError) as e:
            held.close()
            raise EngineError(f"monitor {address}: {_cause(e)}", hint="Is it a QMP monitor, not a human one?") from e
        return cls(address, client, held)

    @property
    def greeting(self) -> Mapping[str, Any]:
        """What the engine said of itself on connecting."""
        greeting = self._client.greeting
        return greeting._asdict() if greeting else {}

    def duplicate(self) -> socket.socket:
        """A second descriptor of the connection, for a guard that outlives this process. The caller closes it."""
        return self._socket.dup()

    def peer_uid(self) -> int | None:
        """The user that the engine runs as, where the socket tells."""
        return self._peer()[1] if self.address.is_unix else None

    def peer_pid(self) -> int | None:
        """The process that made the socket, where it tells: the engine, or who passed the socket to it."""
        return self._peer()[0] if self.address.is_unix else None

    def _peer(self) -> tuple[int, int, int]:
        raw = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid, uid, gid = struct.unpack("3i", raw)
        return pid, uid, gid

    async def ended(self) -> None:
        """Wait until the engine has closed the connection."""
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()

    async def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = COMMAND_SECONDS
    ) -> Any:
        """Run a command and return its result, in the form that `incbak.engine.qmp_types` gives it.

        Raises `CommandFailed`, `EngineGone`, `EngineSilent`; or `EngineError` where the answer has another form.
        """
        try:
            async with deadline(timeout):
                answer = await self._client.execute(command, dict(arguments or {}))
        except ExecuteError as e:
            raise CommandFailed(command, e.error_class[:_LONGEST_REASON], str(e)[:_LONGEST_REASON]) from e
        except TimeoutError as e:
            raise EngineSilent(f"monitor {self.address}: no answer to {command} within {timeout:g} s") from e
        except (QMPError, OSError, EOFError) as e:
            raise EngineGone(f"monitor {self.address}: the engine went away during {command}") from e
        return decoded(command, answer)

    async def try_execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> bool:
        """Run a command whose refusal does not matter (cleaning up); whether it was done."""
        try:
            await self.execute(command, arguments)
        except CommandFailed:
            return False
        return True

    async def pass_fd(self, fd: int, command: str, arguments: Mapping[str, Any]) -> Any:
        """Run ``command`` with ``fd`` passed along; only on Unix sockets."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError, StateError) as e:
            raise EngineGone(f"monitor {self.address}: cannot pass a descriptor: {_cause(e)}") from e
        return await self.execute(command, arguments)

    def listen(self, *names: str) -> EventListener:
        """Events of these names from now on; `forget` it when done."""
        listener = Heard(names)
        self._client.register_listener(listener)
        self._listeners.append(listener)
        return listener

    def forget(self, listener: EventListener) -> None:
        """Stop listening."""
        if listener in self._listeners:
            self._listeners.remove(listener)
            self._client.remove_listener(listener)

    async def close(self) -> None:
        """Disconnect. The engine goes on."""
        for listener in list(self._listeners):
            self.forget(listener)
        with suppress(QMPError, OSError, EOFError, TimeoutError):
            async with deadline(5):
                await self._client.disconnect()
        self._socket.close()


def _dial(address: Address, timeout: float) -> socket.socket:
    try:
        if not address.is_unix:
            return socket.create_connection((address.host, address.port), timeout)
        sock = connect_unix(address.path, timeout)
    except TimeoutError as e:
        raise EngineSilent(f"monitor {address} is busy", hint="Other clients wait for it already.") from e
    except OSError as e:
        hint = "Is the VM running, and is this its QMP socket?"
        raise EngineError(f"cannot connect to monitor {address}: {e.strerror or e}", hint=hint) from e
    pid = _check_peer(sock, address)
    if is_agent_socket(address.path, pid):
        sock.close()
        raise UsageError(
            f"{address} is the socket of the guest agent, not a monitor",
            hint="Give the VM's -qmp socket as the source, and this one with --quiesce --agent-socket.",
        )
    return sock


def _check_peer(sock: socket.socket, address: Address) -> int:
    """A socket that somebody else has put there would be given our commands; root may talk to everybody's engines.

    Return the process that listens.
    """
    pid, uid, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if os.geteuid() not in (0, uid) and uid != 0:
        sock.close()
        raise EngineError(
            f"monitor {address} belongs to user {uid}, not to you", hint="Run incbak as that user or as root."
        )
    return int(pid)


def _cause(error: BaseException) -> str:
    inner = error.exc if isinstance(error, ConnectError) else error
    return str(inner) or type(inner).__name__

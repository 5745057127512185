"""The guest agent: freezes the guest's file systems around the point in time, so that they need no recovery.

The agent may be slow, hang, be missing, or still busy with what another client asked. So every answer has a deadline, a
``guest-sync`` with a random number skips what is not ours, and a backup whose guest could not be frozen is made all the
same, and says so. What was frozen is thawed in any case: here, or by the guard when this process is gone or stuck.

The agent is in the guest's hands. So whatever it sends, or does not send, is at most a reason why the guest was not
frozen: an answer has its form (`_Answer`), a line its length, and what is skipped its number. That the guest froze when
its agent says so is the guest's word.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import UNSET, Meta, UnsetType

from incbak.durable import crash_point, declare
from incbak.engine.deadline import deadline
from incbak.engine.qemu_guard import Guard
from incbak.errors import EngineError

log = logging.getLogger(__name__)

declare("agent.frozen")

SYNC_SECONDS = 5.0
FREEZE_SECONDS = 10.0
_THAW_SECONDS = 10.0
_LINE_LIMIT = 1 << 16
_MOST_SKIPPED = 1024
_LONGEST_REASON = 500


class _Refusal(msgspec.Struct, frozen=True):
    desc: str = "no reason given"


class _Answer(msgspec.Struct, frozen=True):
    """To any command that is used here; all of them return a number."""

    result: Annotated[int, Meta(ge=0, lt=1 << 31)] | UnsetType = msgspec.field(name="return", default=UNSET)
    error: _Refusal | UnsetType = UNSET


class Agent:
    """One connection to a guest agent's socket."""

    def __init__(self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._socket, self._reader, self._writer = sock, reader, writer

    @classmethod
    async def connect(cls, path: Path) -> Agent:
        """Connect and find the agent alive. Raises `EngineError`."""
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        try:
            async with deadline(SYNC_SECONDS):
                await asyncio.get_running_loop().sock_connect(sock, str(path))
                reader, writer = await asyncio.open_connection(sock=sock, limit=_LINE_LIMIT)
        except (OSError, TimeoutError) as e:
            sock.close()
            raise EngineError(f"cannot connect to guest agent {path}: {_text(e)}") from e
        agent = cls(sock.dup(), reader, writer)
        try:
            await agent._sync()
        except BaseException:
            await agent.close()
            raise
        return agent

    def duplicate(self) -> socket.socket:
        """A second descriptor, for the guard. The caller closes it."""
        return self._socket.dup()

    async def _sync(self) -> None:
        number = secrets.randbelow(1 << 31)
        with suppress(OSError):
            self._writer.write(b"\xff")  # ends what an earlier client has not finished
        async with self._asked("guest-sync", SYNC_SECONDS, {"id": number}):
            for _ in range(_MOST_SKIPPED):
                with suppress(msgspec.MsgspecError, RecursionError):  # the rest of what another client was answered
                    if _decoded(await self._line()).result == number:
                        return
            raise EngineError("the guest agent answers anything but guest-sync")

    async def _ask(self, command: str, timeout: float) -> int:
        async with self._asked(command, timeout):
            try:
                answer = _decoded(await self._line())
            except (msgspec.MsgspecError, RecursionError) as e:
                raise EngineError(f"{command}: the guest agent's answer cannot be read: {_text(e)}") from e
            if isinstance(answer.result, UnsetType):
                why = answer.error.desc if answer.error else "the guest agent's answer says nothing"
                raise EngineError(f"{command}: {why[:_LONGEST_REASON]}")
            return answer.result

    @asynccontextmanager
    async def _asked(
        self, command: str, timeout: float, arguments: dict[str, int] | None = None
    ) -> AsyncIterator[None]:
        """The command is sent; within, its answer is read."""
        request = {"execute": command} | ({"arguments": arguments} if arguments else {})
        try:
            async with deadline(timeout):
                self._writer.write(msgspec.json.encode(request) + b"\n")
                await self._writer.drain()
                yield
        except TimeoutError as e:
            raise EngineError(f"the guest agent did not answer {command} within {timeout:g} s") from e
        except EOFError as e:
            raise EngineError(f"the guest agent went away during {command}") from e
        except ValueError as e:  # of readline: the line is too long
            raise EngineError(f"{command}: the guest agent sends what is no answer") from e
        except OSError as e:
            raise EngineError(f"{command}: {_text(e)}") from e

    async def _line(self) -> bytes:
        """The next line that is not empty, from its last delimiter on. Raises `EOFError`."""
        for _ in range(_MOST_SKIPPED):
            line = await self._reader.readline()
            if not line:
                raise EOFError
            if found := line.rpartition(b"\xff")[2].strip():
                return found
        raise ValueError("the guest agent sends empty lines")

    async def freeze(self) -> int:
        """Freeze all file systems; how many there are."""
        return await self._ask("guest-fsfreeze-freeze", FREEZE_SECONDS)

    async def thaw(self) -> None:
        """Thaw them; an answer to a freeze that came late is skipped."""
        with suppress(EngineError):
            await self._sync()
        await self._ask("guest-fsfreeze-thaw", _THAW_SECONDS)

    async def close(self) -> None:
        """Disconnect."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
        self._socket.close()


@dataclass
class Frozen:
    """Whether the file systems were frozen all through the point in time (``None``: not asked for), and why not."""

    state: bool | None = None
    why: str = ""


@asynccontextmanager
async def connected(path: Path | None, frozen: Frozen) -> AsyncIterator[Agent | None]:
    """The agent, if one was asked for and is there."""
    agent = None
    if path is not None:
        frozen.state = False
        try:
            agent = await Agent.connect(path)
        except EngineError as e:
            frozen.why = str(e)
    try:
        yield agent
    finally:
        if agent:
            await agent.close()


@asynccontextmanager
async def frozen_inside(agent: Agent | None, guard: Guard, frozen: Frozen) -> AsyncIterator[None]:
    """The guest's file systems are frozen inside, where that can be had, and thawed afterwards, whatever happens."""
    if agent is None:
        yield
        return
    guard.freezing()
    try:
        try:
            frozen.state = await agent.freeze() > 0
            frozen.why = "" if frozen.state else "the agent has frozen no file system"
        except EngineError as e:
            frozen.why = str(e)
        crash_point("agent.frozen")
        yield
    finally:
        try:
            await agent.thaw()
            if not await guard.thawed():
                frozen.state, frozen.why = False, "the guest had to be thawed before all disks were set up"
        except EngineError as e:
            log.warning("the guard thaws the guest, since this failed: %s", e)


def _decoded(line: bytes) -> _Answer:
    return msgspec.json.decode(line, type=_Answer)


def _text(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__

"""The owner's end of the guard process: see `incbak.engine.guard`."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import IO

from incbak.engine import guard
from incbak.errors import EngineError

WINDOW_SECONDS = 8.0
FREEZE_SECONDS = 14.0  # from the first thought of freezing to the thaw
SILENCE_SECONDS = 15.0
_BEAT = 1.0
_ANSWER = 10.0
_LEAVE = 5.0


class GuardChannel:
    """A socket pair to a guard process that lives in a session of its own, so that a Ctrl-C does not reach it."""

    def __init__(
        self, mode: str, arguments: Sequence[str], pass_fds: Iterable[int] = (), errors: IO[bytes] | None = None
    ) -> None:
        self.ours, theirs = socket.socketpair()
        command = [sys.executable, "-I", "-S", guard.__file__, mode, str(theirs.fileno()), *arguments]
        try:
            fds = [theirs.fileno(), *pass_fds]
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stderr=errors, pass_fds=fds, start_new_session=True
            )
        except OSError as e:
            self.ours.close()
            raise EngineError(f"cannot start the guard process: {e.strerror}") from e
        finally:
            theirs.close()

    def close(self, timeout: float) -> int | None:
        """Let it end; its exit status, ``None`` if it had to be killed."""
        self.ours.close()
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return None

    def leave(self, timeout: float) -> None:
        """Let it go on alone; wait up to ``timeout`` for its end."""
        self.ours.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)


class Guard:
    """Watches over one run. Use as an async context manager; `stopped` around the time in which the VM is stopped."""

    def __init__(
        self, monitor: socket.socket, listeners: Sequence[socket.socket], agent: socket.socket | None = None
    ) -> None:
        """Takes over ``monitor``, ``listeners`` and ``agent``: they are closed here once the guard has them."""
        self._handed, handover = socket.socketpair()
        held = [monitor, handover, *listeners, *([agent] if agent else [])]
        try:
            options: list[object] = [monitor.fileno(), agent.fileno() if agent else -1, handover.fileno()]
            options += [WINDOW_SECONDS, FREEZE_SECONDS, SILENCE_SECONDS, *(sock.fileno() for sock in listeners)]
            self._channel = GuardChannel("watch", [str(x) for x in options], [sock.fileno() for sock in held])
        except BaseException:
            self._handed.close()
            raise
        finally:
            for sock in held:
                sock.close()
        self._channel.ours.settimeout(_ANSWER)
        self._stopped = False
        self._beating: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Guard:
        try:
            await self._answer(b"g")
        except BaseException:
            self._handed.close()
            self._channel.close(0)
            raise
        self._beating = asyncio.create_task(self._beat())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._beating:
            self._beating.cancel()
        self._handed.close()
        if self._stopped:  # and nothing says that it runs again: the guard stays until it does
            self._channel.leave(_LEAVE)
            return
        with suppress(OSError):
            self._channel.ours.send(b"q")
        self._channel.close(_LEAVE)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(_BEAT)
            with suppress(OSError):
                self._channel.ours.send(b"h", socket.MSG_DONTWAIT)

    async def accepted(self, number: int) -> socket.socket:
        """Return the connection that QEMU has made to listener ``number``. Wait for it; the caller has the deadline."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._handed.fileno(), readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(self._handed.fileno())
        which, fds, _, _ = socket.recv_fds(self._handed, 1, 1)
        if which != bytes([number]) or len(fds) != 1:
            raise EngineError("the guard process handed on another connection")
        return socket.socket(fileno=fds[0])

    def stopping(self) -> None:
        """Call it just before the VM is stopped."""
        self._stopped = True
        self._tell(b"s")

    async def running(self) -> bool:
        """Call it when the VM runs again; false if the guard had to resume it before that."""
        self._tell(b"c")
        answer = await self._answer(b"c", b"r")
        self._stopped = False
        return answer == b"c"

    def freezing(self) -> None:
        """Call it just before the guest's file systems are frozen."""
        self._tell(b"f")

    async def thawed(self) -> bool:
        """Call it when they are thawed; false if the guard had to thaw them before that."""
        self._tell(b"t")
        return await self._answer(b"t", b"r") == b"t"

    def _tell(self, byte: bytes) -> None:
        try:
            self._channel.ours.sendall(byte)
        except OSError as e:
            raise EngineError("the guard process is gone") from e

    async def _answer(self, *expected: bytes) -> bytes:
        try:
            answer = await asyncio.to_thread(self._channel.ours.recv, 1)
        except OSError as e:
            raise EngineError("the guard process does not answer") from e
        if answer not in expected:
            raise EngineError("the guard process did not start")
        return answer

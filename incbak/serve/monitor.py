"""The QMP monitor: several clients at once, on `qemu.qmp`'s own protocol classes; commands one at a time."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import cast

from qemu.qmp.message import Message
from qemu.qmp.protocol import AsyncProtocol, Runstate

from incbak.serve.commands import execute
from incbak.serve.commands.machine import version
from incbak.serve.schema import QmpError
from incbak.serve.stream import Splitter, StreamError
from incbak.serve.vm import Vm

log = logging.getLogger(__name__)

MAX_CLIENTS = 32
BACKLOG_LIMIT = 8 << 20
"""Bytes that a client may leave unread."""
_READ = 1 << 16

Run = Callable[[str, Mapping[str, object]], "asyncio.Future[object]"]


class Session(AsyncProtocol[Message]):
    """One client."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.logger = logging.getLogger("incbak.serve.monitor.session")
        self.logger.setLevel(logging.CRITICAL)
        self._run = run
        self._splitter = Splitter()
        self._negotiated = False
        self.answering = False

    async def _establish_session(self) -> None:
        greeting = {"QMP": {"version": version(), "capabilities": []}}
        self._do_send(Message(greeting))
        await super()._establish_session()

    async def _do_recv(self) -> Message:
        while True:
            try:
                raw = self._splitter.take()
                if raw is not None:
                    return Message(raw, eager=False)
            except StreamError as e:
                self.tell(_error(f"JSON parse error, {e}"))
                continue
            assert self._reader is not None
            data = await self._reader.read(_READ)
            if not data:
                raise EOFError
            self._splitter.feed(data)

    def _do_send(self, msg: Message) -> None:
        assert self._writer is not None
        if self._writer.transport.get_write_buffer_size() > BACKLOG_LIMIT:
            self._writer.transport.abort()
            raise ConnectionAbortedError("a monitor client does not read")
        self._writer.write(bytes(msg) + b"\r\n")

    async def _on_message(self, msg: Message) -> None:
        self.answering = True
        try:
            self.tell(await self._answer(msg))
        finally:
            self.answering = False

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def tell(self, body: Mapping[str, object]) -> None:
        """Queue a message for the client."""
        if self.runstate is Runstate.RUNNING:
            self._outgoing.put_nowait(Message(body))

    def tell_event(self, body: Mapping[str, object]) -> None:
        """Queue an event, once the client has negotiated."""
        if self._negotiated:
            self.tell(body)

    async def _answer(self, msg: Message) -> dict[str, object]:
        identity: dict[str, object] = {}
        try:
            try:
                given = json.loads(bytes(msg))
            except (ValueError, RecursionError) as e:
                raise QmpError("JSON parse error, invalid or unsupported text") from e
            if "id" in given:
                identity["id"] = given["id"]
            name, arguments = _parse(given)
            return {"return": await self._execute(name, arguments)} | identity
        except QmpError as e:
            return _error(e.message, e.cls) | identity

    async def _execute(self, name: str, arguments: Mapping[str, object]) -> object:
        if name == "qmp_capabilities":
            return self._negotiate(arguments)
        if not self._negotiated:
            raise QmpError("Expecting capabilities negotiation with 'qmp_capabilities'", cls="CommandNotFound")
        return await self._run(name, arguments)

    def _negotiate(self, arguments: Mapping[str, object]) -> object:
        if self._negotiated:
            raise QmpError("Capabilities negotiation is already complete, command ignored", cls="CommandNotFound")
        for extra in arguments:
            if extra != "enable":
                raise QmpError(f"Parameter '{extra}' is unexpected")
        if arguments.get("enable"):
            raise QmpError("This monitor has no capabilities to enable")
        self._negotiated = True
        return {}


def _error(text: str, cls: str = "GenericError") -> dict[str, object]:
    return {"error": {"class": cls, "desc": text}}


def _parse(given: Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """The command and its arguments. Raises `QmpError` with QEMU's texts."""
    for member in given:
        if member not in ("execute", "arguments", "id"):
            raise QmpError(f"QMP input member '{member}' is unexpected")
    if "execute" not in given:
        raise QmpError("QMP input lacks member 'execute'")
    name, arguments = given["execute"], given.get("arguments", {})
    if not isinstance(name, str):
        raise QmpError("QMP input member 'execute' must be a string")
    if not isinstance(arguments, dict):
        raise QmpError("QMP input member 'arguments' must be an object")
    return name, arguments


class Monitor:
    """Accepts clients, runs their commands in one thread of its own, tells them events. Lives in an asyncio loop."""

    def __init__(self, vm: Vm) -> None:
        self.vm = vm
        self._sessions: dict[Session, asyncio.Task[None]] = {}
        self._accepting: list[tuple[socket.socket, asyncio.Task[None]]] = []
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="command")
        self._loop = asyncio.get_running_loop()
        vm.listen(self._event)

    def add_listener(self, sock: socket.socket) -> None:
        """Accept on a socket that listens already."""
        sock.setblocking(False)
        self._accepting.append((sock, self._loop.create_task(self._accept(sock))))

    async def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _address = await self._loop.sock_accept(listener)
            except OSError as e:
                log.warning("cannot accept a monitor client: %s", e)
                await asyncio.sleep(0.1)
                continue
            if len(self._sessions) >= MAX_CLIENTS:
                sock.close()
                continue
            self.add_connection(sock)

    def add_connection(self, sock: socket.socket) -> None:
        """Serve one connected socket."""
        session = Session(self._submit)
        self._sessions[session] = self._loop.create_task(self._serve(session, sock))

    async def _serve(self, session: Session, sock: socket.socket) -> None:
        try:
            sock.setblocking(False)
            await session.connect(sock)
            while session.runstate is Runstate.RUNNING:
                await session.runstate_changed()
        except asyncio.CancelledError:
            pass
        except Exception as e:  # noqa: BLE001 (one client's trouble is no other's)
            log.debug("monitor client: %s", e)
        finally:
            with suppress(Exception):
                await session.disconnect()
            self._sessions.pop(session, None)

    def _submit(self, name: str, arguments: Mapping[str, object]) -> asyncio.Future[object]:
        return cast(
            "asyncio.Future[object]", self._loop.run_in_executor(self._worker, execute, self.vm, name, arguments)
        )

    def _event(self, event: str, data: dict[str, object]) -> None:
        """From any thread."""
        now = time.time_ns() // 1000
        stamp = {"seconds": now // 1_000_000, "microseconds": now % 1_000_000}
        body: dict[str, object] = {"timestamp": stamp, "event": event, "data": data}
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._broadcast, body)

    def _broadcast(self, body: dict[str, object]) -> None:
        for session in list(self._sessions):
            session.tell_event(body)

    async def close(self, timeout: float = 2.0) -> None:
        """Accept no more; let replies and events that are queued go out, at most ``timeout`` seconds."""
        for listener, task in self._accepting:
            task.cancel()
            listener.close()
        deadline = self._loop.time() + timeout
        while any(s.answering for s in self._sessions) and self._loop.time() < deadline:
            await asyncio.sleep(0.01)
        ending = [self._loop.create_task(self._end(s)) for s in list(self._sessions)]
        if ending:
            await asyncio.wait(ending, timeout=timeout)
        for task in self._sessions.values():
            task.cancel()
        self._worker.shutdown(wait=False, cancel_futures=True)

    async def _end(self, session: Session) -> None:
        with suppress(Exception):
            await session.disconnect()

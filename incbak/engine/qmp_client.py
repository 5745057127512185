"""The client library's QMP connection, with a bound on everything that a monitor can make it keep.

The library keeps every event for ever: in a queue of its own that nobody empties, and in each listener's history. A
guest that resets itself in a loop would fill the memory of whoever watches it. Here a listener keeps the newest events
up to a bound, and there is no history.
"""

from __future__ import annotations

import asyncio

import msgspec
from qemu.qmp import EventListener, Message, QMPClient
from qemu.qmp.error import ProtocolError

LONGEST_MESSAGE = 10 << 20
MOST_EVENTS = 1024


class Heard(EventListener):
    """Events of some names, the oldest first. When there are too many, the oldest are dropped; so it never gets empty
    but by who reads it."""

    def __init__(self, names: tuple[str, ...] = ()) -> None:
        super().__init__(names)
        self._queue = asyncio.Queue(MOST_EVENTS)

    async def put(self, event: Message) -> None:
        """Never waits."""
        if not self.accept(event):
            return
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(event)


class Deaf(EventListener):
    """Takes the place of the library's own listener, which hears everything and forgets nothing."""

    def accept(self, event: Message) -> bool:
        return False


class BoundedClient(QMPClient):
    """See the module's docstring. A message that cannot be one ends the connection."""

    def __init__(self) -> None:
        super().__init__("incbak", LONGEST_MESSAGE)
        self._listeners.clear()
        self.events = Deaf()

    async def _do_recv(self) -> Message:
        try:
            line = await self._readline()
            found = msgspec.json.decode(line)
        except (ValueError, RecursionError) as e:  # of readline: the line is too long
            raise ProtocolError(f"a message of the monitor cannot be read: {e}") from e
        if not isinstance(found, dict) or not isinstance(found.get("id", ""), str):
            raise ProtocolError("a message of the monitor is not one of QMP")
        if not isinstance(found.get("event", ""), str) or not isinstance(found.get("data", {}), dict):
            raise ProtocolError("an event of the monitor is not one of QMP")
        found.setdefault("data", {})
        return Message(found, eager=False)

    def _cb_inbound(self, msg: Message) -> Message:
        """The library writes each message out for its log."""
        return msg

    _cb_outbound = _cb_inbound

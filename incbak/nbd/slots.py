"""How many clients a server has at once, and who has to give way.

An idle client occupies a slot, and its half-sent payload occupies memory. So strangers and readers could keep a guest
from reconnecting to its disk. The rules:

- Local clients and those over TCP have slots of their own: a crowd on the network takes none from the local guest.
- When all slots for TCP are taken, a new client gets the slot of the one that has been negotiating for longest.
- When all slots are taken, a new client gets the slot of the one that has been silent for longest (at least `PATIENCE`
  seconds) within a payload or on a read-only export. A writer between two requests keeps its slot: it is an idle guest.
- The half-sent payloads of all clients together are bounded; beyond that, clients that are silent within one go.
"""

from __future__ import annotations

import math
import socket
import threading
import time
from contextlib import suppress

PATIENCE = 10.0
HALF_SENT = 256 << 20
"""Bytes of payloads that have not come whole, above which who is silent within one is dropped."""
_ENDING = 2.0


class Slot:
    """One client's. The connection notes here what it waits for; written by its thread only."""

    __slots__ = ("began", "half", "heard", "reader", "sock", "tcp", "thread")

    def __init__(self, sock: socket.socket, thread: threading.Thread, tcp: bool) -> None:
        self.sock, self.thread, self.tcp = sock, thread, tcp
        self.began = time.monotonic()
        self.heard = math.inf
        """When something last came from it, in transmission; until then it negotiates."""
        self.reader = False
        self.half = 0
        """Bytes that have come of a payload that has not come whole."""

    def silent(self, now: float) -> float:
        """Return for how many seconds nothing has come that is due: 0 where nothing is due."""
        return max(now - self.heard, 0.0) if self.half or self.reader else 0.0


class Slots:
    """Of one server: ``most`` of each kind."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = threading.Lock()
        self._taken: dict[socket.socket, Slot] = {}

    def __len__(self) -> int:
        with self._lock:
            return len(self._taken)

    def all(self) -> list[Slot]:
        """Return the clients that are connected now."""
        with self._lock:
            return list(self._taken.values())

    def enter(self, sock: socket.socket, thread: threading.Thread, *, bounded: bool = True) -> Slot | None:
        """Return a slot for a new client, or ``None`` when there is none. Another client may be dropped for it."""
        slot = Slot(sock, thread, sock.family in (socket.AF_INET, socket.AF_INET6))
        with self._lock:
            alike = [s for s in self._taken.values() if s.tcp == slot.tcp]
            victim = None
            if bounded and len(alike) >= self.most:
                victim = _who_gives_way(alike)
                if victim is None:
                    return None
                del self._taken[victim.sock]
            self._taken[sock] = slot
        if victim:
            _drop(victim)
            if victim.thread.ident:
                victim.thread.join(_ENDING)
        return slot

    def leave(self, sock: socket.socket) -> None:
        """Free the slot of a connection that has ended."""
        with self._lock:
            self._taken.pop(sock, None)

    def relieve(self) -> None:
        """Drop clients that are silent within a payload, if too much is half-sent: call it before a large payload."""
        held = self.all()
        if sum(slot.half for slot in held) > HALF_SENT:
            now = time.monotonic()
            for slot in held:
                if slot.half and slot.silent(now) >= PATIENCE:
                    _drop(slot)


def _who_gives_way(slots: list[Slot]) -> Slot | None:
    now = time.monotonic()
    if negotiating := [s for s in slots if s.tcp and s.heard == math.inf]:
        return min(negotiating, key=lambda s: s.began)
    longest = max(slots, key=lambda s: s.silent(now), default=None)
    return longest if longest and longest.silent(now) >= PATIENCE else None


def _drop(slot: Slot) -> None:
    """End the connection; its thread finds that out."""
    with suppress(OSError):
        slot.sock.shutdown(socket.SHUT_RDWR)

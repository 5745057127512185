"""How many clients a server has at once, and who has to give way.

A client that does nothing costs a slot, and its half-sent payload memory. So strangers and readers could keep a guest
from coming back to its disk. The rules:

- Local clients and those over TCP have slots of their own: a crowd on the network takes none from the local guest.
- Where all slots for TCP are taken, a newcomer gets the slot of whoever has negotiated for longest.
- Where all slots are taken, a newcomer gets that of who has been silent for longest (`PATIENCE` seconds at least)
  within a payload or on a read-only export. A writer between two requests keeps its slot: it is a guest, and idle.
- Half-sent payloads of all clients together have a bound; beyond it those that are silent go.
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
        """For how long nothing came that was due: 0 where nothing is."""
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
        """The clients there are now."""
        with self._lock:
            return list(self._taken.values())

    def enter(self, sock: socket.socket, thread: threading.Thread, *, bounded: bool = True) -> Slot | None:
        """A slot for a newcomer, or ``None`` when there is none. Somebody else may be dropped for it."""
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
        """Its connection has ended."""
        with self._lock:
            self._taken.pop(sock, None)

    def relieve(self) -> None:
        """A large payload begins to come: drop who is silent within another, where there is too much of that."""
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
    """Its thread finds the connection ended."""
    with suppress(OSError):
        slot.sock.shutdown(socket.SHUT_RDWR)

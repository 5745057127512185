"""The gate of a disk: many writers pass at once, or one drainer has the disk to itself.

A big-reader lock. Each writer that often passes has a `Slot`, a lock that nobody else wants, which costs tens of
nanoseconds; the drainer takes all of them. Writers that cannot use a slot (a pool's thread while the slot's owner is
inside) join by counting, which costs more and needs no preparation.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from incbak.errors import IncbakError


class DrainTimeoutError(IncbakError):
    """A write in flight did not end in time; nothing was changed, and writers go on."""

    code = "drain-timeout"
    retry = True


class Gate:
    """Whoever is inside a slot or `joined` finishes before `drained` is entered; nobody enters until it is left.

    Not reentrant, neither way: a thread inside must not enter again, nor drain.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._slots: list[threading.Lock] = []
        self._mutex = threading.Lock()
        self._changed = threading.Condition(self._mutex)
        self._draining = False
        self._inside = 0
        self._shut: AbstractContextManager[None] | None = None

    def slot(self) -> threading.Lock:
        """A lock of the caller's own: hold it while writing; ``acquire(blocking=False)`` fails while drained."""
        lock = threading.Lock()
        with self._changed:
            self._changed.wait_for(lambda: not self._draining)
            self._slots.append(lock)
        return lock

    def forget(self, slot: threading.Lock) -> None:
        """The caller of `slot` needs it no more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._draining)
            self._slots.remove(slot)

    @contextmanager
    def joined(self) -> Iterator[None]:
        """Be inside without a slot; waits while the gate is drained."""
        with self._changed:
            self._changed.wait_for(lambda: not self._draining)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                if not self._inside:
                    self._changed.notify_all()

    def while_quiet(self, act: Callable[[], None]) -> None:
        """Call ``act`` if nobody is inside or draining. A writer with a slot may enter meanwhile, a drainer not.

        This is on the path of every write, so it takes no detour by the condition.
        """
        with self._mutex:
            if self._draining or self._inside:
                return
            for slot in self._slots:
                if slot.locked():
                    return
            act()

    @contextmanager
    def drained(self, timeout: float = 30.0) -> Iterator[None]:
        """Nobody is inside, and nobody gets in until this is left. Raises `DrainTimeoutError` after ``timeout`` s.

        One drainer at a time; a second one waits for the first.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            if not self._changed.wait_for(lambda: not self._draining, timeout):
                raise self._late()
            self._draining = True
        held: list[threading.Lock] = []
        try:
            self._take_all(held, deadline)
            yield
        finally:
            for lock in held:
                lock.release()
            with self._changed:
                self._draining = False
                self._changed.notify_all()

    def shut(self, timeout: float = 30.0) -> None:
        """Drain, and let nobody in ever again. Raises `DrainTimeoutError`; then the gate is open as before."""
        self._shut = self.drained(timeout)
        self._shut.__enter__()

    def _take_all(self, held: list[threading.Lock], deadline: float) -> None:
        for lock in self._slots:
            if not lock.acquire(timeout=max(deadline - time.monotonic(), 0)):
                raise self._late()
            held.append(lock)
        with self._changed:
            if not self._changed.wait_for(lambda: not self._inside, max(deadline - time.monotonic(), 0)):
                raise self._late()

    def _late(self) -> DrainTimeoutError:
        return DrainTimeoutError(
            f"disk {self.name}: a write in flight does not end", hint="Look at the storage under it."
        )


@contextmanager
def drain_all(gates: Iterable[Gate], timeout: float = 30.0) -> Iterator[None]:
    """Drain several gates, always in the same order, so that two drainers cannot wait for each other."""
    with ExitStack() as stack:
        for gate in sorted(set(gates), key=lambda g: (g.name, id(g))):
            stack.enter_context(gate.drained(timeout))
        yield

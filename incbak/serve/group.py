"""Jobs that complete together, or not at all: ``completion-mode: grouped`` of a transaction.

Each job is in a group, mostly alone, and asks it twice: `gather` after its work, until all the others have done theirs,
and `decide` before its outcome counts. The decision is one for all: while any member may still fail or be cancelled,
nothing of any of them counts; once it is made, nothing can undo it. So the bitmaps of a group are either all as after
a success, or all as after a failure.
"""

from __future__ import annotations

import threading
from typing import Protocol


class Member(Protocol):
    """What a group needs to know of a job."""

    @property
    def auto_finalize(self) -> bool:
        """Whether the job waits for nobody's word before its outcome counts."""

    def abandon(self) -> None:
        """Another member has failed: stop soon. Called from any thread, perhaps more than once."""


class JobGroup:
    """Safe for many threads. All members have joined before the first of them starts."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._members: list[Member] = []
        self._gathered = 0
        self._finalized = self._failed = self._decided = False

    def join(self, member: Member) -> None:
        """One more; without its word nobody's outcome counts."""
        self._members.append(member)

    def gather(self) -> bool:
        """A member has done its work: wait for the work of all. False when one of them failed."""
        with self._changed:
            self._gathered += 1
            if self._gathered == len(self._members) and all(m.auto_finalize for m in self._members):
                self._finalized = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._failed or self._gathered == len(self._members))
            return not self._failed

    def finalize(self) -> None:
        """Somebody's word for one member is for all, as in QEMU."""
        with self._changed:
            self._finalized = True
            self._changed.notify_all()

    def decide(self) -> bool:
        """Wait for `finalize`; whether the outcome of all counts. The first to ask decides, once and for all."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._finalized)
            self._decided = self._decided or not self._failed
            return self._decided

    def fail(self, member: Member) -> None:
        """A member failed or was cancelled: none counts. Without effect once it is decided otherwise."""
        with self._changed:
            if self._decided or self._failed:
                return
            self._failed = True
            self._changed.notify_all()
        for other in self._members:
            if other is not member:
                other.abandon()

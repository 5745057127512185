"""Everything in a transaction happens at one instant, on all its disks, or nothing does.

1. `Action.prepare`, in order, beside the guest: checks, and whatever takes time (a bitmap's file created, preallocated
   and synced; a scratch file; a connection). A later action sees what an earlier one prepared.
2. The disks of all actions are drained: no write is in flight, new ones wait.
3. `Action.apply`, in order: pointers are swapped, bits copied. If one fails, those before it are undone in reverse.
4. The disks' settled maps are replaced, and the guest goes on.
5. `Action.finish`, beside the guest: jobs start, files of removed bitmaps go. Or, after a failure anywhere,
   `Action.discard` in reverse: what was prepared goes.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from incbak import durable
from incbak.serve.gate import drain_all
from incbak.serve.group import JobGroup
from incbak.serve.memory_bitmap import AnyBitmap
from incbak.serve.schema import QmpError
from incbak.serve.tracker import TrackedDisk
from incbak.serve.vm import Vm, inconsistent

log = logging.getLogger(__name__)

durable.declare("serve.transaction-prepared", "serve.transaction-applied", "serve.transaction-finished")

DRAIN_TIMEOUT = 30.0
"""Seconds that a transaction waits for writes in flight before it fails."""


class Action:
    """One step. Every method may be left out; ``disks`` are those that must be drained."""

    disks: Sequence[TrackedDisk] = ()
    grouped = False
    """Whether it may be in a transaction of ``completion-mode: grouped``."""

    def prepare(self, transaction: Transaction) -> None:
        """Check, and do what takes time. Raises `IncbakError`; then `discard` is not called for this action."""

    def apply(self) -> None:
        """Change what is in force; quick. Raises only what `undo` can put right."""

    def undo(self) -> None:
        """The reverse of `apply`, also of one that failed half way; must not raise."""

    def finish(self) -> None:
        """The transaction has happened; must not raise."""

    def discard(self) -> None:
        """It has not: undo `prepare`; must not raise."""


class Transaction:
    """What is being prepared: the VM as it will be, for the checks of later actions."""

    def __init__(self, vm: Vm, *, grouped: bool = False) -> None:
        """With ``grouped`` the jobs that it starts complete together or not at all."""
        self.vm = vm
        self.group = JobGroup() if grouped else None
        self._coming: dict[tuple[str, str], AnyBitmap | None] = {}

    def find(self, tracked: TrackedDisk, name: str) -> AnyBitmap | None:
        """The bitmap ``name`` as it will be when the actions so far have been applied."""
        key = (tracked.name, name)
        return self._coming[key] if key in self._coming else tracked.bitmaps.get(name)

    def bitmap(self, tracked: TrackedDisk, name: str) -> AnyBitmap:
        """As `find`. Raises `QmpError` when there is none, or its file may not be believed."""
        found = self.find(tracked, name)
        if found is None and name in self.vm.lost[tracked.name]:
            raise inconsistent(name)
        if found is None:
            raise QmpError(f"Dirty bitmap '{name}' not found")
        return found

    def will_have(self, tracked: TrackedDisk, name: str, bitmap: AnyBitmap | None) -> None:
        """Note a bitmap that comes, or (``None``) goes."""
        self._coming[tracked.name, name] = bitmap

    def run(self, actions: Sequence[Action]) -> None:
        """Do them all. Raises what stopped it; then nothing has happened."""
        prepared: list[Action] = []
        try:
            for action in actions:
                action.prepare(self)
                prepared.append(action)
            durable.crash_point("serve.transaction-prepared")
            self._commit(actions)
        except BaseException:
            for action in reversed(prepared):
                action.discard()
            raise
        durable.crash_point("serve.transaction-applied")
        for action in actions:
            action.finish()
        durable.crash_point("serve.transaction-finished")

    def _commit(self, actions: Sequence[Action]) -> None:
        disks = {id(d): d for a in actions for d in a.disks}.values()
        old: list[object] = []
        with drain_all([d.gate for d in disks], DRAIN_TIMEOUT):
            begun: list[Action] = []
            try:
                for action in actions:
                    begun.append(action)
                    action.apply()
            except BaseException:
                for action in reversed(begun):
                    action.undo()
                raise
            finally:
                old += [d.refresh() for d in disks]
        old.clear()


class Abort(Action):
    """Fails, to test that the others then have not happened."""

    grouped = True

    def prepare(self, transaction: Transaction) -> None:
        raise QmpError("Transaction aborted using Abort action")

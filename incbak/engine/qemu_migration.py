"""Nodes that keep a migration from being completed while a backup has filters in QEMU.

At the end of a migration the source hands its disks over by making every node inactive, and fails, with the guest going
on at the source, where a node still has to be written. QEMU 7.2 does not see that of a backup that reads a
snapshot-access node: it passes over nodes with an active parent, the job's own filter is nobody's device, and so the
whole chain below stays active and locked. The migration is said to be completed, the destination cannot have the
disks, and the guest runs nowhere (measured: 4 of 4).

So for the time of a run there is one more copy-before-write filter, on nothing: its target has to be written at any
time, it belongs to no other node, and the migration fails as it does beside QEMU's own backup jobs. Usually it does not
come to that: `incbak.engine.run_state` sees the migration before it ends, and the run gives way.

====  ============================================================
Nn    a null node, which the filter filters
No    a null node, the filter's target
Nm    the filter
====  ============================================================
"""

from __future__ import annotations

import logging

from incbak.engine.session import CommandFailed, Session

log = logging.getLogger(__name__)

_SIZE = 65536


class MigrationBlocker:
    """The nodes of one run; ``prefix`` is in front of their names."""

    def __init__(self, session: Session, prefix: str) -> None:
        self._session, self._prefix = session, prefix
        self._nodes: list[str] = []

    async def add(self) -> None:
        """Add them. They touch no disk, so this is safe beside I/O threads."""
        for letter in "no":
            await self._add(letter, {"driver": "null-co", "size": _SIZE})
        file, target = (self._prefix + letter for letter in "no")
        await self._add("m", {"driver": "copy-before-write", "file": file, "target": target})

    async def _add(self, letter: str, options: dict[str, object]) -> None:
        await self._session.execute("blockdev-add", {"node-name": self._prefix + letter, **options})
        self._nodes.append(self._prefix + letter)

    async def remove(self) -> None:
        """Remove what was added, as far as QEMU answers; call it when all filters are gone."""
        while self._nodes:
            node = self._nodes.pop()
            try:
                await self._session.execute("blockdev-del", {"node-name": node})
            except CommandFailed as e:
                log.warning("node %s: %s", node, e)

"""Which image a disk is: two images are never one disk, nor two disks one name; and what holds its bytes is compared.

What that is, and what of it is compared, is in `incbak.backup.facts`. It is kept in the record, and has to be the same
when the record would be a base; and it has to be the same when a run commits as when it began.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from incbak.backup.facts import (
    Facts,
    Leaf,
    Looked,
    Part,
    Peer,
    are_one,
    are_same,
    facts_of,
    is_known,
    leaves,
    settled,
    without_ctime,
)
from incbak.backup.opened import opened_of
from incbak.disk.stacking import key_of, share_bytes
from incbak.engine.base import BitmapInfo, Description, EngineDisk
from incbak.errors import ImageChangedError, UsageError
from incbak.reasons import Reason
from incbak.repo.record import Record

_NO_UUID = "00000000-0000-0000-0000-000000000000"


class Now(Protocol):
    """What `unproven` has to know of the disks as they are: see `Sources`."""

    @property
    def backing(self) -> Mapping[str, Facts]:
        """Of what is below."""

    @property
    def data(self) -> Mapping[str, Facts]:
        """Of data files."""

    @property
    def trusted(self) -> Collection[str]:
        """What is not looked at."""


class Sources:
    """What a run found of its disks, before it read anything. ``off``: nobody has them open.

    ``backing`` and ``data``: of each disk what `incbak.backup.facts` says of what is below it, and of its data files.
    ``trusted``: the names below that never change, and ``ctime``: whether it is compared, as their owner says.
    """

    def __init__(
        self, description: Description, *, off: bool, trusted: Collection[str] = (), ctime: bool = True
    ) -> None:
        self._off, self._ctime, self.trusted = off, ctime, frozenset(trusted)
        self._leaves = {d.name: leaves(description, d.node) for d in description.disks}
        self._peer = Peer(description.peer, [leaf.name for each in self._leaves.values() for leaf in each])
        _check_bytes(self._leaves, self._peer)
        self.opened = {} if off else opened_of(description, self._peer)
        self._seen = settled(self._look)
        self.backing, self.data = self._part(Part.BELOW), self._part(Part.DATA)

    def _look(self) -> Looked:
        return {name: [(leaf, facts_of(leaf, self._peer)) for leaf in each] for name, each in self._leaves.items()}

    def _part(self, part: Part) -> dict[str, Facts]:
        found = {name: [facts for leaf, facts in each if leaf.part is part] for name, each in self._seen.items()}
        return {name: facts if self._ctime else without_ctime(facts) for name, facts in found.items() if facts}

    def now(self) -> dict[str, Any]:
        """Return what a plan has to know of it."""
        seen = {"backing": self.backing, "opened": self.opened, "data": self.data}
        return {**seen, "held": self._peer.open, "trusted": self.trusted}

    def notes(self) -> list[str]:
        """Return what is below the disks and not known: with it, every backup reads its disk whole."""
        unknown = [(n, each[0]) for n, f in self.backing.items() for each in f if not is_known([each], self.trusted)]
        text = "disk {} is always read whole: nothing is known of what is below it: {}; "
        text += "if that never changes, say so with --trust-backing"
        return [text.format(name, what) for name, what in unknown]

    def confirm(self) -> None:
        """Raise `ImageChangedError` where another program wrote to a file since.

        What a running engine writes to itself is not looked at.
        """
        now = self._look()
        for name, seen in self._seen.items():
            for (leaf, before), (_, after) in zip(seen, now[name], strict=True):
                if self._written(leaf, before, after):
                    hint = "Find out which program has it open (fuser, lsof), and run again when it has ended."
                    raise ImageChangedError(f"another program wrote to {leaf.name} while it was read", hint=hint)

    def _written(self, leaf: Leaf, before: list[Any], after: list[Any]) -> bool:
        if self._off and self._ctime:
            return before != after
        is_still = self._off or (leaf.part is Part.BELOW and leaf.read_only)
        return is_still and without_ctime([before]) != without_ctime([after])

    def config(self) -> dict[str, Any]:
        """What the record keeps of it."""
        kept = {"backing": self.backing, "opened": self.opened, "data": self.data}
        return {name: facts for name, facts in kept.items() if facts}


def unproven(disk: EngineDisk, record: Record, bitmap: BitmapInfo | None, now: Now) -> Reason | None:
    """Return why a base says nothing of what the disk holds elsewhere than in its image: see `incbak.backup.facts`."""
    below, data = now.backing.get(disk.name, []), now.data.get(disk.name, [])
    before = recorded(record, "backing", disk.name)
    if not are_same(before, below, now.trusted):
        moved_only = are_same(without_ctime(before), without_ctime(below), now.trusted)
        return Reason.UNPROVEN if moved_only else Reason.BACKING_CHANGED
    if not is_known(below, now.trusted):
        return Reason.UNPROVEN
    before = recorded(record, "data", disk.name)
    if not data or bitmap is None:
        return None
    if len(before) != len(data) or (bitmap.persistent and not is_known(data)):
        return Reason.UNPROVEN
    if bitmap.persistent:
        return None if are_same(before, data) else Reason.DISK_CHANGED
    return None if are_one(before, data) else Reason.DISK_CHANGED


def recorded(record: Record, what: str, disk: str) -> list[Any]:
    """Return what the record's configuration says of ``disk`` under ``what``; it may hold anything."""
    facts = record.config.get(what)
    found = facts.get(disk) if isinstance(facts, dict) else None
    return list(found) if isinstance(found, list | tuple) else []


def check_names(description: Description) -> None:
    """Raise `UsageError` where two disks have one name."""
    nodes: dict[str, str] = {}
    for disk in description.disks:
        if disk.name in nodes:
            what = f"two disks are called {disk.name!r}: nodes {nodes[disk.name]} and {disk.node}"
            raise UsageError(what, hint="Give each -drive and each -device an id that no other one has.")
        nodes[disk.name] = disk.node


def _check_bytes(disks: Mapping[str, Sequence[Leaf]], peer: Peer) -> None:
    """Raise `UsageError` where two disks have bytes in common, as a device and its partition: each bitmap lacks writes.

    What is below them is looked at by `unproven`: nobody writes there.
    """
    found = {
        name: [key_of(looked[1]) for leaf in each if leaf.part is not Part.BELOW and (looked := peer.look(leaf.name))]
        for name, each in disks.items()
    }
    if both := share_bytes(found):
        hint = "What the guest writes to one of them is not recorded for the other: give the VM one of them only."
        raise UsageError(f"disks {both[0]} and {both[1]} have bytes in common", hint=hint)


def contradictions(vm: str, description: Description, records: Sequence[Record]) -> list[str]:
    """What speaks against the source being the VM ``vm``: the name and UUID that the monitor says.

    Once a backup has been made under the name all the same, it speaks for it; but see `other_names`.
    """
    found, last = [], records[-1].config if records else {}
    name, ident = description.config.get("name"), description.config.get("uuid")
    if name and name != vm and name != last.get("name"):
        found.append(f"the monitor says that the VM is called {name!r}, not {vm!r}")
    before = last.get("uuid")
    if ident and before and ident != before and _NO_UUID not in (ident, before):
        found.append(f"the newest backup of {vm} is of the VM with UUID {before}, the monitor is of {ident}")
    return found


def other_names(
    vm: str, description: Description, backups: Sequence[Record], host: str, only: Sequence[str]
) -> list[str]:
    """Return what speaks against the name ``vm``: the newest backup under another one that is of the same source.

    The name that the monitor says is never wrong here. Another name is, however often it was used, while the repository
    has backups of a disk of this source (``only``: the disks that were chosen, if any) under a third one: each run
    under one name replaces the bitmaps of the other. The source is known by its UUID, else by its name and host.
    """
    if vm == description.config.get("name"):
        return []
    disks = {d.name for d in description.disks if not only or d.name in only}
    for record in reversed(backups):
        if record.vm != vm and _same_source(description, record, host) and any(record.disk(name) for name in disks):
            what = f"backup {record.id[:8]} of {record.vm!r} is of the same VM as what is now called {vm!r}"
            return [f"{what}; the next incremental of {record.vm!r} has to read everything"]
    return []


def _same_source(description: Description, record: Record, host: str) -> bool:
    name, ident = description.config.get("name"), description.config.get("uuid")
    before = record.config.get("uuid")
    if ident and before and _NO_UUID not in (ident, before):
        return bool(ident == before)
    return bool(name) and name == record.config.get("name") and host == record.host


def other_images(description: Description, records: Sequence[Record], host: str, *, claimed: bool = False) -> list[str]:
    """Return what speaks against an image being the disk of the newest backup: that is another one, and still there.

    An image that was moved is not there any more; a chain of a running VM has a new top after each snapshot: this is
    for images that are off. Raises `UsageError` instead unless it is ``claimed``: a full backup, which builds on
    nothing, under a name given with ``--name``.
    """
    images: Mapping[str, Any] = description.config.get("images", {})
    found = []
    for disk in description.disks:
        record = next((r for r in reversed(records) if r.disk(disk.name)), None)
        before, now = _image(record, disk.name) if record else "", str(images.get(disk.name, ""))
        if record and record.host == host and before.startswith("/") and _are_two(Path(before), Path(now)):
            what = f"disk {disk.name} of {record.vm} is {before} in the newest backup, and {now} is another image"
            hint = "Name its VM with --name, or the disk with --disk (also if it takes the other one's place)."
            if not claimed:
                raise UsageError(what, hint=hint)
            found.append(f"{what}; if both are disks of the VM, name them with --disk")
    return found


def _image(record: Record, disk: str) -> str:
    images = record.config.get("images", {})
    return str(images.get(disk, "")) if isinstance(images, dict) else ""


def _are_two(before: Path, now: Path) -> bool:
    try:
        return not os.path.samestat(before.stat(), now.stat())
    except OSError:
        return False

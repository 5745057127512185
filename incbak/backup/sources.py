"""Which image a disk is: two images are never one disk, nor two disks one name, and what lies below is compared.

An overlay shows the guest what its backing files hold, and no bitmap marks a change of those. So their names, sizes,
inodes and times of change are kept in the record, and compared with what they are when the record would be a base.
Their ``ctime`` is not: managers of VMs change the owner of backing files at each start. A backing file that this host
cannot look at is compared by its name only.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from incbak.engine.base import Description
from incbak.errors import ImageChangedError, UsageError
from incbak.repo.record import Record

Facts = list[list[Any]]
"""One entry for each file, from the top: path, size, inode, time of change; and for a run, ctime."""
_DEEPEST = 200
_NO_UUID = "00000000-0000-0000-0000-000000000000"


class Sources:
    """What a run found of its disks, before it read anything. ``off``: nobody has them open."""

    def __init__(self, description: Description, *, off: bool) -> None:
        self.backing = backing_of(description)
        self._files = {d.name: _files(description, d.node) for d in description.disks} if off else {}
        self._before = self._now()

    def _now(self) -> dict[str, Facts]:
        return {name: [_facts(path, whole=True) for path in paths] for name, paths in self._files.items()}

    def confirm(self) -> None:
        """Raise `ImageChangedError` where another program wrote to a file since."""
        now = self._now()
        for name, before in self._before.items():
            if before != now[name]:
                changed = next(b[0] for b, n in zip(before, now[name], strict=True) if b != n)
                hint = "Find out which program has it open (fuser, lsof), and run again when it has ended."
                raise ImageChangedError(f"another program wrote to {changed} while it was read", hint=hint)

    def config(self) -> dict[str, Any]:
        """What the record keeps of it."""
        return {"backing": self.backing} if self.backing else {}


def backing_of(description: Description) -> dict[str, Facts]:
    """Of each disk that has any: its backing files, from the top."""
    found = {d.name: [_facts(p) for p in _files(description, d.node)[1:]] for d in description.disks}
    return {name: facts for name, facts in found.items() if facts}


def _files(description: Description, node: str) -> list[str]:
    """The paths of an image and its backing files."""
    blocks: dict[str, Any] = {b["node"]: b for b in description.config.get("blocks", ())}
    paths: list[str] = []
    while node in blocks and len(paths) < _DEEPEST:
        block = blocks[node]
        children = block.get("children", {})
        below = children.get("backing")
        if below is None and "file" in children and "backing" in blocks.get(children["file"], {}).get("children", {}):
            node = children["file"]  # a filter
            continue
        paths.append(str(block.get("file", "")))
        node = below
    return paths


def _facts(path: str, *, whole: bool = False) -> list[Any]:
    if not path.startswith("/"):
        return [path]
    try:
        info = os.stat(path)
    except OSError:
        return [path]
    return [path, info.st_size, info.st_ino, info.st_mtime_ns, *([info.st_ctime_ns] if whole else [])]


def check_names(description: Description) -> None:
    """Raise `UsageError` where two disks have one name."""
    nodes: dict[str, str] = {}
    for disk in description.disks:
        if disk.name in nodes:
            what = f"two disks are called {disk.name!r}: nodes {nodes[disk.name]} and {disk.node}"
            raise UsageError(what, hint="Give each -drive and each -device an id that no other one has.")
        nodes[disk.name] = disk.node


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

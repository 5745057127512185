"""Which disks of a VM are watched, where their images are, and what tells their state."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from incbak import device, host, times
from incbak.bitmap.identity import RAW
from incbak.bitmap.owner import Owner
from incbak.bitmap.settle import settled
from incbak.bitmap.store import BitmapStore
from incbak.disk.locks import writer_present
from incbak.disk.stacking import Key, key_of
from incbak.engine.base import EngineDisk, LeftOut
from incbak.engine.qemu_disks import find_disks
from incbak.engine.qemu_graph import Graph, read_graph, unguarded
from incbak.engine.qemu_storing import why_in_memory
from incbak.engine.session import Session
from incbak.errors import DiskError, LockedError
from incbak.fingerprint import Fingerprint, of_content, take_path, without_ctime
from incbak.opening import open_image
from incbak.watch.claim import Claim

LOCK_SECONDS = 15.0
"""How long the watch of the VM's last run may take to save."""
_PROTOCOLS = ("file", "host_device")
_SETTLE_SECONDS = 10.0


@dataclass(frozen=True)
class Watched:
    """A disk whose bitmaps are in QEMU's memory only. ``format``: of its image; ``key``: which file or device that is.

    ``ignore_ctime``: see `incbak.bitmap.continuity`.
    """

    name: str
    node: str
    size: int
    image: Path
    key: Key
    format: str
    store: BitmapStore
    ignore_ctime: bool = False
    claim: Claim = field(default_factory=Claim)

    @property
    def raw(self) -> bool:
        """Whether what the image holds is what the guest sees."""
        return self.format == RAW

    def is_replaced(self) -> bool:
        """Return whether the image's name leads to another file or device now. Raises `OSError`."""
        return key_of(self.image.stat()) != self.key

    def seen(self) -> Fingerprint:
        """Of the image, which may be open elsewhere; with the size of the *disk*. Raises `DiskError` or `OSError`."""
        found = take_path(self.image, raw=self.raw)
        return found if self.raw else of_content(found, self.size)

    def fingerprint(self) -> Fingerprint:
        """Return what is recorded of it, as `seen`: a manager of VMs may move the ctime at each start and end."""
        return without_ctime(self.seen()) if self.ignore_ctime else self.seen()

    def settle(self) -> None:
        """Bring what was written as far down as it shows in a `fingerprint`."""
        device.settle(self.image)

    def settled(self) -> Fingerprint:
        """Return the fingerprint when any later write shows in it. Raises `DiskError` if a program keeps writing."""
        found, shows = settled(self, _SETTLE_SECONDS)
        if not shows:
            hint = "Find out which program has it open (fuser, lsof)."
            raise DiskError(f"another program keeps writing to {self.image}", hint=hint)
        return found

    def sync(self) -> None:
        """What was written to the image is on its storage. Raises `OSError`."""
        fd = open_image(self.image, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


async def find_watched(
    session: Session, state_dir: Path, vm: str, *, ignore_ctime: bool = False
) -> tuple[list[Watched], list[LeftOut]]:
    """The disks to watch, their stores not yet locked; and why the others are not."""
    graph = await read_graph(session)
    devices = await session.execute("query-block")
    disks, left_out = find_disks(devices, graph, await unguarded(session, devices))
    found: list[Watched] = []
    for disk in disks:
        image = _image_of(disk, graph)
        if isinstance(image, str):
            left_out.append(LeftOut(disk.name, image))
            continue
        form = RAW if disk.format in _PROTOCOLS else disk.format
        store = BitmapStore(state_dir, vm, disk.name)
        try:
            key = key_of(await asyncio.to_thread(image.stat))
        except OSError as e:
            left_out.append(LeftOut(disk.name, f"its image cannot be read here: {e}"))
            continue
        watched = Watched(disk.name, disk.node, disk.size, image, key, form, store, ignore_ctime)
        if why := await asyncio.to_thread(_unusable, watched, session.peer_pid()):
            left_out.append(LeftOut(disk.name, why))
            continue
        found.append(watched)
    return found, left_out


def _image_of(disk: EngineDisk, graph: Graph) -> Path | str:
    """The one file or block device that the disk is, or why there is none."""
    if disk.can_persist:
        return "its image stores its bitmaps itself"
    if why := why_in_memory(disk):
        return why
    node, seen = disk.node, {disk.node}
    while graph.nodes[node]["drv"] not in _PROTOCOLS:
        below = [(edge, child) for (parent, edge), child in graph.edges.items() if parent == node]
        if len(below) != 1 or below[0][0] != "file" or below[0][1] in seen or below[0][1] not in graph.nodes:
            return "its image is not one file or block device of this host"
        node = below[0][1]
        seen.add(node)
    path = str(graph.nodes[node].get("file", ""))
    if not path.startswith("/") or path.startswith("/dev/fdset/"):
        return "QEMU was not given its image by an absolute path"
    return Path(path)


def _unusable(disk: Watched, pid: int | None) -> str:
    """Nothing of an image is read before it is known to be QEMU's: QEMU may name any file."""
    if not (pid and _has_open(pid, disk.image)) and not _locked(disk):
        return f"nothing shows that QEMU has this {disk.image} open: it takes no locks, and its files are not seen"
    try:
        found = disk.fingerprint()
    except (DiskError, OSError) as e:
        return f"its image cannot be read here: {e}"
    if not times.are_kept(disk.image):
        return f"nothing shows who writes to {disk.image}: its file system may not keep times of change"
    if found.size != disk.size:
        return f"the image has {found.size} bytes, the disk has {disk.size}"
    return ""


async def lock_store(disk: Watched) -> None:
    """Own the bitmap files of ``disk``, and its image. Raises `LockedError` when somebody else does for long."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            _lock(disk)
            break
        except LockedError:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(0.1)
    disk.store.note_image(disk.image, disk.format)


def _lock(disk: Watched) -> None:
    disk.claim.take(disk.image)
    try:
        disk.store.lock(Owner.WATCH)
    except BaseException:
        disk.claim.leave()
        raise


def unlock_stores(disks: Iterable[Watched]) -> None:
    """Let others have them."""
    for disk in disks:
        disk.store.unlock()
        disk.claim.leave()


class Holder:
    """The process that has the images open. Made while it certainly has."""

    def __init__(self, pid: int | None, disks: Sequence[Watched]) -> None:
        self.pid = pid if pid and all(_has_open(pid, d.image) for d in disks) else None
        self._started = host.start_time(self.pid) if self.pid else None
        self._unlocked = [d.name for d in disks if not _locked(d)]

    def why_not_told(self) -> str:
        """Why nobody could tell when the images are closed, or ""."""
        if self.pid or not self._unlocked:
            return ""
        return f"nothing tells when QEMU has closed {', '.join(self._unlocked)}: it takes no locks, and is not seen"

    async def gone(self, disks: Sequence[Watched], timeout: float) -> bool:
        """Wait until it has closed all images. Where it is not seen, that is when nobody has them open for writing."""
        deadline = time.monotonic() + timeout
        while self._has_any(disks) if self.pid else any(_locked(d) for d in disks):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(0.01)
        return True

    def _has_any(self, disks: Sequence[Watched]) -> bool:
        assert self.pid
        return host.start_time(self.pid) == self._started and any(_has_open(self.pid, d.image) for d in disks)


def _locked(disk: Watched) -> bool:
    with suppress(OSError):
        return writer_present(str(disk.image))
    return True


def _has_open(pid: int, image: Path) -> bool:
    try:
        wanted = image.stat()
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(fd.stat(), wanted):
                    return True
    except OSError:
        pass
    return False

"""An image that nobody has open, other than raw: a private qemu-storage-daemon reads it, and keeps bitmaps in it.

The daemon opens the image read-only, which keeps others from writing it, and copies. Only when the backup exists it
opens the image for writing, adds the new bitmap, removes the old ones and stores them: nothing was written meanwhile.
So a run that dies leaves the image and its bitmaps as they were. An image that is not to be written (see
`incbak.engine.private_daemon`) is backed up whole each time, and stays as it is to the last byte.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from incbak.bitmap.remembered import remember_format
from incbak.engine.base import BitmapInfo, Description, DiskPlan, EngineDisk, run_of
from incbak.engine.end_mark import add_end_mark
from incbak.engine.private_daemon import NODE, PROGRAM, Daemon, Image, Writable
from incbak.engine.qemu_disks import holds_bitmaps, layout
from incbak.engine.session import Session
from incbak.engine.storage_daemon import StorageDaemonEngine, backup_of, disk_of
from incbak.errors import DiskError, EngineError, FormatError


class OfflineEngine(StorageDaemonEngine):
    """One image in a private daemon; see the module's docstring. Owns the session and the daemon."""

    kind = "image"

    def __init__(self, session: Session, daemon: Daemon, image: Image, state_dir: Path, speed: int = 0) -> None:
        super().__init__(session, speed)
        self._daemon, self._image, self._state_dir = daemon, image, state_dir

    @classmethod
    async def open(cls, image: Image, state_dir: Path, speed: int = 0) -> OfflineEngine:
        """Start the daemon. Raises `DiskError`, `ImageInUseError` or `EngineError`."""
        await asyncio.to_thread(image.check)
        daemon = Daemon(image)
        try:
            return cls(await daemon.connect(), daemon, image, state_dir, speed)
        except BaseException:
            daemon.close()
            raise

    async def describe(self) -> Description:
        graph = await self._graph()
        node = graph.nodes[NODE]
        disk = replace(disk_of(self._image.disk, NODE, graph), can_persist=holds_bitmaps(node))
        notes: tuple[str, ...] = () if disk.can_persist else (f"a {self._image.format} image cannot store bitmaps",)
        if disk.can_persist and (why := await asyncio.to_thread(self._image.unwritable)):
            disk = replace(disk, can_persist=False)
            notes = (f"no bitmap is stored in image {self._image.path}: {why}",)
        self._check_alone(node["image"].get("backing-filename", ""))
        notes = (*notes, *((self._image.note,) if self._image.note else ()))
        version = (await self._session.execute("query-version"))["qemu"]
        engine = f"{PROGRAM} {version['major']}.{version['minor']}.{version['micro']}"
        config = {"images": {disk.name: str(self._image.path)}, "format": self._image.format, "blocks": layout(graph)}
        return Description(self._image.vm, (disk,), engine, config, (), notes)

    def _check_alone(self, backing: str) -> None:
        """The chains of other formats than qcow2 are not followed, so half of the disk would be missing."""
        image = self._image
        if backing and image.format != "qcow2":
            hint = f"Convert it: qemu-img convert -O qcow2 {image.path} NEW"
            raise FormatError(f"{image.path} is a {image.format} image with a backing file: {backing}", hint=hint)

    async def bitmaps(self) -> list[tuple[EngineDisk, BitmapInfo]]:
        return [(disk, bitmap) for disk in (await self.describe()).disks for bitmap in disk.bitmaps]

    async def remove_bitmaps(self, bitmaps: Sequence[tuple[EngineDisk, str]]) -> None:
        await asyncio.to_thread(self._image.check)
        if why := await asyncio.to_thread(self._image.unwritable):
            raise DiskError(f"nothing is removed from image {self._image.path}: {why}")
        async with self._writable():
            await super().remove_bitmaps(bitmaps)

    async def cleanup(self, prefix: str, keep: Collection[str]) -> list[str]:
        (disk,) = (await self.describe()).disks
        strays = [b for b in disk.bitmaps if b.name.startswith(prefix) and run_of(b.name) not in keep]
        if not disk.can_persist or not strays:
            return []
        async with self._writable():
            return await super().cleanup(prefix, keep)

    async def _begin(self, jobs: Mapping[str, DiskPlan]) -> None:
        ((ident, plan),) = jobs.items()
        await self._session.execute("blockdev-backup", backup_of(ident, plan, self._speed))

    async def confirm(self) -> None:
        """Raise `ImageInUseError` where another process can write the image by now."""
        await asyncio.to_thread(self._image.check)

    async def commit(self, plans: Sequence[DiskPlan]) -> None:
        (plan,) = plans
        image = self._image
        await asyncio.to_thread(remember_format, self._state_dir, image.vm, image.disk, image.path, image.format)
        if not plan.disk.can_persist:
            return
        async with self._writable():
            add = {"node": NODE, "name": plan.new_bitmap, "granularity": plan.granularity, "persistent": True}
            await self._session.execute("block-dirty-bitmap-add", add)
            await add_end_mark(self._session, plan, 0, persistent=True)
            await super().commit(plans)

    async def rollback(self, plans: Sequence[DiskPlan]) -> None:
        """The new bitmap is not there before `commit`."""

    def _writable(self) -> Writable:
        return Writable(self._session, self._image)

    async def close(self) -> None:
        with suppress(EngineError):
            await self._session.execute("quit", timeout=5)
        await self._session.close()
        await asyncio.to_thread(self._daemon.close)

"""A qemu-storage-daemon of our own around one image that nobody has open, and how that image becomes writable.

A node that is to be written is opened for writing, never reopened into it: QEMU repairs an image when it opens it for
writing, and does not when a read-only node is reopened. So `Writable` removes the read-only node and adds another, and
looks before: at the header, which must be neither dirty nor corrupt, at who else has the image open, and at whether the
file is what it was when the daemon opened it, since for that moment nobody locks it.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from incbak import host
from incbak.disk import qcow2
from incbak.disk.users import find_users, refuse_writers
from incbak.engine.qemu_graph import Graph
from incbak.engine.qemu_guard import GuardChannel
from incbak.engine.session import Address, Session
from incbak.errors import DiskError, EngineError, ImageInUseError
from incbak.private import PrivateDirectory

PROGRAM = "qemu-storage-daemon"
NODE, FILE = "disk", "file"
DEFAULT_DISK = "disk0"
_START_SECONDS = 30.0
_STORE_SECONDS = 120.0


class Image:
    """An image file, and what it is called in the repository."""

    def __init__(self, path: Path, form: str, vm: str, disk: str = DEFAULT_DISK) -> None:
        self.path, self.format, self.vm, self.disk = path, form, vm, disk
        self._seen, self._daemon = "", -1

    def started(self, daemon: int) -> None:
        """The process ``daemon`` and its children have the image open for us."""
        self._daemon = daemon

    def check(self) -> None:
        """Raise `DiskError` where the image must not even be read, `ImageInUseError` where another may write it."""
        refuse_writers(self.path, (self._daemon,))
        if self.format == "qcow2" and qcow2.Feature.CORRUPT & (header := qcow2.read_header(self.path)).features:
            raise DiskError(f"image {self.path} is damaged: {header.unwritable()}", hint=qcow2.repair_hint(self.path))

    def unwritable(self) -> str:
        """Why nothing may be written to the image, or an empty string."""
        if self.format == "qcow2" and (why := qcow2.read_header(self.path).unwritable()):
            return f"{why}; {qcow2.repair_hint(self.path)}"
        return find_users(self.path, (self._daemon,)).unwritable()

    def look(self) -> None:
        """Remember the image's times and size (of a device, the kernel's count of writes) for `changed`."""
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether the image was written, replaced or resized since `look`."""
        return self._seen != self._state()

    def _state(self) -> str:
        found = os.stat(self.path)
        times = f"{found.st_mtime_ns}:{found.st_ctime_ns}" if not self.path.is_block_device() else ""
        return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{times}:{host.device_writes(self.path)}"

    def node(self, read_only: bool) -> dict[str, Any]:
        """The format node."""
        return {"driver": self.format, "node-name": NODE, "read-only": read_only, "file": FILE}


class Writable:
    """The image is open for writing inside; afterwards its bitmaps are stored, or the end raises `EngineError`."""

    def __init__(self, session: Session, image: Image) -> None:
        self._session, self._image = session, image

    async def __aenter__(self) -> None:
        await self._session.execute("blockdev-del", {"node-name": NODE}, timeout=_STORE_SECONDS)
        try:
            await asyncio.to_thread(self._look_again)
            await self._add(read_only=False)
        except BaseException:
            with suppress(EngineError):
                await self._add(read_only=True)
            raise

    def _look_again(self) -> None:
        if why := self._image.unwritable():
            raise DiskError(f"nothing is written to image {self._image.path}: {why}")
        if self._image.changed():
            raise ImageInUseError(f"nothing is written to image {self._image.path}: another process has changed it")

    async def __aexit__(self, *_: object) -> None:
        """Store the bitmaps: unlike the removal of a node, this says whether it worked."""
        options = self._image.node(read_only=True) | await self._children()
        await self._session.execute("blockdev-reopen", {"options": [options]}, timeout=_STORE_SECONDS)
        self._image.look()

    async def _add(self, *, read_only: bool) -> None:
        await self._session.execute("blockdev-add", self._image.node(read_only), timeout=_STORE_SECONDS)

    async def _children(self) -> dict[str, str]:
        """The nodes below the image's, which stay as they are."""
        graph = await self._session.execute("x-debug-query-block-graph")
        nodes = await self._session.execute("query-named-block-nodes", {"flat": True})
        edges = Graph.of(nodes, graph).edges
        return {edge: child for edge in ("backing", "data-file") if (child := edges.get((NODE, edge)))}


class Daemon:
    """A private qemu-storage-daemon that does not outlive its owner, whatever happens to that."""

    def __init__(self, image: Image) -> None:
        self._image = image
        if shutil.which(PROGRAM) is None:
            raise DiskError(
                f"{image.path} is a {image.format} image, and {PROGRAM} is not installed",
                hint="Install it (Debian: qemu-system-common), or convert the image to raw.",
            )
        self._private = PrivateDirectory()
        self._directory = self._private.path
        try:
            driver = "host_device" if image.path.is_block_device() else "file"
            file = {"driver": driver, "node-name": FILE, "filename": str(image.path), "auto-read-only": True}
            chardev = f"socket,id=qmp,server=on,wait=off,path={self._directory}/qmp"
            command = [PROGRAM, "--chardev", chardev, "--monitor", "chardev=qmp"]
            for node in (file, image.node(read_only=True)):
                command += ["--blockdev", json.dumps(node)]
            with (self._directory / "log").open("wb") as errors:
                self._channel = GuardChannel("child", command, errors=errors)
            image.started(self._channel.process.pid)
        except BaseException:
            self._private.close()
            raise

    async def connect(self) -> Session:
        """Its monitor, once it is there. Raises what the daemon said if it ended."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        path = self._directory / "qmp"
        while True:
            if self._channel.process.poll() is not None:
                raise self._failure()
            if path.exists():
                with suppress(EngineError):
                    session = await Session.connect(Address(path=str(path)))
                    self._image.look()
                    return session
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(f"{PROGRAM} did not start within {_START_SECONDS:g} s")
            await asyncio.sleep(0.01)

    def _failure(self) -> DiskError:
        said = (self._directory / "log").read_text(errors="replace").strip()
        why = said.rpartition("}: ")[2].partition("\n")[0] or "no reason given"
        if " lock" in why:
            hint = "If a VM uses it, give its monitor (qmp:...) instead."
            return ImageInUseError(f"image {self._image.path} is in use: {why}", hint=hint)
        return DiskError(f"cannot open image {self._image.path}: {why}")

    def close(self) -> None:
        """End it and wait for that; it stores bitmaps on its way out."""
        self._channel.close(_STORE_SECONDS)
        self._private.close()

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
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any

from incbak import device
from incbak.disk import qcow2
from incbak.disk.chain import Allowed, Layer, read_chain
from incbak.disk.users import find_users, refuse_writers
from incbak.engine.qemu_guard import GuardChannel
from incbak.engine.session import Address, Session
from incbak.errors import DiskError, EngineError, ImageInUseError
from incbak.private import PrivateDirectory

PROGRAM = "qemu-storage-daemon"
NODE, FILE, _DATA = "disk", "file", "data"
_WITH_BACKING = ("qcow2", "qed", "vmdk")
DEFAULT_DISK = "disk0"
_START_SECONDS = 30.0
_STORE_SECONDS = 120.0


class Image:
    """An image, its name in the repository, and what is below it. ``note``: of how its format is known."""

    def __init__(
        self,
        path: Path,
        form: str,
        vm: str,
        disk: str = DEFAULT_DISK,
        allowed: Allowed | None = None,
        note: str = "",
    ) -> None:
        self.path, self.format, self.vm, self.disk, self.note = path, form, vm, disk, note
        self._layers = read_chain(path, allowed or Allowed()) if form == "qcow2" else [Layer(path, form)]
        self._seen: list[str] = []
        self._daemon = -1

    def started(self, daemon: int) -> None:
        """The process ``daemon`` and its children have the image open for us."""
        self._daemon = daemon

    def check(self) -> None:
        """Raise `DiskError` where the image must not even be read, `ImageInUseError` where another may write it."""
        for path in self._paths():
            refuse_writers(path, (self._daemon,))
        for path in (layer.path for layer in self._layers if layer.format == "qcow2"):
            if qcow2.Feature.CORRUPT & (header := qcow2.read_header(path)).features:
                raise DiskError(f"image {path} is damaged: {header.unwritable()}", hint=qcow2.repair_hint(path))

    def unwritable(self) -> str:
        """Why nothing may be written to the image, or an empty string."""
        if self.format == "qcow2" and (why := qcow2.read_header(self.path).unwritable()):
            return f"{why}; {qcow2.repair_hint(self.path)}"
        return find_users(self.path, (self._daemon,)).unwritable()

    def look(self) -> None:
        """Remember what every file and device of the image tells (times and size, counts of writes) for `changed`."""
        self._seen = self._state()

    def changed(self) -> bool:
        """Whether one of them was written, replaced or resized since `look`."""
        return self._seen != self._state()

    def _state(self) -> list[str]:
        return [_state(path) for path in self._paths()]

    def _paths(self) -> list[Path]:
        """Every file and device of the image and its backing files that holds bytes of the disk."""
        return [path for layer in self._layers for path in (layer.path, layer.data) if path]

    def nodes(self) -> list[dict[str, Any]]:
        """Every node of the image when it is opened for reading, the lowest first; nothing is left to be guessed."""
        found = []
        for n, layer in reversed(list(enumerate(self._layers))):
            found.append(_file_node(layer.path, _name(FILE, n), read_only=n > 0))
            if layer.data:
                found.append(_file_node(layer.data, _name(_DATA, n), read_only=n > 0))
            found.append(self._format_node(n, read_only=True))
        return found

    def node(self, read_only: bool) -> dict[str, Any]:
        """The uppermost node, above those that stay as they are."""
        return self._format_node(0, read_only)

    def _format_node(self, n: int, read_only: bool) -> dict[str, Any]:
        layer = self._layers[n]
        node = {"driver": layer.format, "node-name": _name(NODE, n), "read-only": read_only, "file": _name(FILE, n)}
        if layer.format in _WITH_BACKING:
            node["backing"] = _name(NODE, n + 1) if n + 1 < len(self._layers) else None
        return node | ({"data-file": _name(_DATA, n)} if layer.data else {})


def _state(path: Path) -> str:
    found = os.stat(path)
    is_device = stat.S_ISBLK(found.st_mode)
    told = device.settled(path) if is_device else f"{found.st_mtime_ns}:{found.st_ctime_ns}"
    return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{told}"


def _name(kind: str, n: int) -> str:
    return f"{kind}{n}" if n else kind


def _file_node(path: Path, name: str, *, read_only: bool) -> dict[str, Any]:
    """``read_only``: else it becomes writable when the node above it is."""
    driver = "host_device" if path.is_block_device() else "file"
    mode = "read-only" if read_only else "auto-read-only"
    return {"driver": driver, "node-name": name, "filename": os.path.abspath(path), mode: True}


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
        options = self._image.node(read_only=True)
        await self._session.execute("blockdev-reopen", {"options": [options]}, timeout=_STORE_SECONDS)
        await asyncio.to_thread(self._image.look)

    async def _add(self, *, read_only: bool) -> None:
        await self._session.execute("blockdev-add", self._image.node(read_only), timeout=_STORE_SECONDS)


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
            chardev = f"socket,id=qmp,server=on,wait=off,path={self._directory}/qmp"
            command = [PROGRAM, "--chardev", chardev, "--monitor", "chardev=qmp"]
            for node in image.nodes():
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
                    await asyncio.to_thread(self._image.look)
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

"""Our end of the worker: asks for volumes, directories and files, serves the disk, and believes nothing unchecked."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Generator
from typing import Protocol

import msgspec

from incbak.errors import DamagedError, DiskError, UsageError
from incbak.files import messages as m
from incbak.files.messages import Node, Piece, Volume

MEMORY = 1 << 30
"""Bytes of address space of the worker."""
_NAME = 1 << 12
_KINDS = frozenset({"file", "directory", "symlink", "char", "block", "pipe", "socket", "other", "unreadable"})
_TIMES = 1 << 62


class Image(Protocol):
    """A disk that can be read."""

    name: str
    size: int

    def read_into(self, buf: memoryview, offset: int) -> None:
        """Fill ``buf``. Raises `OSError` for what is damaged."""


class Library:
    """A context: the worker of one disk. One thread.

    Every call raises `DiskError` for what cannot be read. Where a part of the backup does not verify, it raises
    `DamagedError` in the end, whatever the library made of that. A call that is not read to its end, and an answer that
    cannot be, end the worker: then ``alive`` is false, and all that is asked later fails.
    """

    def __init__(self, image: Image) -> None:
        if importlib.util.find_spec("pytsk3") is None:
            hint = "Install it: pip install 'incbak[files]' (or: pipx inject incbak pytsk3). incbak export needs none."
            raise UsageError("the library pytsk3 is not installed, which reads file systems", hint=hint)
        self._image = image
        self._what = f"disk {image.name}"
        self.alive = True
        self._damage: OSError | None = None
        self._decoder = m.decoder(m.Reply)
        self._sock, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "incbak.files.worker", str(theirs.fileno()), str(image.size)]
        errors = None if os.environ.get("INCBAK_DEBUG") else subprocess.DEVNULL
        try:
            self._process = subprocess.Popen(
                [*command, str(MEMORY)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                pass_fds=[theirs.fileno()],
                env={k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "VIRTUAL_ENV")},
                start_new_session=True,
            )
        finally:
            theirs.close()

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the worker. Idempotent."""
        self.alive = False
        self._sock.close()
        self._process.kill()
        self._process.wait()

    def volumes(self) -> list[Volume]:
        """The partitions, or the whole disk as number 0."""
        found: list[Volume] = []
        for reply in self._ask(m.Volumes()):
            if isinstance(reply, Volume):
                if reply.start < 0 or reply.length <= 0 or reply.start >= self._image.size:
                    continue
                found.append(reply)
        return sorted(found, key=lambda v: v.number)

    def mount(self, volume: Volume) -> Node:
        """Its root directory; what follows is about this file system."""
        root = -1
        self._what = f"disk {self._image.name}" + (f", partition {volume.number}" if volume.number else "")
        for reply in self._ask(m.Mount(volume.start, volume.system)):
            root = reply.root if isinstance(reply, m.Done) else root
        return Node(b"", root, "directory", 0o755, 0, 0, b"")

    def entries(self, directory: Node) -> Generator[Node, None, None]:
        """In no order; names as they are on the disk, whatever they are."""
        for reply in self._ask(m.List(directory.inode)):
            if isinstance(reply, Node):
                yield self._checked(reply)

    def content(self, file: Node) -> Generator[Piece, None, None]:
        """Pieces with their offset, in order; the rest, up to its size, is zeroes."""
        at = 0
        for reply in self._ask(m.Fetch(file.inode, file.size)):
            if isinstance(reply, Piece):
                if reply.offset < at or (at := reply.offset + len(reply.data)) > file.size:
                    raise self._nonsense(f"content at {reply.offset}")
                yield reply

    def _checked(self, node: Node) -> Node:
        if node.kind not in _KINDS or len(node.name) > _NAME or len(node.target) > _NAME or node.size < 0:
            raise self._nonsense(f"an entry {node.name[:100]!r}")
        if node.mode & ~0o7777 or abs(node.mtime) > _TIMES:
            raise self._nonsense(f"an entry {node.name[:100]!r}")
        return node

    def _ask(self, request: m.Request) -> Generator[m.Reply, None, None]:
        """The answers, `Done` among them. A question that is given up ends the worker."""
        done = False
        try:
            m.send(self._sock, m.encode(request))
            while not done:
                reply = self._decoder.decode(m.receive(self._sock))
                if isinstance(reply, m.Need):
                    self._serve(reply)
                    continue
                if done := isinstance(reply, m.Done | m.Failed):
                    self._raise_damage()
                if isinstance(reply, m.Failed):
                    raise DiskError(f"{self._what}: {reply.why}", hint=HINT)
                yield reply
        except (EOFError, OSError) as e:
            done = True
            raise self._died() from e
        except (ValueError, msgspec.MsgspecError) as e:
            raise self._nonsense(str(e)) from e
        finally:
            if not done:
                self.close()

    def _serve(self, need: m.Need) -> None:
        if need.offset < 0 or not 0 < need.length < m.LARGEST or need.offset + need.length > self._image.size:
            raise self._nonsense(f"{need.length} bytes at {need.offset}")
        frame = bytearray(1 + need.length)
        try:
            self._image.read_into(memoryview(frame)[1:], need.offset)
        except OSError as e:
            self._damage = e
            frame = bytearray(b"\1")
        m.send(self._sock, bytes(frame))

    def _raise_damage(self) -> None:
        """The library may pass over what it cannot read: we do not."""
        if (damage := self._damage) is not None:
            self._damage = None
            raise DamagedError(str(damage.strerror or damage), hint="Try an older backup; run: incbak check")

    def _died(self) -> DiskError:
        self.alive = False
        self._sock.close()
        try:
            status = self._process.wait(5)
        except subprocess.TimeoutExpired:
            status = 0
        why = f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit code {status}"
        return DiskError(f"{self._what}: the library that reads file systems has ended ({why})", hint=HINT)

    def _nonsense(self, what: str) -> DiskError:
        return DiskError(f"{self._what}: the library that reads file systems answers nonsense: {what}", hint=HINT)


HINT = (
    "The file system may be damaged or of a kind that is not known here. Let a kernel read it: incbak export BACKUP "
    "--socket PATH, then qemu-nbd -r -c /dev/nbd0 URI (root), or nbdfuse FILE URI."
)

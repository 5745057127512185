"""The process that holds pytsk3. ``python -m incbak.files.worker FD SIZE MEMORY``: the socket, and the disk's size.

It gives up what it could do harm with before it reads the first byte of the disk.
"""

from __future__ import annotations

import os
import resource
import socket
import sys
from collections.abc import Iterator
from typing import Any

from incbak.files import messages as m
from incbak.files import systems

CHUNK = 256 << 10
_ZERO = bytes(CHUNK)
_PARTITIONS = 1024
_LARGEST_READ = 16 << 20
_NOBODY = 65534
_PLAIN = 3  # TSK_FS_ATTR_INUSE | TSK_FS_ATTR_NONRES: neither compressed nor encrypted
_SPARSE = 2  # TSK_FS_ATTR_RUN_FLAG_SPARSE


def give_up_rights(memory: int) -> None:
    """No files, no more memory than ``memory`` bytes, no core, and nobody's rights where we had root's."""
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, 0),
    ):
        resource.setrlimit(what, (limit, limit))


class Worker:
    """Answers requests until the other side is gone. ``tsk`` is the library."""

    def __init__(self, sock: socket.socket, size: int, tsk: Any) -> None:
        self._sock, self._size, self._tsk = sock, size, tsk
        self._image = _image_class(tsk)(self)
        self._fs: Any = None
        self._ntfs = False
        self._kinds = {
            tsk.TSK_FS_META_TYPE_REG: "file",
            tsk.TSK_FS_META_TYPE_DIR: "directory",
            tsk.TSK_FS_META_TYPE_LNK: "symlink",
            tsk.TSK_FS_META_TYPE_CHR: "char",
            tsk.TSK_FS_META_TYPE_BLK: "block",
            tsk.TSK_FS_META_TYPE_FIFO: "pipe",
            tsk.TSK_FS_META_TYPE_SOCK: "socket",
        }

    def run(self) -> None:
        """Raises `EOFError` in the end."""
        decoder = m.decoder(m.Request)
        while True:
            request = decoder.decode(m.receive(self._sock))
            try:
                for reply in self._answer(request):
                    m.send(self._sock, m.encode(reply))
            except (OSError, RuntimeError, TypeError, KeyError, AttributeError, MemoryError) as e:
                m.send(self._sock, m.encode(m.Failed(_why(e))))

    def read(self, offset: int, length: int) -> bytes:
        """Of the disk. Raises `OSError` for what cannot be read."""
        length = max(min(length, self._size - offset, _LARGEST_READ), 0) if offset >= 0 else 0
        if not length:
            return b""
        m.send(self._sock, m.encode(m.Need(offset, length)))
        frame = m.receive(self._sock)
        if frame[0]:
            raise OSError("a part of the backup is damaged")
        return frame[1:]

    def _answer(self, request: m.Request) -> Iterator[m.Message]:
        root = 0
        match request:
            case m.Volumes():
                yield from self._volumes()
            case m.Mount(start, system):
                root = self._mount(start, system)
            case m.List(inode):
                yield from self._list(inode)
            case m.Fetch(inode, size):
                yield from self._fetch(inode, size)
        yield m.Done(root)

    def _volumes(self) -> Iterator[m.Volume]:
        head = self.read(0, systems.HEAD)
        table = systems.table_of(head)
        if not table:
            yield self._volume(0, 0, self._size)
            return
        kind = self._tsk.TSK_VS_TYPE_GPT if table == "GPT" else self._tsk.TSK_VS_TYPE_DOS
        volumes = self._tsk.Volume_Info(self._image, type=kind)
        unit, logical = volumes.info.block_size, 5
        for part in list(volumes)[: 2 * _PARTITIONS]:
            if part.flags != self._tsk.TSK_VS_PART_FLAG_ALLOC:
                continue
            number = part.slot_num + 1
            if table == "MBR" and part.table_num > 0:
                number, logical = logical, logical + 1
            yield self._volume(number, part.start * unit, part.len * unit)

    def _volume(self, number: int, start: int, length: int) -> m.Volume:
        system = systems.recognise(self.read(start, min(systems.HEAD, length)))
        return m.Volume(number, start, length, system.name, system.readable, system.note)

    def _mount(self, start: int, system: str) -> int:
        tsk = self._tsk
        kinds = {systems.NTFS: tsk.TSK_FS_TYPE_NTFS_DETECT, systems.FAT: tsk.TSK_FS_TYPE_FAT_DETECT}
        kind = kinds.get(system, tsk.TSK_FS_TYPE_EXFAT if system == systems.EXFAT else tsk.TSK_FS_TYPE_EXT_DETECT)
        self._fs = tsk.FS_Info(self._image, offset=start, type=kind)
        self._ntfs = system == systems.NTFS
        return int(self._fs.info.root_inum)

    def _list(self, inode: int) -> Iterator[m.Node]:
        for entry in self._fs.open_dir(inode=inode):
            name, meta = entry.info.name, entry.info.meta
            if name.name in (b".", b"..") or int(name.flags) != int(self._tsk.TSK_FS_NAME_FLAG_ALLOC):
                continue
            if meta is None:
                yield m.Node(name.name, int(name.meta_addr), "unreadable", 0, 0, 0, b"")
            elif meta.type in (self._tsk.TSK_FS_META_TYPE_VIRT, self._tsk.TSK_FS_META_TYPE_VIRT_DIR):
                continue
            elif not (self._ntfs and name.name.startswith(b"$") and meta.addr < 24):
                yield self._node(name.name, meta)

    def _node(self, name: bytes, meta: Any) -> m.Node:
        kind = self._kinds.get(meta.type, "other")
        mtime = int(meta.mtime) * 1_000_000_000 + int(meta.mtime_nano)
        target = (meta.link or b"") if kind == "symlink" else b""
        return m.Node(name, int(meta.addr), kind, int(meta.mode) & 0o7777, int(meta.size), mtime, target)

    def _fetch(self, inode: int, size: int) -> Iterator[m.Piece]:
        file = self._fs.open_meta(inode=inode)
        if int(file.info.meta.size) != size:
            raise OSError(f"it has {file.info.meta.size} bytes, not {size}")
        for start, stop in _between(self._holes(file), size):
            for offset in range(start, stop, CHUNK):
                wanted = min(CHUNK, stop - offset)
                data = file.read_random(offset, wanted)
                if len(data) != wanted:
                    raise OSError(f"only {offset + len(data)} of its {size} bytes can be read")
                if data != _ZERO[:wanted]:
                    yield m.Piece(offset, data)

    def _holes(self, file: Any) -> list[tuple[int, int]]:
        """(start, end) of what the file system says is a hole, in order, so that it need not be read."""
        unit, holes = int(self._fs.info.block_size), []
        attribute = next(iter(file), None)
        if self._ntfs or attribute is None or int(attribute.info.flags) != _PLAIN:
            return []
        for run in attribute:
            if int(run.flags) == _SPARSE:
                holes.append((int(run.offset) * unit, (int(run.offset) + int(run.len)) * unit))
        return holes


def _between(holes: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    at = 0
    for start, stop in [*holes, (size, size)]:
        if min(start, size) > at:
            yield at, min(start, size)
        at = max(at, stop)


def _image_class(tsk: Any) -> Any:
    class Image(tsk.Img_Info):  # type: ignore[misc]
        """The disk, as the library wants it."""

        def __init__(self, worker: Worker) -> None:
            self._worker = worker
            super().__init__(url="", type=tsk.TSK_IMG_TYPE_EXTERNAL)

        def read(self, offset: int, length: int) -> bytes:
            return self._worker.read(offset, length)

        def get_size(self) -> int:
            return self._worker._size

        def close(self) -> None:
            pass

    return Image


def _why(error: BaseException) -> str:
    """The library's message without the place in its source."""
    text = " ".join(str(error).split())
    return (text.rpartition(" with error: ")[2] or type(error).__name__)[:300]


def main() -> None:
    """Until the other side is gone."""
    import pytsk3

    os.environ["TZ"] = "UTC"  # FAT has local times: as they are
    fd, size, memory = (int(word) for word in sys.argv[1:])
    sock = socket.socket(fileno=fd)
    give_up_rights(memory)
    try:
        Worker(sock, size, pytsk3).run()
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass


if __name__ == "__main__":
    main()

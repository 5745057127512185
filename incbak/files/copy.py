"""Files of a backup into a directory. Every name comes from a disk that a stranger may have written.

What holds, whatever is on the disk:

- Nothing is made, changed or followed outside the target directory: every name is one component, checked, and used
  relative to an open directory; no directory or file is opened through a symlink.
- Symlinks are made as links, with the text that they have, and never followed. Devices, pipes and sockets are not
  made. Files are the caller's, with the permissions of the original that the umask allows, without setuid and setgid
  unless these are asked for.
- A file has its name only when all of it is there. What exists is not touched without ``force``; with it, files and
  links are replaced, not written into, and directories are shared.
- No file is larger than the disk, and all that is written, holes not counted, is not more than the disk. A directory
  is entered once, so a loop ends.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from incbak import durable
from incbak.errors import DamagedError, IncbakError, RestoreError
from incbak.events import Notice, Progress, Reporter, Warned, silent
from incbak.files.library import Library
from incbak.files.messages import Node
from incbak.files.walk import ENTRIES, listed

DEPTH = 256
"""Directories inside each other; each is an open descriptor."""
_SPECIAL = frozenset({"char", "block", "pipe", "socket", "other"})
_NAME = 255


@dataclass
class Copied:
    """What was done. ``failed``: paths that were not copied; ``damaged``: some of them since the backup is."""

    files: int = 0
    directories: int = 0
    links: int = 0
    special: int = 0
    bytes: int = 0
    damaged: bool = False
    failed: list[str] = field(default_factory=list)


class Copier:
    """Copies into ``target``, an existing directory. ``limit``: the size of the disk, in bytes. ``refuse``: raises
    `UsageError` for a directory that is there, and in which nothing is written."""

    def __init__(
        self,
        library: Library,
        target: Path,
        limit: int,
        *,
        force: bool = False,
        setuid: bool = False,
        report: Reporter = silent,
        refuse: Callable[[Path], None] = lambda _path: None,
    ) -> None:
        self._library, self._target, self._limit = library, target, limit
        self._force, self._report, self._refuse = force, report, refuse
        self._mask = 0o777 & ~_umask() | (0o6000 if setuid else 0)
        self._entered: set[int] = set()
        self._written = self._held = 0
        self.done = Copied()

    def copy(self, nodes: Iterable[Node]) -> Copied:
        """Copy each, directories with all that is below. Raises `RestoreError` before anything is written if a name is
        taken; what fails later is in `Copied.failed`, and told to the reporter."""
        wanted = list(nodes)
        with self._opened(os.open(self._target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)) as fd:
            if not self._force:
                self._refuse_taken(fd, wanted)
            for node in wanted:
                self._node(fd, node, self._target, 0)
            durable.sync_filesystem(fd, str(self._target))
        return self.done

    def _refuse_taken(self, fd: int, nodes: list[Node]) -> None:
        names = [n.name for n in nodes]
        for name in names:
            if names.count(name) > 1:
                raise RestoreError(
                    f"two of the paths have the name {os.fsdecode(name)}", hint="Copy one after another."
                )
            with suppress(OSError, ValueError):
                os.stat(name, dir_fd=fd, follow_symlinks=False)
                path = self._target / os.fsdecode(name)
                raise RestoreError(f"{path} exists", hint="Choose another directory, or replace it with --force.")

    def _node(self, fd: int, node: Node, above: Path, depth: int) -> None:
        path = above / os.fsdecode(node.name.replace(b"\0", b"?"))
        try:
            if not _is_safe(node.name):
                raise RestoreError("its name cannot be that of a file")
            if node.kind == "directory":
                self._directory(fd, node, path, depth)
            elif node.kind == "symlink":
                self._link(fd, node)
            elif node.kind == "file":
                self._file(fd, node)
            elif node.kind in _SPECIAL:
                self.done.special += 1
                self._report(Notice(f"{_line(path)} is a {node.kind}: left out"))
            else:
                raise RestoreError("what the disk says of it cannot be read")
        except IncbakError as e:
            if not self._library.alive:
                raise
            self.done.damaged |= isinstance(e, DamagedError)
            self._failed(path, str(e))
        except FileExistsError:
            self._failed(path, "it exists")
        except OSError as e:
            self._failed(path, e.strerror or str(e))

    def _failed(self, path: Path, why: str) -> None:
        self.done.failed.append(str(path))
        self._report(Warned(f"{_line(path)} was not copied: {why}"))

    def _directory(self, fd: int, node: Node, path: Path, depth: int) -> None:
        if node.inode in self._entered:
            raise RestoreError("the disk has this directory in two places")
        if depth >= DEPTH:
            raise RestoreError(f"there are more than {DEPTH} directories inside each other")
        self._entered.add(node.inode)
        entries = listed(self._library, node, ENTRIES - self._held)
        self._held += len(entries)
        if not (made := self._make_directory(fd, node.name)):
            self._refuse(path)
        with self._opened(os.open(node.name, _INTO, dir_fd=fd)) as inside:
            for entry in entries:
                self._node(inside, entry, path, depth + 1)
            self._held -= len(entries)
            if made:
                os.fchmod(inside, node.mode & self._mask & 0o777 | 0o700)
                _set_time(inside, node.mtime)
        self.done.directories += 1

    def _make_directory(self, fd: int, name: bytes) -> bool:
        try:
            os.mkdir(name, 0o700, dir_fd=fd)
        except FileExistsError:
            if not self._force:
                raise
            return False
        return True

    def _link(self, fd: int, node: Node) -> None:
        if not node.target or b"\0" in node.target:
            raise RestoreError("it is a symbolic link to nothing")
        with self._named(fd, node.name) as name:
            os.symlink(node.target, name, dir_fd=fd)
            os.utime(name, ns=(node.mtime, node.mtime), dir_fd=fd, follow_symlinks=False)
        self.done.links += 1

    def _file(self, fd: int, node: Node) -> None:
        if node.size > self._limit:
            raise RestoreError(f"it claims {node.size} bytes, more than the whole disk")
        with self._named(fd, node.name) as name:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with self._opened(os.open(name, flags, 0o600, dir_fd=fd)) as out:
                self._content(out, node)
                os.fchmod(out, node.mode & self._mask)
                _set_time(out, node.mtime)
        self.done.files += 1
        self.done.bytes += node.size

    def _content(self, out: int, node: Node) -> None:
        try:
            with closing(self._library.content(node)) as pieces:
                for piece in pieces:
                    self._written += len(piece.data)
                    if self._written > self._limit:
                        raise RestoreError("more is to be copied than the disk holds", hint="Copy less at a time.")
                    _write(out, piece.data, piece.offset)
                    self._report(Progress("", self.done.bytes + piece.offset, 0))
            os.ftruncate(out, node.size)
        except OSError as e:
            raise RestoreError(
                f"cannot write in {self._target}: {e.strerror}", hint="Free space, or look at it."
            ) from e

    @contextmanager
    def _named(self, fd: int, name: bytes) -> Iterator[bytes]:
        """A name to make something under, that becomes ``name`` when all is done; else it is gone."""
        temporary = b".incbak-" + secrets.token_hex(8).encode()
        try:
            yield temporary
            if self._force:
                os.rename(temporary, name, src_dir_fd=fd, dst_dir_fd=fd)
            else:
                _rename_new(temporary, name, fd)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=fd)
            raise

    @staticmethod
    @contextmanager
    def _opened(fd: int) -> Iterator[int]:
        try:
            yield fd
        finally:
            os.close(fd)


_INTO = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def _rename_new(old: bytes, new: bytes, fd: int) -> None:
    """Rename, and never over anything. Raises `FileExistsError`."""
    try:
        os.link(old, new, src_dir_fd=fd, dst_dir_fd=fd, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: take the name first
        os.close(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600, dir_fd=fd))
        os.rename(old, new, src_dir_fd=fd, dst_dir_fd=fd)
        return
    os.unlink(old, dir_fd=fd)


def _is_safe(name: bytes) -> bool:
    """Whether it is one component, and neither of the two that lead elsewhere."""
    return 0 < len(name) <= _NAME and name not in (b".", b"..") and b"/" not in name and b"\0" not in name


def _write(out: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(out, view, offset)
        view, offset = view[count:], offset + count


def _set_time(fd: int, mtime: int) -> None:
    os.utime(fd, ns=(mtime, mtime))


def _line(path: Path) -> str:
    """A name with line breaks in it does not look like several lines."""
    return str(path).replace("\n", "\N{REPLACEMENT CHARACTER}")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def kind_letter(node: Node) -> str:
    """As the first letter of ``ls -l``."""
    letters = {"file": "-", "directory": "d", "symlink": "l", "char": "c", "block": "b", "pipe": "p", "socket": "s"}
    return letters.get(node.kind, "?")


def mode_text(node: Node) -> str:
    """As in ``ls -l``: ``-rw-r--r--``."""
    return kind_letter(node) + stat.filemode(node.mode)[1:]

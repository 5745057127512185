"""Paths inside a file system of a backup, and directories in order."""

from __future__ import annotations

from contextlib import closing

from incbak.errors import DiskError, UsageError
from incbak.files.library import Library
from incbak.files.messages import Node

ENTRIES = 500_000
"""So many entries of directories may be held in memory."""


def listed(library: Library, directory: Node, limit: int = ENTRIES) -> list[Node]:
    """The entries of a directory by name. Raises `DiskError` for more than ``limit``."""
    found = []
    with closing(library.entries(directory)) as entries:
        for node in entries:
            found.append(node)
            if len(found) > limit:
                raise DiskError(f"directories have more than {ENTRIES} entries", hint="Mount it: see incbak export.")
    return sorted(found, key=lambda n: n.name)


def find(library: Library, root: Node, path: bytes) -> Node:
    """The entry at ``path`` (``/`` or not in front). Symlinks on the way are not followed. Raises `UsageError`."""
    node, way = root, b""
    for part in _parts(path):
        if node.kind != "directory":
            raise UsageError(_not_a_directory(way, node), hint=_link_hint(node))
        way += b"/" + part
        matching = [n for n in library.entries(node) if n.name == part]
        if not matching:
            raise UsageError(f"there is no {_text(way)} in the backup", hint="See: incbak files ls")
        node = matching[0]
    return node


def _parts(path: bytes) -> list[bytes]:
    parts = [p for p in path.split(b"/") if p not in (b"", b".")]
    if b".." in parts:
        raise UsageError(f"not a path in a backup: {_text(path)}", hint="Write it from the root on, without '..'.")
    return parts


def _not_a_directory(way: bytes, node: Node) -> str:
    return f"{_text(way)} is a {'symbolic link' if node.kind == 'symlink' else node.kind}, not a directory"


def _link_hint(node: Node) -> str:
    return f"It points to {_text(node.target)}; links are not followed: name that." if node.kind == "symlink" else ""


def _text(path: bytes) -> str:
    return path.decode("utf-8", "replace")

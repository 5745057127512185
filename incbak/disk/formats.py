"""Which format an image has: a decision of its owner, never of whoever writes its content.

The first bytes of a raw disk are its guest's. A guest that writes the header of another format there must not make us
open other files, change the size of its disk, or store anything inside it. So the format is decided once, and kept in
the state directory and in the records; in this order:

1. what the owner says now (``--format``, the configuration), unless it contradicts 2;
2. what it was before: another format is an error that names both;
3. a block device is raw;
4. the name: ``.raw`` is raw, ``.qcow2`` is qcow2 (and must begin as one);
5. the first backup of a regular file with another name: qcow2 if it begins as one, which is said, since it is the only
   guess that is made; other formats that are recognised are refused by name. What is nothing known, or LUKS, is raw.

LUKS is content: ciphertext is backed up as it is.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from incbak.errors import DiskError, FormatError
from incbak.opening import open_image

OFFERED = ("raw", "qcow2", "qed", "vmdk", "vhdx", "vpc")
"""What ``--format`` takes."""
_HEAD = 4096
_SIGNATURES = (
    ("qcow", 0, b"QFI\xfb\0\0\0\1"),
    ("qcow2", 0, b"QFI\xfb"),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vhdx", 0, b"vhdxfile"),
    ("vpc", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("bochs", 0, b"Bochs Virtual HD Image"),
    ("cloop", 0, b"#!/bin/sh\n#V2.0 Format"),
    ("luks", 0, b"LUKS\xba\xbe"),
)
_TRAILERS = (("vpc", b"conectix"), ("dmg", b"koly"))
_DESCRIPTOR = re.compile(rb"(?:[ \t]*(?:#[^\n]*)?\r?\n)*version=\d")  # as QEMU recognises the text of a VMDK
_EXTENTS = "VMDK descriptor"  # a text that names the files with the data: they are not followed
_NAMED = {".raw": "raw", ".qcow2": "qcow2"}
_NAMES = {"vpc": "VHD", "vdi": "VDI", "vmdk": "VMDK", "vhdx": "VHDX", "qed": "QED", "parallels": "Parallels"}


@dataclass(frozen=True)
class Decision:
    """``note``: what the user must know of it. ``guessed``: nobody but the content has said so."""

    format: str
    note: str = ""
    guessed: bool = False


@dataclass(frozen=True)
class Before:
    """What the format was, and where that is written; empty where there is no history.

    ``same``: it was surely this disk, and not only this path; else what the owner says counts more.
    """

    format: str = ""
    where: str = ""
    same: bool = True


def recognise(path: Path) -> str:
    """The format that the content of ``path`` looks like, else ``raw``. Raises `DiskError` when it cannot be read."""
    try:
        with open(open_image(path, os.O_RDONLY), "rb") as f:
            head = f.read(_HEAD)
            f.seek(max(f.seek(0, os.SEEK_END) - 512, 0))
            tail = f.read(512)
    except OSError as e:
        raise DiskError(f"cannot read {path}: {e.strerror}") from e
    for name, at, magic in _SIGNATURES:
        if head[at : at + len(magic)] == magic:
            return name
    if _DESCRIPTOR.match(head):
        return _EXTENTS
    return next((name for name, magic in _TRAILERS if tail.startswith(magic)), "raw")


def named_format(path: Path) -> str:
    """The format that the name says, or an empty string."""
    return _NAMED.get(path.suffix.lower(), "")


def decide(path: Path, asked: str, before: Before) -> Decision:
    """The format of the image ``path``; see the module's docstring. Raises `FormatError` or `DiskError`."""
    if before.format and (before.same or not (asked or named_format(path))):
        return _as_before(path, asked, before)
    content = recognise(path)
    if asked:
        return _checked(path, asked, content)
    if path.is_block_device():
        return Decision("raw", _looks_like(path, content, "a block device is raw unless --format says otherwise"))
    if named := named_format(path):
        return _checked(path, named, content)
    if content in ("raw", "luks"):
        return Decision("raw")
    if content == "qcow2":
        note = f"{path} is taken for a qcow2 image by its content, since this is its first backup: say so with --format"
        return Decision("qcow2", note, guessed=True)
    ways = f"--format {content}, or convert it" if content in OFFERED else "Convert it"
    hint = f"{ways}: qemu-img convert -O qcow2 {path} NEW. If it is a raw disk whose guest wrote that: --format raw"
    raise FormatError(f"{path} is {_known(content)}, and its format is not guessed", hint=hint)


def _as_before(path: Path, asked: str, before: Before) -> Decision:
    hint = "If the image was converted, it is another disk: back it up under another name (--disk or --name)."
    content = recognise(path)
    named = named_format(path)
    if (now := asked or (named if named == content else before.format)) != before.format:
        said = f"--format says {now}" if asked else f"its name says {now}"
        raise FormatError(f"{path} was a {before.format} image in {before.where}, and {said}", hint=hint)
    if before.format == "raw":
        return Decision("raw", _looks_like(path, content, f"it is a raw disk, as in {before.where}"))
    if content != before.format:
        text = f"{path} was a {before.format} image in {before.where}, and is {_known(content)} now"
        raise FormatError(text, hint=hint)
    return Decision(before.format)


def _checked(path: Path, form: str, content: str) -> Decision:
    if form == "raw":
        return Decision("raw", _looks_like(path, content, "it is a raw disk, as its owner says"))
    if form != content:
        hint = f"Convert it: qemu-img convert -O qcow2 {path} NEW. If it is a raw disk, say so with --format raw."
        raise FormatError(f"{path} should be a {form} image, and is {_known(content)}", hint=hint)
    return Decision(form)


def _looks_like(path: Path, content: str, why: str) -> str:
    return "" if content in ("raw", "luks") else f"{path} looks like {_known(content)}, but {why}"


def _known(content: str) -> str:
    return "no image of a known format" if content == "raw" else f"a {_NAMES.get(content, content)} image"

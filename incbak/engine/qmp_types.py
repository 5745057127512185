"""What is asked from a monitor, and the form that each answer must have.

A QEMU may be in its guest's hands: whoever breaks out of the guest answers our commands. So no answer is used before it
has its type here: the fields that incbak reads, their kinds, and a limit for each text and list. Fields that are not
here are dropped, so nothing can be read that was not checked; a new command or field is added here first.

The answers stay dictionaries, under QEMU's own names. What is checked is their form, not whether they are true: a
number may be wrong, a path may name any file. The docstring of `incbak` has what follows from that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, TypedDict, TypeVar

import msgspec
from msgspec import Meta

from incbak.errors import EngineError

T = TypeVar("T")

MOST = 1 << 16
"""Of one kind of thing: nodes, edges, jobs, bitmaps of a node."""

Name = Annotated[str, Meta(max_length=1024)]
Word = Annotated[str, Meta(max_length=128)]
FileName = Annotated[str, Meta(max_length=1 << 14)]  # a path, or the JSON of a node
Words = Annotated[str, Meta(max_length=1 << 16)]
Count = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
Number = Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)]
Many = Annotated[list[T], Meta(max_length=MOST)]


class _Of(TypedDict):
    major: Annotated[int, Meta(ge=0, le=9999)]
    minor: Annotated[int, Meta(ge=0, le=9999)]
    micro: Annotated[int, Meta(ge=0, le=9999)]


class Version(TypedDict):
    """``query-version``."""

    qemu: _Of
    package: NotRequired[Name]


class Called(TypedDict):
    """``query-name``; an entry of ``query-commands``."""

    name: NotRequired[Name]


class Uuid(TypedDict):
    """``query-uuid``."""

    UUID: Word


class Status(TypedDict):
    """``query-status``."""

    running: bool
    status: Word


class Identified(TypedDict):
    """An entry of ``query-iothreads``."""

    id: Name


Bitmap = TypedDict(
    "Bitmap",
    {
        "name": NotRequired[Name],
        "count": Count,
        "granularity": Annotated[int, Meta(ge=512, le=1 << 31)],
        "recording": bool,
        "busy": bool,
        "persistent": bool,
        "inconsistent": NotRequired[bool],
        "x-incbak-reason": NotRequired[Word],
        "x-incbak-found": NotRequired[Word],
        "x-incbak-path": NotRequired[FileName],
    },
)
"""``BlockDirtyInfo``."""


class _Encryption(TypedDict):
    format: NotRequired[Word]


Qcow2 = TypedDict(
    "Qcow2",
    {
        "compat": NotRequired[Word],
        "lazy-refcounts": NotRequired[bool],
        "corrupt": NotRequired[bool],
        "data-file": NotRequired[FileName],
        "data-file-raw": NotRequired[bool],
        "encrypt": NotRequired[_Encryption],
    },
)
"""What of ``ImageInfoSpecificQCow2`` matters; other formats have none of it."""


class Specific(TypedDict):
    """``ImageInfoSpecific``."""

    type: Word
    data: NotRequired[Qcow2]


Image = TypedDict(
    "Image",
    {
        "virtual-size": Count,
        "filename": NotRequired[FileName],
        "format": NotRequired[Word],
        "actual-size": NotRequired[Count],
        "cluster-size": NotRequired[Count],
        "dirty-flag": NotRequired[bool],
        "encrypted": NotRequired[bool],
        "backing-filename": NotRequired[FileName],
        "full-backing-filename": NotRequired[FileName],
        "backing-filename-format": NotRequired[Word],
        "format-specific": NotRequired[Specific],
    },
)
"""``ImageInfo``."""

Inserted = TypedDict(
    "Inserted",
    {
        "node-name": NotRequired[Name],
        "file": NotRequired[FileName],
        "drv": NotRequired[Word],
        "ro": NotRequired[bool],
        "encrypted": NotRequired[bool],
        "backing_file": NotRequired[FileName],
        "backing_file_depth": NotRequired[Count],
        "image": NotRequired[Image],
        "dirty-bitmaps": NotRequired[Many[Bitmap]],
        "x-incbak-path": NotRequired[FileName],
    },
)
"""``BlockDeviceInfo``, of a device of ``query-block``."""

_Cache = TypedDict("_Cache", {"no-flush": NotRequired[bool]})

Node = TypedDict(
    "Node",
    {
        "node-name": Name,
        "drv": Word,
        "ro": bool,
        "image": Image,
        "cache": NotRequired[_Cache],
        "file": NotRequired[FileName],
        "encrypted": NotRequired[bool],
        "backing_file": NotRequired[FileName],
        "backing_file_depth": NotRequired[Count],
        "dirty-bitmaps": NotRequired[Many[Bitmap]],
        "x-incbak-path": NotRequired[FileName],
    },
)
"""``BlockDeviceInfo``, of ``query-named-block-nodes``."""

Device = TypedDict(
    "Device",
    {
        "device": Name,
        "qdev": NotRequired[Name],
        "type": NotRequired[Word],
        "removable": NotRequired[bool],
        "locked": NotRequired[bool],
        "tray_open": NotRequired[bool],
        "io-status": NotRequired[Word],
        "inserted": NotRequired[Inserted | None],
    },
)
"""``BlockInfo``."""


class GraphNode(TypedDict):
    """A node of ``x-debug-query-block-graph``."""

    id: Count
    type: NotRequired[Word]
    name: Name


Edge = TypedDict(
    "Edge",
    {
        "parent": Count,
        "child": Count,
        "name": Name,
        "perm": NotRequired[Annotated[list[Word], Meta(max_length=64)]],
        "shared-perm": NotRequired[Annotated[list[Word], Meta(max_length=64)]],
    },
)
"""An edge of ``x-debug-query-block-graph``."""


class BlockGraph(TypedDict):
    """``x-debug-query-block-graph``."""

    nodes: Many[GraphNode]
    edges: Many[Edge]


Job = TypedDict(
    "Job",
    {
        "id": Name,
        "type": NotRequired[Word],
        "status": Word,
        "current-progress": Count,
        "total-progress": Count,
        "error": NotRequired[Words],
    },
)
"""``JobInfo``."""

BlockJob = TypedDict(
    "BlockJob", {"device": Name, "type": NotRequired[Word], "status": NotRequired[Word], "io-status": Word}
)
"""``BlockJobInfo``."""

Export = TypedDict(
    "Export",
    {
        "id": Name,
        "type": NotRequired[Word],
        "node-name": Name,
        "shutting-down": NotRequired[bool],
        "writable": NotRequired[bool],
    },
)
"""``BlockExportInfo``."""


class Stats(TypedDict):
    """``BlockDeviceStats``."""

    wr_highest_offset: NotRequired[Count]
    wr_operations: NotRequired[Count]
    wr_bytes: NotRequired[Count]
    unmap_operations: NotRequired[Count]


BlockStats = TypedDict(
    "BlockStats",
    {"device": NotRequired[Name], "qdev": NotRequired[Name], "node-name": NotRequired[Name], "stats": Stats},
)
"""``BlockStats``."""


class Descriptor(TypedDict):
    """``FdsetFdInfo``."""

    fd: Number
    opaque: NotRequired[Name]


FdSet = TypedDict("FdSet", {"fdset-id": Count, "fds": Many[Descriptor]})
"""``FdsetInfo``."""

AddedFd = TypedDict("AddedFd", {"fdset-id": Count, "fd": Number})
"""``add-fd``."""


class Property(TypedDict):
    name: Name
    type: Name


"""``ObjectPropertyInfo``."""


class Migration(TypedDict):
    """``query-migrate``."""

    status: NotRequired[Word]


Scalar = None | bool | int | float | Words

ANSWERS: Mapping[str, Any] = {
    "add-fd": AddedFd,
    "qom-get": Scalar,
    "qom-list": Many[Property],
    "query-block": Many[Device],
    "query-block-exports": Many[Export],
    "query-block-jobs": Many[BlockJob],
    "query-blockstats": Many[BlockStats],
    "query-commands": Many[Called],
    "query-fdsets": Many[FdSet],
    "query-iothreads": Many[Identified],
    "query-jobs": Many[Job],
    "query-migrate": Migration,
    "query-name": Called,
    "query-named-block-nodes": Many[Node],
    "query-status": Status,
    "query-uuid": Uuid,
    "query-version": Version,
    "x-debug-query-block-graph": BlockGraph,
}
"""The type of each command's answer. Of a command that is not here nothing is read: it is done or refused."""


def decoded(command: str, answer: object) -> Any:
    """The answer in its form. Raises `EngineError` where it has another."""
    try:
        form = ANSWERS[command]
    except KeyError:
        if "query-" in command:
            raise EngineError(f"{command}: nothing is known of its answer") from None
        return {}
    try:
        return msgspec.convert(answer, form)
    except (msgspec.ValidationError, RecursionError) as e:
        raise EngineError(
            f"the monitor's answer to {command} is not one of QEMU: {e}",
            hint="Is it a QEMU that incbak knows? Otherwise do not trust it, and look at its VM.",
        ) from e

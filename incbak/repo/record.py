"""Backup records: what makes a backup exist. JSON below a line with its BLAKE3, strictly decoded, within limits."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec

from incbak.errors import DamagedError, FormatTooNewError
from incbak.repo.digested import digested, verified_body
from incbak.repo.ids import is_id

VERSION = 1
LIMIT = 16 << 20
MAX_DISKS = 1024
MAX_MISSED = 10_000
MAX_DISK_SIZE = 1 << 56


class DiskRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One disk of a backup. Sizes in bytes; ``root`` is the tree's root digest in hex.

    ``read`` is what was read of the disk, ``changed`` how much of that differs from the base, ``stored`` what new
    blobs take in the repository. ``reason`` is set when the disk was read whole though an incremental was asked for,
    with ``detail`` where there is more to say. ``audited``: bytes of clean clusters that were compared with the base,
    in the ``audit_turn``-th slice of the disk. ``format``: of the image, as its owner or its engine says.
    """

    name: str
    size: int
    kind: Literal["full", "incremental"]
    base: str | None
    reason: str | None
    detail: str = ""
    read: int
    changed: int = 0
    stored: int
    root: str
    bitmap: str | None = None
    audited: int = 0
    audit_turn: int | None = None
    format: str = ""


class Origin(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where a backup was copied from: the other repository's id, and the backup's ``seq`` there.

    ``missed``: ids of backups that were made there before it and could not be copied until then; a sync tries again.
    """

    repository: str
    seq: int
    missed: tuple[str, ...] = ()


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One backup: all disks of one VM at one instant. Times are ISO 8601 in UTC, for people; order is by ``seq``."""

    version: int = VERSION
    id: str
    seq: int
    vm: str
    kind: Literal["full", "incremental"]
    base: str | None
    started: str
    finished: str
    cluster_size: int
    disks: tuple[DiskRecord, ...]
    engine: str
    host: str = ""
    program: str = ""
    tags: tuple[str, ...] = ()
    config: dict[str, Any] = {}
    attachments: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    origin: Origin | None = None

    def disk(self, name: str) -> DiskRecord | None:
        """The disk of that name."""
        return next((d for d in self.disks if d.name == name), None)

    @property
    def incomplete(self) -> bool:
        """Whether a disk failed and is not in it: the run notes that as "disk NAME failed: WHY"."""
        return any(note.startswith("disk ") and " failed: " in note for note in self.notes)


def order(record: Record) -> tuple[int, int, str, str]:
    """By what backups are put in order. A copy that came late has its successor's number, but its own one before."""
    return record.seq, record.origin.seq if record.origin else 0, record.started, record.id


class NotWholeError(DamagedError):
    """Something of a backup of ``vm`` is missing or wrong."""

    def __init__(self, message: str, *, vm: str, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.vm = vm


def not_whole(record: Record, why: str, hint: str = "") -> NotWholeError:
    """Return the error that names a backup of which something is missing or wrong."""
    what = f"backup {record.id[:8]} of {record.vm} is not whole: {why}"
    return NotWholeError(what, vm=record.vm, hint=hint or "Run: incbak check --read-data")


def encode(record: Record) -> bytes:
    """The file's content."""
    body = msgspec.json.encode(record)
    return digested(body)


def decode(name: str, data: bytes) -> Record:
    """The record of that id. Raises `DamagedError` naming it for anything that it cannot be (faults row 78)."""
    body = verified_body(data, f"the record of backup {name}")
    try:
        record = msgspec.json.decode(body, type=Record)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        newer = b'"version":' in body[:40] and not body.startswith(b'{"version":%d,' % VERSION)
        if newer:
            raise FormatTooNewError(f"backup {name} is of a newer version", hint="Use a newer incbak.") from e
        raise DamagedError(f"the record of backup {name} is malformed: {e}") from e
    if record.version > VERSION:
        raise FormatTooNewError(f"backup {name} is of version {record.version}", hint="Use a newer incbak.")
    if problem := _impossible(name, record):
        raise DamagedError(f"the record of backup {name} is malformed: {problem}")
    return record


def _impossible(name: str, record: Record) -> str | None:
    if record.id != name or not is_id(name):
        return "its id is not its name"
    if not 512 <= record.cluster_size <= 1 << 24 or record.cluster_size & (record.cluster_size - 1):
        return f"a cluster size of {record.cluster_size}"
    if len(record.disks) > MAX_DISKS or len({d.name for d in record.disks}) != len(record.disks):
        return "its disks"
    if not (_is_time(record.started) and _is_time(record.finished)):
        return "its times"
    if record.origin and not is_id(record.origin.repository):
        return "its origin"
    if record.origin and len(record.origin.missed) > MAX_MISSED:
        return "its origin"
    for disk in record.disks:
        if not 0 <= disk.size <= MAX_DISK_SIZE:
            return f"a disk of {disk.size} bytes"
        if len(disk.root) != 64 or not set(disk.root) <= set("0123456789abcdef"):
            return "a root that is no digest"
    return None


def _is_time(text: str) -> bool:
    """Whether it is a date and time with its distance from UTC."""
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False

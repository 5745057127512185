"""``incbak files``: single files out of a backup."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from incbak.cli.given import VM_NAME
from incbak.cli.settings import Settings, common, one_line, printable, settings
from incbak.errors import DamagedError, DiskError, IncompleteError, UsageError
from incbak.export.image import BackupImage
from incbak.files.copy import Copier, mode_text
from incbak.files.library import HINT, Library
from incbak.files.messages import Node, Volume
from incbak.files.walk import find, listed
from incbak.repo.record import DiskRecord, Record
from incbak.report.backups import table
from incbak.units import format_size

_which = (
    click.option("--disk", metavar="DISK", help="Which disk, when the backup has several."),
    click.option("--partition", type=int, metavar="N", help="Which partition, when several have file systems."),
    click.option("--name", type=VM_NAME, help="Which VM's latest, when several share the repository."),
)


@click.group("files", short_help="List and copy single files of a backup.")
@common
def files() -> None:
    """Look into the file systems of a backup, without root and with nothing restored first.

    Reads GPT and MBR partitions with ext2 to ext4, NTFS, FAT and exFAT. For LVM, XFS and others let a kernel mount what
    incbak export offers. Needs the library pytsk3: pip install 'incbak[files]'.
    """


@files.command("ls", short_help="List partitions, or files.")
@click.argument("backup")
@click.argument("paths", metavar="[PATH]...", nargs=-1)
@_which[0]
@_which[1]
@_which[2]
@common
def ls(backup: str, paths: tuple[str, ...], disk: str | None, partition: int | None, name: str | None) -> None:
    """List what is at each PATH of BACKUP: type and permissions, size, time of change (UTC; on FAT as it stands there),
    name. Without a PATH: the partitions of the disk, or the root directory where there are none.

    \b
    Examples:
      incbak -r /backup files ls latest
      incbak -r /backup files ls latest --partition 2 /etc
    """
    here = settings()
    with _library(here, backup, name, disk) as (library, _record, _disk):
        volumes = library.volumes()
        if not paths and partition is None and [v.number for v in volumes] != [0]:
            _say_volumes(here, volumes)
            return
        root = _mounted(library, volumes, partition)
        for path in paths or ("/",):
            node = find(library, root, os.fsencode(path))
            _say_nodes(here, path, listed(library, node) if node.kind == "directory" else [node])


@files.command("cp", short_help="Copy files and directories out of a backup.")
@click.argument("backup")
@click.argument("paths", metavar="PATH...", nargs=-1, required=True)
@click.argument("target", metavar="DIR", type=click.Path(path_type=Path))
@click.option("-R", "--recursive", is_flag=True, help="Directories too, with all that is in them.")
@click.option("--force", is_flag=True, help="Replace files that are there.")
@click.option("--setuid", is_flag=True, help="Keep setuid and setgid bits, which are left out otherwise.")
@_which[0]
@_which[1]
@_which[2]
@common
def cp(
    backup: str,
    paths: tuple[str, ...],
    target: Path,
    recursive: bool,
    force: bool,
    setuid: bool,
    disk: str | None,
    partition: int | None,
    name: str | None,
) -> None:
    """Copy each PATH of BACKUP into the directory DIR, with times and permissions; they are yours then.

    Links are copied as links and not followed; devices, pipes and sockets are left out. What cannot be read whole is
    told and left out. The exit code is 3 then, or 13 where the backup is damaged.

    \b
    Examples:
      incbak -r /backup files cp latest --partition 2 /etc/fstab .
      incbak -r /backup files cp latest --partition 2 -R /home/anna /srv/back
    """
    here = settings()
    here.refuse_own(target)
    if not target.is_dir():
        hint = "Name a directory to copy into." if target.exists() else f"Make it first: mkdir {target}"
        raise UsageError(f"{target} is not a directory", hint=hint)
    console = here.reporter()
    with _library(here, backup, name, disk) as (library, _record, which):
        root = _mounted(library, library.volumes(), partition)
        nodes = [find(library, root, os.fsencode(path)) for path in paths]
        if whole := [n for n in nodes if n.kind == "directory"]:
            if not recursive:
                raise UsageError(f"{_text(whole[0].name) or '/'} is a directory", hint="Copy it with -R.")
            nodes = [each for n in nodes for each in ([n] if n.name else listed(library, n))]
        copier = Copier(library, target, which.size, force=force, setuid=setuid, report=console,
                        refuse=here.refuse_own)  # fmt: skip
        try:
            done = copier.copy(nodes)
        finally:
            console.end()
    if here.json:
        here.tell({"files": done.files, "directories": done.directories, "links": done.links,
                   "special": done.special, "bytes": done.bytes, "failed": done.failed})  # fmt: skip
    left = f", {done.special} devices, pipes and sockets left out" if done.special else ""
    here.say(f"copied {done.files} files, {done.directories} directories, {done.links} links: "
             f"{format_size(done.bytes)}{left}")  # fmt: skip
    if done.failed:
        kind = DamagedError if done.damaged else IncompleteError
        raise kind(f"{len(done.failed)} files or directories were not copied", hint="The rest is there.")


@contextmanager
def _library(
    here: Settings, backup: str, vm: str | None, disk: str | None
) -> Iterator[tuple[Library, Record, DiskRecord]]:
    with closing(here.open()) as repo:
        record = repo.find(backup, vm)
        names = ", ".join(d.name for d in record.disks)
        if disk is None and len(record.disks) != 1:
            raise UsageError(f"backup {record.id[:8]} has several disks: {names}", hint="Say which with --disk.")
        found = record.disks[0] if disk is None else record.disk(disk)
        if found is None:
            raise UsageError(f"backup {record.id[:8]} has no disk {disk!r}", hint=f"Its disks are: {names}.")
        with Library(BackupImage(repo, record, found)) as library:
            yield library, record, found


def _mounted(library: Library, volumes: list[Volume], number: int | None) -> Node:
    """The root directory of the file system that is meant."""
    readable = [v for v in volumes if v.readable]
    if number is not None:
        chosen = next((v for v in volumes if v.number == number), None)
        if chosen is None:
            raise UsageError(f"there is no partition {number}", hint=f"There are: {_told(volumes)}.")
    elif len(readable) > 1:
        hint = f"Say which with --partition: {_told(readable)}."
        raise UsageError("several partitions have file systems", hint=hint)
    else:
        chosen = readable[0] if readable else volumes[0] if len(volumes) == 1 else None
    if chosen is None:
        raise DiskError(
            f"there is no file system that can be read here, only: {_told(volumes) or 'nothing'}", hint=HINT
        )
    if not chosen.readable:
        where = f"partition {chosen.number}" if chosen.number else "the disk"
        why = f": {chosen.note}" if chosen.note else ""
        if chosen.system == "empty":
            raise DiskError(f"{where} is empty", hint="See: incbak files ls BACKUP")
        raise DiskError(f"{where} has {chosen.system}, which cannot be read here{why}", hint=HINT)
    if chosen.note:
        click.echo(one_line(f"incbak: {chosen.system} on partition {chosen.number}: {chosen.note}"), err=True)
    return library.mount(chosen)


def _told(volumes: list[Volume]) -> str:
    return ", ".join(f"{v.number} ({v.system}, {format_size(v.length)})" for v in volumes)


def _say_volumes(here: Settings, volumes: list[Volume]) -> None:
    if here.json:
        for v in volumes:
            here.tell({"partition": v.number, "start": v.start, "size": v.length, "system": v.system,
                       "readable": v.readable, "note": v.note})  # fmt: skip
        return
    rows = [["PARTITION", "START", "SIZE", "SYSTEM", "NOTE"]]
    for v in volumes:
        note = v.note or ("" if v.readable or v.system == "empty" else "see incbak export")
        rows.append([str(v.number), str(v.start), format_size(v.length), v.system, note])
    click.echo(printable(table(rows)))


def _say_nodes(here: Settings, path: str, nodes: list[Node]) -> None:
    if here.json:
        for node in nodes:
            here.tell(_as_json(path, node))
        return
    rows = [
        [mode_text(n), str(n.size), _time(n.mtime)[:19].replace("T", " "), _text(n.name) + _arrow(n)] for n in nodes
    ]
    if rows:
        click.echo(printable(table([["TYPE", "SIZE", "MODIFIED", "NAME"], *rows])))


def _as_json(path: str, node: Node) -> dict[str, Any]:
    return {
        "path": path,
        "name": os.fsdecode(node.name),
        "type": node.kind,
        "mode": f"{node.mode:04o}",
        "size": node.size,
        "modified": _time(node.mtime),
        "target": os.fsdecode(node.target) if node.kind == "symlink" else None,
    }


def _time(nanoseconds: int) -> str:
    try:
        return datetime.fromtimestamp(nanoseconds // 1_000_000_000, UTC).isoformat()
    except (ValueError, OverflowError, OSError):
        return ""


def _arrow(node: Node) -> str:
    return f" -> {_text(node.target)}" if node.kind == "symlink" else ""


def _text(name: bytes) -> str:
    """One line, whatever is in it."""
    return os.fsdecode(name).replace("\n", "\N{REPLACEMENT CHARACTER}")

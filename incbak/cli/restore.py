"""``incbak restore``."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import click

from incbak import durable
from incbak.bitmap.disown import disown
from incbak.bitmap.store import component
from incbak.cli import streams
from incbak.cli.given import VM_NAME
from incbak.cli.settings import Settings, common, one_line, printable, settings
from incbak.cli.signals import interrupt_on_ending
from incbak.errors import DamagedError, IncompleteError, RestoreError, UsageError
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository
from incbak.restore.images import InPlaceTarget, Qcow2Target
from incbak.restore.restore import Restored, restore_disk
from incbak.restore.stream import stream_disk
from incbak.restore.targets import DeviceTarget, Target, open_target
from incbak.restore.vm import restore_vm
from incbak.units import counted, format_size


@click.command(short_help="Write a disk as it was to a file, a device or an NBD export.")
@click.argument("backup")
@click.argument("target")
@click.option("--all", "everything", is_flag=True, help="The whole VM, into TARGET, a directory.")
@click.option("--disk", metavar="DISK", help="Which disk, when the backup has several.")
@click.option("--name", type=VM_NAME, help="Which VM's latest, when several share the repository.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["raw", "qcow2"]),
    help="Of the file that is made.  [default: as TARGET's suffix says, else raw]",
)
@click.option("--in-place", is_flag=True, help="Onto an image or device that is there: write only what differs.")
@click.option(
    "--salvage", is_flag=True, help="Restore what is whole of a damaged backup; the rest is zeroes. Exits 13."
)
@common
def restore(
    backup: str,
    target: str,
    everything: bool,
    disk: str | None,
    name: str | None,
    force: bool,
    form: str | None,
    in_place: bool,
    salvage: bool,
) -> None:
    """Write a disk of BACKUP to TARGET: a new file, raw or qcow2 as its suffix says, a block device, an NBD URI, or
    "-", standard output.

    BACKUP is an id, a unique prefix of one, or "latest". All that is read is verified, and all is synced before this
    says that it is done. A directory as TARGET takes all disks, each as DISK.raw (or DISK.qcow2). With --all it is
    made, and takes also what was attached and the VM's configuration (vm.json); one disk that fails does not stop the
    others, and then this exits with 3.

    \b
    Examples:
      incbak -r /backup restore latest web1.raw
      incbak -r /backup restore 1f2e3d4c /dev/vg/web1 --disk vda
      incbak -r /backup restore latest --all /srv/restored
      incbak -r /backup restore latest - | ssh other 'cat > web1.raw'
    """
    here = settings()
    if in_place and form == "qcow2":
        raise UsageError("only raw images can be restored in place", hint="Leave out --format.")
    if everything and (in_place or disk):
        raise UsageError("--all makes new files of all disks", hint="Leave out --disk and --in-place.")
    to_stdout = target == "-"
    if to_stdout:
        _refuse_for_stdout({"--all": everything, "--force": force, "--in-place": in_place, "--salvage": salvage,
                            "--format qcow2": form == "qcow2", "--json": here.json})  # fmt: skip
    elif not _SCHEME.match(target):
        here.refuse_own(Path(target))
    form = (form or "raw") if everything else form_of(target, form, in_place=in_place)
    how = _How(form, force, in_place, salvage)
    interrupt_on_ending()
    repo = here.open()
    record = repo.find(backup, name)
    if everything:
        _whole(here, repo, record, Path(target), how)
        return
    pairs = _pairs(record, target, disk, how.form)
    if to_stdout:
        _stream(here, repo, record, pairs[0][0])
        return
    done = [_one(here, repo, record, found, where, how) for found, where in pairs]
    _say_lost(record, done)


_SCHEME = re.compile(r"nbds?(\+unix)?:")
_SUFFIXES = {".qcow2": "qcow2", ".qcow": "qcow", ".raw": "raw", ".vmdk": "vmdk", ".vdi": "vdi",
             ".vhd": "vpc", ".vhdx": "vhdx", ".qed": "qed"}  # fmt: skip


def form_of(target: str, form: str | None, *, in_place: bool = False) -> str:
    """Return the format of what is made at ``target``: as its suffix says, which an option must not contradict.

    Directories, devices and NBD exports have none of their own. Raises `UsageError`.
    """
    path = Path(target)
    ready = "an NBD export" if _SCHEME.match(target) else "a device" if path.is_block_device() else ""
    if ready and form == "qcow2":
        raise UsageError(f"{target} is {ready}: a disk is restored to it as it is", hint="Leave out --format.")
    said = None if ready or path.is_dir() else _SUFFIXES.get(path.suffix.lower())
    if said not in (None, "raw", "qcow2"):
        hint = "Restore to a name that ends in .raw or .qcow2, then: qemu-img convert"
        raise UsageError(f"{target} would not be what its name says: {said} images cannot be made", hint=hint)
    if in_place:
        if said == "qcow2" and form != "raw":
            hint = "If it is a raw image in spite of its name, say so: --format raw"
            raise UsageError(f"only raw images can be restored in place, and {target} is named qcow2", hint=hint)
        return "raw"
    if form and said and form != said:
        raise UsageError(f"--format {form} contradicts the name {target}", hint="Leave out --format, or rename it.")
    return form or said or "raw"


def _refuse_for_stdout(given: dict[str, bool]) -> None:
    if options := [name for name, there in given.items() if there]:
        raise UsageError(f"{' and '.join(options)} cannot go with -, standard output", hint="Name a file instead of -.")
    if sys.stdout.fileno() in streams.CLOSED:
        raise UsageError("standard output is closed", hint="Redirect it, as in: incbak restore latest - > disk.raw")
    if sys.stdout.isatty():
        raise UsageError("standard output is a terminal", hint="Redirect it, as in: incbak restore latest - > disk.raw")


def _stream(here: Settings, repo: Repository, record: Record, disk: DiskRecord) -> None:
    """To standard output, and what is said of it to standard error."""
    console = here.reporter()
    out = sys.stdout.fileno()

    def write(content: bytes | memoryview) -> None:
        try:
            durable.write_all(out, [content])
        except BrokenPipeError:
            raise RestoreError("whoever read standard output has gone: it has not got all of the disk") from None
        except OSError as e:
            raise RestoreError(f"cannot write to standard output: {e.strerror}") from e

    try:
        stream_disk(repo, record, disk, write, report=console)
    finally:
        console.end()
    if not here.quiet:
        what = f"{record.vm} {disk.name}: backup {record.id[:8]}, {format_size(disk.size)}, verified"
        click.echo(printable(f"incbak: {what}, is on standard output"), err=True)


def _say_lost(record: Record, done: list[Restored]) -> None:
    if lost := sum(e.length for each in done for e in each.damaged):
        what = f"{counted(lost, 'byte')} of backup {record.id[:8]} could not be read and are zeroes in the target"
        raise DamagedError(what)


def _whole(here: Settings, repo: Repository, record: Record, directory: Path, how: _How) -> None:
    """All of a VM. Raises `IncompleteError` when some of it failed, and what went wrong first when no disk is there."""
    restored: list[Restored] = []

    def one(disk: DiskRecord, where: str) -> None:
        restored.append(_one(here, repo, record, disk, where, how))

    done = restore_vm(record, directory, how.form, one, force=how.force)
    for what, error in done.failed.items():
        click.echo(one_line(f"incbak: {what}: {error}"), err=True)
    if here.json:
        failed = {what: str(error) for what, error in done.failed.items()}
        here.tell({"backup": record.id, "vm": record.vm, "directory": str(directory),
                   "attachments": list(done.attachments), "failed": failed})  # fmt: skip
    if done.failed and not done.files:
        raise next(iter(done.failed.values()))
    attached = f", {counted(len(done.attachments), 'attached file')}" if done.attachments else ""
    here.say(
        printable(f"{record.vm}: {len(done.files)} of {counted(len(record.disks), 'disk')}{attached}: in {directory}")
    )
    if done.failed:
        what = f"not all of backup {record.id[:8]} is restored: {', '.join(done.failed)}"
        raise IncompleteError(what, hint="What is there is whole. Why the rest failed is above.")
    _say_lost(record, restored)


@dataclass(frozen=True)
class _How:
    """What the options say of the target, and of damage."""

    form: str
    force: bool
    in_place: bool
    salvage: bool

    def open(self, where: str, size: int) -> Target:
        """The target of one disk."""
        if self.in_place:
            return InPlaceTarget(Path(where), size)
        if self.form == "qcow2":
            return Qcow2Target(Path(where), size, force=self.force)
        return open_target(where, size, force=self.force)


def _pairs(record: Record, target: str, disk: str | None, form: str) -> list[tuple[DiskRecord, str]]:
    have = ", ".join(d.name for d in record.disks)
    if disk is not None and (found := record.disk(disk)) is None:
        raise UsageError(f"backup {record.id[:8]} has no disk {disk!r}", hint=f"Its disks are: {have}.")
    chosen = [found] if disk is not None and found else list(record.disks)
    if Path(target).is_dir():
        return [(d, str(Path(target) / f"{component(d.name)}.{form}")) for d in chosen]
    if len(chosen) != 1:
        raise UsageError(
            f"backup {record.id[:8]} has several disks: {have}", hint="Say which with --disk, or give a directory."
        )
    return [(chosen[0], target)]


def _one(here: Settings, repo: Repository, record: Record, disk: DiskRecord, where: str, how: _How) -> Restored:
    if not _SCHEME.match(where):
        here.refuse_own(Path(where))
    opened = how.open(where, disk.size)
    console = here.reporter()
    try:
        _disown(here, opened, where)
        done = restore_disk(repo, record, disk, opened, salvage=how.salvage, report=console)
    finally:
        console.end()
    if here.json:
        here.tell({"backup": record.id, "vm": record.vm, "disk": disk.name, "target": where, "size": disk.size,
                   "written": done.written, "damaged": [list(e) for e in done.damaged]})  # fmt: skip
    size, written = format_size(disk.size), format_size(done.written)
    lost = sum(extent.length for extent in done.damaged)
    state = f"verified and synced, but for {counted(lost, 'byte')} that are damaged and zeroes here" if lost else ""
    here.say(
        f"{record.vm} {disk.name}: restored {record.id[:8]} to {where}: {size}, {written} of data, "
        f"{state or 'verified and synced'}"
    )
    if isinstance(opened, InPlaceTarget):
        here.say(f"{format_size(opened.changed)} of {where} differed and were written")
    if larger := getattr(opened, "larger", 0):
        here.say(f"{where} is {larger} bytes larger than the disk; what lies behind it was left alone")
    return done


def _disown(here: Settings, opened: Target, where: str) -> None:
    """The bitmaps of a disk that is overwritten know nothing of it: they go before the first byte."""
    if isinstance(opened, DeviceTarget | InPlaceTarget):
        try:
            for name in disown(here.state_dir, Path(where)):
                here.say(f"bitmap {name} is invalid from now on: its disk is overwritten")
        except BaseException:
            opened.abandon()
            raise

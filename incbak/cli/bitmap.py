"""``incbak bitmap``: look at bitmap files, without disturbing who owns them."""

from __future__ import annotations

import asyncio
import random
from contextlib import closing
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import click

from incbak.backup.audit import Slice
from incbak.backup.recorded import recorded_format
from incbak.backup.verify import Verified, Wanted, verify
from incbak.bitmap.format import REGION, TOUCHED, Flag, layout
from incbak.bitmap.store import BitmapView, get_dirty_blocks, invalidate, views
from incbak.cli.backup import interruptible, open_waiting
from incbak.cli.configured import Configured, source_of
from incbak.cli.given import VM_NAME
from incbak.cli.own_bitmaps import remove_named, source_for, source_options
from incbak.cli.own_bitmaps import show as show_own
from incbak.cli.settings import Settings, common, printable, settings, trusts_backing
from incbak.engine.detect import Source
from incbak.errors import AuditError, BitmapError, UsageError
from incbak.report.backups import table
from incbak.report.history import PAGES, disk_map
from incbak.report.terrain import CELLS, draw
from incbak.units import format_size, parse_duration, parse_share


@click.group("bitmap", short_help="List, show, verify, invalidate and remove dirty bitmaps.")
@common
def bitmap() -> None:
    """Look at dirty bitmaps in the state directory; a bitmap is named after the backup it counts from."""


@bitmap.command("list", cls=Configured, short_help="List the bitmaps, of this host or of SOURCE.")
@click.argument("source", metavar="[SOURCE]", required=False)
@click.option("--name", type=VM_NAME, help="Only of this VM; or what the VM of SOURCE is called.")
@source_options
@common
def list_bitmaps(
    source: str | None, name: str | None, disks: tuple[str, ...], form: str | None, allow_backing: tuple[Path, ...]
) -> None:
    """List all bitmaps in the state directory with their state and dirty bytes.

    With SOURCE (qmp:SOCKET, an image, or a VM of the configuration): list the bitmaps that incbak has made there, in
    the memory of a running QEMU or stored in the image, also those of repositories that are gone.

    \b
    Example:
      incbak bitmap list --name web1
      incbak bitmap list qmp:/run/web1.qmp
    """
    here = settings()
    if source is not None:
        show_own(here, source_for(here, source_of(here, source), name, form, allow_backing), disks)
        return
    if disks or form or allow_backing:
        raise UsageError("--disk, --format and --allow-backing are for a SOURCE", hint="See: incbak bitmap list --help")
    found = views(here.state_dir, name)
    if here.json:
        for each in found:
            here.tell(_as_json(each))
        return
    rows = [["VM", "DISK", "BITMAP", "STATE", "DIRTY"]]
    rows += [[v.vm, v.disk, v.name, _state(v), format_size(_dirty(v))] for v in found]
    if found or not here.quiet:
        click.echo(printable(table(rows)) if found else "no bitmaps")


def _dirty(found: BitmapView) -> int:
    """Bytes, by numpy alone: there may be millions of runs."""
    try:
        runs = found.runs()
    except BitmapError:
        return 0
    assert found.slot
    clusters, granularity = found.slot.clusters, found.slot.granularity
    tail = clusters * granularity - found.slot.size if len(runs) and int(runs[-1].sum()) == clusters else 0
    return int(runs[:, 1].sum()) * granularity - tail


def _state(found: BitmapView) -> str:
    if found.reason:
        return f"invalid ({found.reason})"
    assert found.slot
    if found.in_use:
        return "in use"
    return "clean" if found.slot.flags & Flag.CLEAN else "unclean"


def _as_json(found: BitmapView) -> dict[str, object]:
    return {
        "vm": found.vm,
        "disk": found.disk,
        "name": found.name,
        "state": "invalid" if found.reason else _state(found),
        "reason": found.reason,
        "size": found.slot.size if found.slot else None,
        "granularity": found.slot.granularity if found.slot else None,
        "dirty": _dirty(found),
    }


def _pick(vm: str, disk: str | None, name: str | None) -> BitmapView:
    """The one bitmap meant; the newest file when no name was given. A whole name counts more than parts of others."""
    here = settings()
    matching = [v for v in views(here.state_dir, vm) if disk in (None, v.disk) and (name is None or name in v.name)]
    matching = [v for v in matching if v.name == name] or matching
    if not matching:
        raise UsageError(f"there is no such bitmap of {vm}", hint="See: incbak bitmap list")
    if len({v.disk for v in matching}) > 1:
        names = ", ".join(sorted({v.disk for v in matching}))
        raise UsageError(f"{vm} has bitmaps of several disks: {names}", hint="Say which with --disk.")
    if name is not None and len(matching) > 1:
        raise UsageError(f"several bitmaps of {vm} match {name!r}", hint="Give the whole name.")
    return max(matching, key=lambda v: v.slot.created_ns if v.slot else 0)


_pick_options = (
    click.argument("vm"),
    click.option("--disk", metavar="DISK", help="Which disk."),
    click.option("--bitmap", "name", metavar="NAME", help="Which bitmap, or part of its name.  [default: the newest]"),
)


@bitmap.command("show", short_help="Show a bitmap's header and a map of it.")
@_pick_options[0]
@_pick_options[1]
@_pick_options[2]
@click.option("--history", is_flag=True, help="Draw also how often each part changed from backup to backup.")
@common
def show(vm: str, disk: str | None, name: str | None, history: bool) -> None:
    """Show a bitmap of VM: its header, and a map of which parts of the disk are dirty.

    \b
    Example:
      incbak bitmap show web1 --disk vda
    """
    here = settings()
    found = _pick(vm, disk, name)
    if here.json:
        here.tell(_as_json(found))
        return
    lines = [f"bitmap       {found.name}", f"file         {found.path}", f"state        {_state(found)}"]
    if found.reason:
        lines.append(f"reason       {found.reason.text}")
    if slot := found.slot:
        regions, touched = slot.regions, _touched(found)
        lines += [
            f"disk         {found.disk} of {found.vm}, {slot.size} bytes",
            f"granularity  {format_size(slot.granularity)}",
            f"dirty        {format_size(_dirty(found))}",
            f"regions      {touched} of {regions} of {format_size(REGION)} touched",
        ]
        lines += _map(found) if not found.reason else []
    if history:
        lines += _history(here, found)
    click.echo(printable("\n".join(lines)))


def _touched(found: BitmapView) -> int:
    assert found.slot
    _start, coarse, _end = layout(found.slot)
    with found.path.open("rb") as f:
        f.seek(coarse)
        return f.read(found.slot.regions).count(bytes([TOUCHED]))


def _map(found: BitmapView) -> list[str]:
    """How much of each part of the disk is dirty."""
    assert found.slot
    clusters, clean = found.slot.clusters, found.clean_mask()
    cells = max(min(CELLS, clusters), 1)
    edges = [clusters * n // cells for n in range(cells + 1)]
    shares = [1 - float(clean(a, b - a).mean()) if b > a else 0.0 for a, b in pairwise(edges)]
    return [
        "map          how much of each part was written since",
        *draw(shares, found.slot.size, "some of it to all of it"),
    ]


def _history(here: Settings, found: BitmapView) -> list[str]:
    """How often each part of the disk changed from backup to backup."""
    with closing(here.open()) as repo:
        records = [r for r in repo.backups(found.vm) if r.disk(found.disk)]
        if not records:
            raise UsageError(f"there is no backup of disk {found.disk} of {found.vm}", hint="See: incbak list")
        drawn = disk_map(repo, records, found.disk, PAGES)
    if not drawn.pairs:
        return [f"history      no two backups to compare{f': {drawn.note}' if drawn.note else ''}"]
    head = f"history      in how many of {drawn.pairs} steps from backup to backup each part changed"
    shares = [count / drawn.pairs for count in drawn.times.tolist()]
    return [head, *draw(shares, drawn.size, "once to each time"), *([drawn.note] if drawn.note else [])]


@bitmap.command("dirty", short_help="List what was written since the backup.")
@_pick_options[0]
@_pick_options[1]
@_pick_options[2]
@common
def dirty(vm: str, disk: str | None, name: str | None) -> None:
    """List the dirty ranges of a bitmap of VM: offset and length in bytes.

    \b
    Example:
      incbak bitmap dirty web1 --disk vda
    """
    here = settings()
    found = _pick(vm, disk, name)
    for extent in get_dirty_blocks(here.state_dir, found.vm, found.disk, found.name):
        if here.json:
            here.tell({"offset": extent.offset, "length": extent.length})
        else:
            click.echo(f"{extent.offset} {extent.length}")


@bitmap.command("verify", short_help="Look whether what a bitmap calls clean is unchanged.")
@click.argument("source", metavar="SOURCE")
@click.option("--name", type=VM_NAME, help="What the VM is called.  [default: as the monitor or image says]")
@click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; may be repeated.")
@click.option("--exclude", multiple=True, metavar="DISK", help="Not this disk; may be repeated.")
@click.option("--lock-wait", metavar="TIME", default="0", help="Wait so long for another run of this VM.")
@trusts_backing
@click.option("--sample", metavar="PERCENT", default="100%", help="Read only so much, chosen by chance.")
@common
def verify_bitmap(
    source: str,
    name: str | None,
    disks: tuple[str, ...],
    exclude: tuple[str, ...],
    lock_wait: str,
    trust_backing: tuple[str, ...],
    sample: str,
) -> None:
    """Read what was not written since the last backup of SOURCE, and compare it with that backup.

    Of incbak serve, and of raw images and block devices that are off: the bitmaps of others are in no file of incbak.

    The guest goes on meanwhile. A bitmap that is wrong becomes invalid, so that the next incremental reads the whole
    disk; the exit code is 5 then.

    \b
    Example:
      incbak -r /backup bitmap verify qmp:/run/incbak/web1/qmp.sock --sample 5%
    """
    here = settings()
    slices = max(parse_share(sample), 1)
    part = Slice(slices, random.randrange(slices))
    wanted = Wanted(name, disks, exclude, parse_duration(lock_wait), part, trust_backing, here.state_dir)
    vm, verified = interruptible(_verify(here, Source(source, here.state_dir, name, disks), wanted))
    wrong = [v for v in verified if v.findings and v.findings.wrong]
    for each in verified:
        _tell_verified(here, vm, each)
    if wrong:
        names = ", ".join(v.planned.name for v in wrong)
        raise AuditError(
            f"the bitmap does not tell the truth about {names} of {vm}; it is invalid now",
            hint="The next incremental reads the whole disk. Find out who wrote to the image behind incbak's back.",
        )


async def _verify(here: Settings, source: Source, wanted: Wanted) -> tuple[str, list[Verified]]:
    repo = here.open()
    source = replace(source, recorded=await asyncio.to_thread(recorded_format, repo, source))
    engine = await open_waiting(source, wanted.lock_wait)
    console = here.reporter()
    try:
        return await verify(repo, engine, wanted, console)
    finally:
        console.end()
        await engine.close()
        repo.close()


def _tell_verified(here: Settings, vm: str, each: Verified) -> None:
    base, findings = each.planned.base, each.findings
    if here.json:
        ranges = [{"offset": e.offset, "length": e.length} for e in findings.wrong] if findings else []
        here.tell({"vm": vm, "disk": each.planned.name, "base": base.id if base else None,
                   "compared": findings.compared if findings else 0, "wrong": ranges})  # fmt: skip
    if findings is None or base is None:
        reason = each.planned.plan.reason
        here.say(f"{vm} {each.planned.name}: nothing to verify: {reason.text if reason else 'no bitmap'}")
        return
    result = findings.told() if findings.wrong else "no difference"
    here.say(f"{vm} {each.planned.name}: {format_size(findings.compared)} compared with {base.id[:8]}: {result}")


@bitmap.command("invalidate", short_help="Make the next backup read everything.")
@_pick_options[0]
@_pick_options[1]
@_pick_options[2]
@common
def invalidate_bitmap(vm: str, disk: str | None, name: str | None) -> None:
    """Make a bitmap of VM invalid: the next incremental reads the whole disk, and stores what differs.

    For use after the image was changed by something that incbak did not see, such as a file system repair.

    \b
    Example:
      incbak bitmap invalidate web1 --disk vda
    """
    here = settings()
    found = _pick(vm, disk, name)
    invalidate(here.state_dir, found.vm, found.disk, found.name)
    if here.json:
        here.tell({"vm": found.vm, "disk": found.disk, "name": found.name, "state": "invalid"})
    here.say(f"bitmap {found.name} of {found.disk} of {found.vm} is invalid now")


@bitmap.command("remove", cls=Configured, short_help="Remove bitmaps by name, of repositories that are gone.")
@click.argument("source", metavar="SOURCE")
@click.argument("names", metavar="BITMAP...", nargs=-1, required=True)
@click.option("--name", metavar="VM", help="What the VM is called.  [default: as the monitor or image says]")
@source_options
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@common
def remove_bitmaps(
    source: str,
    names: tuple[str, ...],
    name: str | None,
    disks: tuple[str, ...],
    form: str | None,
    allow_backing: tuple[Path, ...],
    yes: bool,
) -> None:
    """Remove each BITMAP from SOURCE: a running QEMU or incbak serve (qmp:SOCKET), or an image that is off.

    A bitmap of a repository that is gone records every write of the guest for nothing. Only bitmaps that incbak has
    made are removed, and none that a job uses. An image must be off, and neither dirty nor damaged.

    \b
    Example:
      incbak bitmap remove qmp:/run/web1.qmp incbak-1f2e3d4c-99887766
      incbak bitmap remove /vm/web1.qcow2 incbak-1f2e3d4c-99887766 --yes
    """
    here = settings()
    wanted = source_for(here, source_of(here, source), name, form, allow_backing)
    remove_named(here, replace(wanted, look=False, certain=True), names, disks, yes=yes)

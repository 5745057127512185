"""``incbak bitmap list|remove SOURCE``: bitmaps that incbak has made, in a running QEMU or stored in an image."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click

from incbak.cli.backup import interruptible, open_waiting
from incbak.cli.settings import Settings, one_line, printable
from incbak.disk.formats import OFFERED
from incbak.engine.detect import Source
from incbak.engine.own_bitmaps import OwnBitmap, choose, own_bitmaps, remove
from incbak.errors import IncbakError, UsageError
from incbak.repo.repository import Repository
from incbak.report.backups import table
from incbak.units import format_size

F = TypeVar("F", bound=Callable[..., Any])


def source_options(command: F) -> F:
    """Decorate a command with the options of a SOURCE that is looked at by its bitmaps."""
    path = click.Path(path_type=Path)
    options = (
        click.option("--disk", "disks", multiple=True, metavar="DISK", help="Only this disk; may be repeated."),
        click.option("--format", "form", type=click.Choice(OFFERED), help="Of an image: its format."),
        click.option(
            "--allow-backing", multiple=True, type=path, metavar="PATH",
            help="Of a qcow2 image: a backing or data file elsewhere; may be repeated.",
        ),
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


def source_for(here: Settings, text: str, name: str | None, form: str | None, allow_backing: Sequence[Path]) -> Source:
    """Return what the options say."""
    return Source(text, here.state_dir, name, format=form or "", allow_backing=allow_backing, look=True)


def show(here: Settings, source: Source, disks: Sequence[str]) -> None:
    """Print the bitmaps of ``source``."""
    found = interruptible(_find(source))
    found = [b for b in found if not disks or {b.disk.name, b.disk.node} & set(disks)]
    known = _repositories(here)
    if here.json:
        for each in found:
            here.tell(_as_json(each, known))
        return
    if found or not here.quiet:
        click.echo(printable(_table(found, known)) if found else one_line(f"no bitmaps of incbak in {source.text}"))


def remove_named(here: Settings, source: Source, names: Sequence[str], disks: Sequence[str], *, yes: bool) -> None:
    """Remove bitmaps once they are confirmed. The monitor or image is not held while the question is open."""
    known = _repositories(here)
    chosen = choose(interruptible(_find(source)), names, disks)
    for path in sorted({known[b.repository] for b in chosen if b.repository in known}):
        text = f"incbak: the repository {path} is at hand: after this its next backup reads the disk whole"
        click.echo(one_line(text), err=True)
    if not yes:
        _confirm(here, chosen, known)
    gone = interruptible(_remove(source, names, disks))
    for each in gone:
        if here.json:
            here.tell(_as_json(each, known) | {"action": "remove"})
        here.say(f"removed bitmap {each.info.name} of {each.disk.name}")


async def _find(source: Source) -> list[OwnBitmap]:
    engine = await open_waiting(source, 0)
    try:
        return await own_bitmaps(engine)
    finally:
        await engine.close()


async def _remove(source: Source, names: Sequence[str], disks: Sequence[str]) -> list[OwnBitmap]:
    """What was looked at before the question may have changed, so it is chosen again."""
    engine = await open_waiting(source, 0)
    try:
        chosen = choose(await own_bitmaps(engine), names, disks)
        await remove(engine, chosen)
        return chosen
    finally:
        await engine.close()


def _confirm(here: Settings, chosen: Sequence[OwnBitmap], known: dict[str, Path]) -> None:
    """Raise `UsageError` unless a person at a terminal types ``yes``."""
    if here.json or not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(
            "nothing was removed: there is no terminal to ask on", hint="Give --yes to remove without asking."
        )
    click.echo(printable(_table(chosen, known)))
    count = "1 bitmap" if len(chosen) == 1 else f"{len(chosen)} bitmaps"
    if click.prompt(f"Remove {count}? Type yes", default="no", show_default=False, err=True) != "yes":
        raise UsageError("nothing was removed: not confirmed")


def _repositories(here: Settings) -> dict[str, Path]:
    """Return the repositories that the command line and the configuration name, by the first digits of their ids."""
    named: set[Path] = set()
    with suppress(IncbakError):
        named |= {path} if (path := here.repository_named()) else set()
    with suppress(IncbakError):
        config = here.configuration()
        named |= {Path(vm.repository) for name in config.vms if (vm := config.vm(name)).repository}
    found = {}
    for path in sorted(named):
        with suppress(IncbakError, OSError):
            found[Repository.look(path)[1].id[:8]] = path
    return found


def _table(found: Sequence[OwnBitmap], known: dict[str, Path]) -> str:
    rows = [["DISK", "SIZE", "BITMAP", "REPOSITORY", "GRANULARITY", "DIRTY", "STATE"]]
    for each in found:
        info = each.info
        unsound = info.inconsistent or info.reason
        rows.append([
            each.disk.name, format_size(each.disk.size), info.name, str(known.get(each.repository, "not at hand")),
            format_size(info.granularity), "" if unsound else format_size(info.count), each.state,
        ])  # fmt: skip
    return table(rows)


def _as_json(each: OwnBitmap, known: dict[str, Path]) -> dict[str, object]:
    """``dirty`` in bytes; ``null`` where the bitmap cannot be believed. ``path``: of the repository, if it is known."""
    info = each.info
    unsound = bool(info.inconsistent or info.reason)
    return {
        "disk": each.disk.name, "node": each.disk.node, "size": each.disk.size, "name": info.name,
        "repository": each.repository, "backup": each.backup,
        "path": str(known[each.repository]) if each.repository in known else None,
        "granularity": info.granularity, "dirty": None if unsound else info.count, "state": each.state,
        "recording": info.recording, "busy": info.busy, "persistent": info.persistent,
        "inconsistent": info.inconsistent, "reason": info.reason,
    }  # fmt: skip

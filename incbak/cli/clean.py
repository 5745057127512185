"""``incbak clean``: what backup runs that were killed have left in a running QEMU."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence

import click

from incbak.backup.vm import locked, vm_name
from incbak.cli.backup import interruptible, open_waiting
from incbak.cli.configured import Configured, source_of
from incbak.cli.settings import Settings, common, settings
from incbak.engine.base import Engine, Leftover
from incbak.engine.detect import Source
from incbak.engine.leftovers import remove
from incbak.errors import IncompleteError, LockedError, UsageError
from incbak.units import parse_duration


@click.command("clean", cls=Configured, short_help="Remove what a killed backup run has left in a running QEMU.")
@click.argument("source", metavar="SOURCE")
@click.option("--name", metavar="VM", help="What the VM is called.  [default: as the monitor says]")
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@click.option("--monitor-wait", metavar="TIME", default="20", help="Wait so long while another client has the monitor.")
@common
def clean(source: str, name: str | None, yes: bool, monitor_wait: str) -> None:
    """Remove the nodes and filters that a killed run has left in the QEMU of SOURCE. The guest goes on.

    The next backup into the same repository does so too. Until then a migration of the VM fails. Of the repository
    that -r or the configuration names, this waits for no run and disturbs none. For others it asks whether a backup
    into them may be at work. Bitmaps stay: see incbak bitmap remove.

    \b
    Example:
      incbak -r /backup clean qmp:/run/web1.qmp
    """
    here = settings()
    wait = max(parse_duration(monitor_wait), 0.5)
    wanted = Source(source_of(here, source), here.state_dir, name, monitor_wait=wait)
    if not wanted.text.startswith("qmp:"):
        raise UsageError("only a running QEMU has leftovers of a run", hint="Write qmp:/path/of/the/monitor.")
    foreign = interruptible(_clean(here, wanted))
    _refuse_working(foreign)
    if foreign and not yes:
        _confirm(here, foreign)
    if foreign:
        interruptible(_clean_foreign(here, wanted, [each.run for each in foreign]))


async def _clean(here: Settings, wanted: Source) -> list[Leftover]:
    """Remove those of the repository at hand, whose runs are dead when the VM's lock is free; return the others."""
    engine = await open_waiting(wanted, 0)
    try:
        found = await engine.leftovers()
        if not found:
            here.say("nothing of incbak but bitmaps is in the engine")
        if not found or here.repository_named() is None:
            return found
        repo = await asyncio.to_thread(here.open)
        try:
            if ours := [each for each in found if each.repository == repo.id[:8]]:
                async with locked(repo, await vm_name(engine, wanted.name), 0):
                    await _remove(here, engine, ours)
            return [each for each in found if each not in ours]
        finally:
            await asyncio.to_thread(repo.close)
    finally:
        await engine.close()


async def _clean_foreign(here: Settings, wanted: Source, runs: Sequence[str]) -> None:
    engine = await open_waiting(wanted, 0)
    try:
        found = [each for each in await engine.leftovers() if each.run in runs]
        _refuse_working(found)
        await _remove(here, engine, found)
    finally:
        await engine.close()


def _refuse_working(found: Sequence[Leftover]) -> None:
    if working := [each.run for each in found if each.at_work]:
        raise LockedError(f"a backup is at work in QEMU: {', '.join(working)}", hint="Run again when it has ended.")


async def _remove(here: Settings, engine: Engine, leftovers: Sequence[Leftover]) -> None:
    """Remove them and look again. Raises `IncompleteError` where something stays."""
    for each in leftovers:
        for what in await remove(engine, each):
            here.say(f"removed {what}")
        if here.json:
            here.tell({"run": each.run, "repository": each.repository, "nodes": list(each.nodes), "action": "remove"})
    runs = {each.run for each in leftovers}
    if left := [node for each in await engine.leftovers() if each.run in runs for node in each.nodes]:
        hint = "End what uses them (a block job, a filter of another program), and run again."
        raise IncompleteError(f"still in QEMU: {', '.join(left)}", hint=hint)


def _confirm(here: Settings, foreign: Sequence[Leftover]) -> None:
    """Raise `UsageError` unless a person at a terminal types ``yes``."""
    named = ", ".join(map(str, foreign))
    what = f"these are of a repository that is not at hand: {named}"
    if here.json or not (sys.stdin and sys.stdin.isatty()):
        hint = "If no backup of the VM is at work, give --yes. Else name their repository with -r."
        raise UsageError(f"not removed: {what}", hint=hint)
    click.echo(f"incbak: {what}", err=True)
    if (
        click.prompt("Is no backup at work? Type yes to remove them", default="no", show_default=False, err=True)
        != "yes"
    ):
        raise UsageError("not removed: not confirmed")

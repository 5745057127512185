"""``incbak remove``: backups removed by name."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from incbak.cli.prune import grace_option, lock_wait_option, note_removed
from incbak.cli.settings import Settings, common, printable, settings
from incbak.errors import LockedError, UsageError
from incbak.repo.prune import Options
from incbak.repo.remove import Chosen, Removal, choose, choose_all, remove
from incbak.repo.repository import Repository
from incbak.report.backups import chosen_table
from incbak.units import counted, format_size, parse_duration


@click.command("remove", short_help="Remove backups by name, also the newest.")
@click.argument("backups", metavar="[BACKUP]...", nargs=-1)
@click.option("--all-of", metavar="VM", help="Every backup of this VM.")
@click.option("--yes", is_flag=True, help="Do not ask; needed where there is no terminal.")
@click.option("--dry-run", is_flag=True, help="Show what would be removed, and remove nothing.")
@grace_option
@lock_wait_option
@common
def remove_command(
    backups: tuple[str, ...], all_of: str | None, yes: bool, dry_run: bool, grace: str, lock_wait: str
) -> None:
    """Remove each BACKUP, an id or a unique prefix of one. Unlike prune, it also removes the newest and the last good
    backup, and records that cannot be read. Pinned backups are refused; if one is pinned, nothing is removed.

    The next backup of a VM whose newest was removed reads its disks whole.

    \b
    Example:
      incbak -r /backup remove 1f2e3d4c
      incbak -r /backup remove --all-of web1 --grace 0
    """
    here = settings()
    if bool(backups) == bool(all_of):
        raise UsageError("no backup was named" if not backups else "--all-of names all of a VM, and others were named",
                         hint="Give the ids of backups, or --all-of VM.")  # fmt: skip
    options = Options(grace=parse_duration(grace), lock_wait=parse_duration(lock_wait))
    repo = here.open()
    console = here.reporter()
    try:
        chosen = choose_all(repo, all_of) if all_of else choose(repo, backups)
        _warn_unreadable(repo, all_of)
        if dry_run or not yes:
            _show(here, chosen)
        if dry_run:
            here.say(f"would remove {_count(chosen)}")
            return
        if not yes:
            _confirm(here, chosen)
        done = remove(repo, [each.id for each in chosen], options, console)
        note_removed(here, repo, done.removed)
    finally:
        console.end()
        repo.close()
    _report(here, chosen, done)


def _warn_unreadable(repo: Repository, vm: str | None) -> None:
    if vm and repo.unreadable:
        text = f"incbak: {counted(len(repo.unreadable), 'record')} cannot be read and may be of {vm}: "
        click.echo(printable(text + ", ".join(sorted(name[:8] for name in repo.unreadable))), err=True)


def _show(here: Settings, chosen: Sequence[Chosen]) -> None:
    if here.json:
        for each in chosen:
            here.tell(_as_json(each) | {"action": "would remove"})
        return
    click.echo(printable(chosen_table([(each.id, each.record) for each in chosen])))


def _confirm(here: Settings, chosen: Sequence[Chosen]) -> None:
    """Raise `UsageError` unless a person at a terminal types ``yes``."""
    if here.json or not (sys.stdin and sys.stdin.isatty()):
        raise UsageError(
            "nothing was removed: there is no terminal to ask on", hint="Give --yes to remove without asking."
        )
    if click.prompt(f"Remove {_count(chosen)} for good? Type yes", default="no", show_default=False, err=True) != "yes":
        raise UsageError("nothing was removed: not confirmed")


def _report(here: Settings, chosen: Sequence[Chosen], done: Removal) -> None:
    if here.json:
        for each in chosen:
            here.tell(_as_json(each) | {"action": "remove"})
        here.tell({"summary": True, "removed": len(done.removed), "freed": done.freed, "waiting": done.waiting})
    waiting = f", {format_size(done.waiting)} will be after the grace period" if done.waiting else ""
    here.say(f"removed {_count(chosen)}; {format_size(done.freed)} freed{waiting}")
    if isinstance(done.trouble, LockedError):
        text = "incbak: another run is at work, so what only they needed is freed by a later prune"
        click.echo(text, err=True)
    elif done.trouble:
        raise done.trouble


def _as_json(each: Chosen) -> dict[str, object]:
    return {"id": each.id, "vm": each.record.vm if each.record else None}


def _count(chosen: Sequence[Chosen]) -> str:
    return counted(len(chosen), "backup")

"""``incbak prune``, ``pin`` and ``unpin``."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import click
import msgspec

from incbak.cli.given import VM_NAME
from incbak.cli.settings import Settings, common, one_line, printable, settings
from incbak.errors import DamagedError, DurabilityError, LockedError, UsageError
from incbak.events import Reporter, Warned
from incbak.fleet.config import Keep
from incbak.repo import pins
from incbak.repo.prune import Options, Outcome, Rules, dry_run, prune
from incbak.repo.repository import Repository
from incbak.repo.retention import Decision, Policy
from incbak.report.backups import pruning
from incbak.units import counted, format_size, parse_duration, parse_retention

C = TypeVar("C", bound=Callable[..., Any])

_COUNTS = {
    "last": "Keep the newest N backups.",
    "hourly": "Keep the newest backup of each of the newest N hours that have one.",
    "daily": "The same for days,",
    "weekly": "for weeks,",
    "monthly": "for months,",
    "yearly": "for years.",
}


grace_option = click.option(
    "--grace",
    metavar="TIME",
    default="1d",
    show_default=True,
    help="Keep unreferenced data for TIME before deleting it: a restore may still read it.",
)
lock_wait_option = click.option(
    "--lock-wait",
    metavar="TIME",
    default="1m",
    show_default=True,
    help="Wait up to TIME for a moment without backups, in which data can be marked for deletion.",
)


def _rules(command: C) -> C:
    for rule, text in reversed(_COUNTS.items()):
        kind = click.IntRange(min=0)
        command = click.option(f"--keep-{rule}", rule, type=kind, default=0, metavar="N", help=text)(command)
    return command


@click.command("prune", short_help="Remove backups that no rule keeps, and content that nothing needs.")
@click.option("--name", type=VM_NAME, help="Only backups of this VM.  [default: of each VM, by the same rules]")
@click.option("--all", "all_vms", is_flag=True, help="Of each VM in the configuration, by its own rules there.")
@_rules
@click.option(
    "--keep-within",
    "within",
    metavar="TIME",
    help="Keep backups made within TIME (restic's units, as in 1y6m or 14d) before the newest.",
)
@click.option("--keep-tag", "tags", multiple=True, metavar="TAG", help="Keep what has this tag; may be repeated.")
@grace_option
@click.option(
    "--repack-below",
    metavar="PERCENT",
    default="50%",
    show_default=True,
    help="Copy the needed part out of packs in which less than this is needed.",
)
@lock_wait_option
@click.option("--dry-run", is_flag=True, help="Say what would be kept and removed, and why.")
@common
def prune_command(
    name: str | None,
    all_vms: bool,
    within: str | None,
    tags: tuple[str, ...],
    grace: str,
    repack_below: str,
    lock_wait: str,
    dry_run: bool,
    **counts: int,
) -> None:
    """Remove the backups of each VM that no --keep rule keeps. What they alone needed goes when the grace is over, by a
    later prune: let it run from cron.

    Rules are as in restic, and any of them is enough: 6m is six months. Backups are ordered as they were made, whatever
    clocks say; hours, days and so on are in UTC. Never removed: pinned backups, the newest that is good, what cannot be
    read, and backups whose time is in the future.

    \b
    Example:
      incbak -r /backup prune --keep-daily 7 --keep-weekly 4 --keep-monthly 12
      incbak -q prune --all
    """
    here = settings()
    policy = Policy(within=parse_retention(within) if within else 0.0, tags=tags, **counts)
    options = None if dry_run else Options(parse_duration(grace), _share(repack_below), parse_duration(lock_wait))
    if not all_vms:
        _run(here, policy, name, options)
        return
    if name or not policy.empty:
        raise UsageError("--all is for all VMs of the configuration, by the rules there", hint="Leave the others out.")
    config = here.configuration()
    for repository, rules in _configured(here).items():
        here.repository, here.vm = repository, config.vm(next(iter(rules)))
        here.__dict__.pop("passphrase", None)
        _run(here, rules, None, options)


def _configured(here: Settings) -> dict[Path, dict[str, Policy]]:
    """The rules of the VMs that have some, by repository. Raises `UsageError` when none has."""
    config = here.configuration()
    found: dict[Path, dict[str, Policy]] = {}
    for name in config.vms:
        vm = config.vm(name)
        if keep := vm.keep:
            typed = "repository" in here.typed or not vm.repository
            where = here.repository_path() if typed else Path(vm.repository)
            found.setdefault(where, {})[name] = policy_of(keep)
        else:
            here.say(f"{name}: the configuration has no rules, nothing is removed")
    if not found:
        raise UsageError("no VM of the configuration has rules", hint="Write [vms.NAME.keep], or [defaults.keep].")
    return found


def policy_of(keep: Keep) -> Policy:
    """The rules that a table of the configuration holds."""
    values = msgspec.structs.asdict(keep)
    return Policy(**{**values, "within": parse_retention(keep.within) if keep.within else 0.0})


def prune_after(here: Settings, repo: Repository, vm: str, policy: Policy, report: Reporter) -> None:
    """Prune a VM's backups when one was made. What another run does not let go now goes another time.

    Raises `IncbakError` when it could not be done for another reason.
    """
    try:
        done = prune(repo, policy, vm, Options(), report)
    except LockedError as e:
        report(Warned(f"{vm}: pruned another time: {e}"))
        return
    _note(here, repo, done)
    here.say(printable(_counted(vm, done)))
    if done.trouble and not isinstance(done.trouble, LockedError):
        raise done.trouble


def note_removed(here: Settings, repo: Repository, removed: Collection[str]) -> None:
    """Remember that this host removed these backups, so that their absence raises no alarm."""
    with suppress(DurabilityError):  # the next backup of the VM would then warn of what is no trouble
        here.memory.pruned(repo, removed)


def _note(here: Settings, repo: Repository, done: Outcome) -> None:
    note_removed(here, repo, [d.record.id for d in done.decisions if not d.keep])


def _counted(vm: str, done: Outcome) -> str:
    of_vm = [d.keep for d in done.decisions if d.record.vm == vm]
    return f"{vm}: {counted(sum(of_vm), 'backup')} kept, {len(of_vm) - sum(of_vm)} removed"


def _run(here: Settings, rules: Rules, name: str | None, options: Options | None) -> None:
    repo = here.open()
    console = here.reporter()
    try:
        done = prune(repo, rules, name, options, console) if options else dry_run(repo, rules, name)
    finally:
        console.end()
        repo.close()
    if options:
        _note(here, repo, done)
    _tell(here, done, dry=options is None)
    if done.trouble:
        raise done.trouble
    if done.unreadable:
        why = "; ".join(done.unreadable.values())
        raise DamagedError(f"{counted(len(done.unreadable), 'record')} cannot be read: {why}", hint="Run: incbak check")


def _tell(here: Settings, done: Outcome, *, dry: bool) -> None:
    removed = sum(not d.keep for d in done.decisions)
    kept = len(done.decisions) - removed
    if here.json:
        for decision in done.decisions:
            here.tell(_as_json(decision))
        for ident in done.unreadable:
            here.tell({"id": ident, "vm": None, "action": "keep", "reasons": ["unreadable"]})
        here.tell({"summary": True, "dry_run": dry, "kept": kept + len(done.unreadable), "removed": removed,
                   "freed": done.freed, "condemned": done.condemned, "repacked_packs": done.repacked,
                   "waiting": done.waiting})  # fmt: skip
    if dry:
        here.say(pruning(done.decisions), lines=True)
        here.say(f"would keep {counted(kept, 'backup')} and remove {removed}")
        return
    for vm in dict.fromkeys(d.record.vm for d in done.decisions):
        here.say(printable(_counted(vm, done)))
        if any("no good backup" in d.reasons for d in done.decisions if d.record.vm == vm):
            what = f"no newer backup of {vm} is good, so more are kept than the rules say; see: incbak check"
            click.echo(one_line(f"incbak: {what}"), err=True)
    waiting = f", {format_size(done.waiting)} will be when the grace is over" if done.waiting else ""
    here.say(f"{format_size(done.freed)} freed{waiting}")


def _as_json(decision: Decision) -> dict[str, Any]:
    record = decision.record
    action = "keep" if decision.keep else "remove"
    return {"id": record.id, "vm": record.vm, "action": action, "reasons": list(decision.reasons)}


def _share(text: str) -> float:
    try:
        percent = float(text.strip().removesuffix("%"))
    except ValueError:
        percent = -1.0
    if not 0 <= percent <= 100:
        raise UsageError(f"not a percentage: {text!r}", hint="Write a number from 0 to 100, as in 50%.")
    return percent / 100


@click.command(short_help="Keep a backup, whatever prune is told.")
@click.argument("backup")
@click.option("--name", type=VM_NAME, help="Which VM's latest.")
@common
def pin(backup: str, name: str | None) -> None:
    """Pin BACKUP: an id, a unique prefix of one, or "latest". No prune removes it until it is unpinned.

    \b
    Example:
      incbak -r /backup pin 1f2e3d4c
    """
    here = settings()
    repo = here.open()
    ident = repo.find(backup, name).id
    new = pins.pin(repo.storage, ident)
    _told(here, ident, pinned=True, text="pinned" if new else "is pinned already")


@click.command(short_help="Take the pin from a backup.")
@click.argument("backup")
@click.option("--name", type=VM_NAME, help="Which VM's latest.")
@common
def unpin(backup: str, name: str | None) -> None:
    """Take the pin from BACKUP: an id, a unique prefix of one, or "latest".

    \b
    Example:
      incbak -r /backup unpin 1f2e3d4c
    """
    here = settings()
    repo = here.open()
    ident = repo.find(backup, name).id
    was = pins.unpin(repo.storage, ident)
    _told(here, ident, pinned=False, text="is not pinned any more" if was else "was not pinned")


def _told(here: Settings, ident: str, *, pinned: bool, text: str) -> None:
    if here.json:
        here.tell({"id": ident, "pinned": pinned})
    here.say(f"{ident[:8]} {text}")

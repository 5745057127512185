"""``incbak sync``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from incbak.cli.given import VM_NAME
from incbak.cli.passphrase import TARGET_PREFIX, Passphrase
from incbak.cli.settings import Settings, common, one_line, settings
from incbak.cli.signals import interrupt_on_ending
from incbak.errors import DamagedError, IncompleteError, UsageError
from incbak.repo.ids import is_id
from incbak.repo.record import Record
from incbak.sync.copy import Options, Outcome, plan, sync
from incbak.units import counted, format_size, parse_duration


@click.command("sync", short_help="Copy backups to another repository.")
@click.argument("target", type=click.Path(path_type=Path), required=False)
@click.option("--name", "names", multiple=True, type=VM_NAME, help="Only backups of this VM; may be repeated.")
@click.option("--last", type=click.IntRange(min=1), metavar="N", help="At most the newest N of each VM.")
@click.option("--lock-wait", metavar="TIME", default="0", help="Wait so long for another run on the VM in TARGET.")
@click.option("--dry-run", is_flag=True, help="Say what would be copied.")
@common
def sync_command(target: Path | None, names: tuple[str, ...], last: int | None, lock_wait: str, dry_run: bool) -> None:
    """Copy the backups that were made since the last sync to TARGET, another repository, oldest first; without TARGET,
    to that of the table [sync] in the configuration.

    Only what TARGET lacks is read, and all of it is verified. The copies keep their ids; what was pruned from TARGET
    does not come back, so it can keep more, or less, than the repository itself. A backup of which something is damaged
    is passed over, and tried again by each later sync; if others were copied, this exits with 3. Either may be
    encrypted: TARGET's passphrase comes from INCBAK_TARGET_PASSWORD_FILE, INCBAK_TARGET_PASSWORD_COMMAND or
    INCBAK_TARGET_PASSWORD_FD, or is asked for.

    \b
    Example:
      incbak init /mnt/offsite
      incbak -r /backup sync /mnt/offsite
    """
    here = settings()
    options = Options(names, last, parse_duration(lock_wait), memory=here.memory)
    interrupt_on_ending()
    path, passphrase = _target(here, target)
    other = here.open_other(path, passphrase)
    source = here.open()
    console = here.reporter()
    try:
        if dry_run:
            planned = plan(source, other, options, console)
            records = [r for each in planned.copy.values() for r in each]
            done = Outcome([], dict(planned.refused), planned.held, source.unreadable)
            _tell(here, "copy", records)
        else:
            done = sync(source, other, options, console)
            _tell(here, "copied", done.copied)
    finally:
        console.end()
        source.close()
        other.close()
    _conclude(here, done)


def _target(here: Settings, given: Path | None) -> tuple[Path, Passphrase]:
    """Where it is, and its passphrase. Raises `UsageError`."""
    if given:
        return given, Passphrase(prefix=TARGET_PREFIX, what="the target")
    said = here.configuration().sync
    if not said.target:
        raise UsageError(
            "missing argument TARGET", hint="Name another repository, or write [sync] in the configuration."
        )
    passphrase = Passphrase(said.password_file, said.password_command, prefix=TARGET_PREFIX, what="the target")
    return Path(said.target), passphrase


def _tell(here: Settings, action: str, records: list[Record]) -> None:
    size = sum(d.stored for r in records for d in r.disks)
    if here.json:
        for record in records:
            here.tell(_as_json(record, action))
    for record in records:
        stored = f", stored {format_size(sum(d.stored for d in record.disks))}" if action == "copied" else ""
        here.say(f"{record.vm}: {record.id[:8]} of {record.started}{stored}")
    if action == "copied":
        here.say(f"{counted(len(records), 'backup')} copied, {format_size(size)} stored")
    else:
        here.say(f"would copy {counted(len(records), 'backup')}")


def _as_json(record: Record, action: str) -> dict[str, Any]:
    stored = sum(d.stored for d in record.disks) if action == "copied" else None
    return {"id": record.id, "vm": record.vm, "action": action, "stored": stored}


def _conclude(here: Settings, done: Outcome) -> None:
    """Raises what went wrong, if anything did."""
    failed = list(done.failed.items())
    if here.json:
        for what, error in failed:
            here.tell({"what": what, "action": "failed", "error": str(error)})
    for _, error in failed[0 if done.copied else 1 :]:
        click.echo(one_line(f"incbak: not copied: {error}"), err=True)
    if failed and not done.copied:
        raise failed[0][1]
    if failed:
        names = ", ".join(what[:8] if is_id(what) else what for what, _ in failed)
        raise IncompleteError(f"not copied: {names}", hint="Why is above. The others are copied.")
    if done.unreadable:
        why = "; ".join(done.unreadable.values())
        raise DamagedError(f"{counted(len(done.unreadable), 'record')} cannot be read: {why}", hint="Run: incbak check")

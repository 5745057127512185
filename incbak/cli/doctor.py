"""``incbak doctor``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import click

from incbak.cli.backup import interruptible
from incbak.cli.configured import Configured, source_of
from incbak.cli.given import VM_NAME
from incbak.cli.settings import Settings, common, one_line, settings
from incbak.doctor.finding import Finding, Level, guarded, ok
from incbak.doctor.host import look_at_host
from incbak.doctor.repository import look_at_repository
from incbak.doctor.source import look_at_source
from incbak.engine.detect import Source
from incbak.errors import IncbakError, UsageError
from incbak.fleet.config import default_path
from incbak.units import parse_duration

_LABEL = {Level.OK: "ok     ", Level.WARNING: "WARNING", Level.FAULT: "FAULT  "}


@click.command(cls=Configured, short_help="Look for what would spoil a backup of this host, or of a VM.")
@click.argument("source", metavar="[SOURCE]", required=False)
@click.option("--name", type=VM_NAME, help="What the VM is called.  [default: as the monitor or image says]")
@click.option(
    "--scratch-dir", type=click.Path(path_type=Path), metavar="DIR", help="As for backups.  [default: /var/tmp]"
)
@click.option("--monitor-wait", metavar="TIME", default="20", help="Wait so long while another client has the monitor.")
@common
def doctor(source: str | None, name: str | None, scratch_dir: Path | None, monitor_wait: str) -> None:
    """Look at this host, at the repository that -r or the configuration names, and at a VM or image if SOURCE does.
    Changes nothing.

    SOURCE is as for backups. For a VM it lists each disk, whether its bitmaps outlast a restart, and what is left out
    of backups, with the reason. Exits with 1 when there is a fault; warnings alone leave 0. With -q only warnings and
    faults are printed.

    \b
    Example:
      incbak doctor -r /backup qmp:/run/web1.qmp
      incbak doctor web1
    """
    here = settings()
    wait = max(parse_duration(monitor_wait), 0.5)
    found = look_at_host(here.state_dir) + guarded("configuration", lambda: _configuration(here))
    if repository := _repository(here):
        found += look_at_repository(repository, here.memory, here.open)
    if source:
        wanted = Source(
            source_of(here, source), here.state_dir, name, scratch_dir=scratch_dir, monitor_wait=wait, look=True
        )
        if here.vm:
            wanted = replace(wanted, format=here.vm.format, allow_backing=[Path(p) for p in here.vm.allow_backing])
        found += interruptible(look_at_source(wanted))
    _print(here, found)
    faults = sum(f.level is Level.FAULT for f in found)
    if faults:
        raise IncbakError(f"{faults} of {len(found)} looks found a fault", hint="Mend them from the top.")


def _repository(here: Settings) -> Path | None:
    """What is named; a configuration that cannot be read is told of by another look."""
    try:
        return here.repository_named()
    except UsageError:
        return None


def _configuration(here: Settings) -> list[Finding]:
    path = here.config or default_path()
    if not path.exists() and not here.config:
        return [ok("configuration", f"there is none ({path})")]
    return [ok("configuration", f"{path}, {len(here.configuration().vms)} VMs")]


def _print(here: Settings, found: Sequence[Finding]) -> None:
    for each in found:
        if here.json:
            here.tell({"level": each.level, "what": each.what, "text": each.text, "hint": each.hint})
        elif not here.quiet or each.level is not Level.OK:
            _line(each)


def _line(each: Finding) -> None:
    click.echo(one_line(f"{_LABEL[each.level]}  {each.what}: {each.text}"))
    if each.hint:
        click.echo(one_line(f"         {each.hint}"))

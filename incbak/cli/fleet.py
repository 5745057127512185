"""``incbak config`` and ``incbak schedule``."""

from __future__ import annotations

import os
import pwd
import shutil
import sys
from pathlib import Path

import click

from incbak import durable
from incbak.cli.encodable import refuse_unencodable_path
from incbak.cli.settings import Settings, common, printable, settings
from incbak.errors import UsageError
from incbak.fleet import schedule as schedules
from incbak.fleet.config import Config, default_path
from incbak.newfile import refuse_irreplaceable
from incbak.report.backups import table


@click.group(short_help="Check the configuration.")
@common
def config() -> None:
    """The configuration: VMs by name, so that incbak incremental web1 knows the rest.

    It is /etc/incbak/incbak.toml for root, ~/.config/incbak/incbak.toml for others, or what --config or INCBAK_CONFIG
    names. A VM's table holds the options of full and incremental by their long names.

    \b
    Example:
      [defaults]
      repository = "/backup"
      lock-wait = "10m"
      [vms.web1]
      source = "qmp:/run/web1.qmp"
      attach = ["/etc/libvirt/qemu/web1.xml"]
      metrics = "/var/lib/prometheus/node-exporter/incbak-web1.prom"
      [vms.web1.keep]
      daily = 14
      [vms.web1.hooks]
      failed = ["/usr/local/bin/page-me"]
      [sync]
      target = "/mnt/offsite"
    """


@config.command(short_help="Read the configuration, and say what is wrong with it.")
@common
def check() -> None:
    """List the VMs; exits with 2 and names file, key and what is expected where something is wrong.

    \b
    Example:
      incbak config check --config /etc/incbak/incbak.toml
    """
    here = settings()
    found, path = _read(here)
    names = sorted(found.vms)
    if here.json:
        for name in names:
            here.tell({"vm": name, "source": found.vm(name).source, "repository": found.vm(name).repository})
        return
    rows = [[name, found.vm(name).source, found.vm(name).repository] for name in names]
    here.say(table([["VM", "SOURCE", "REPOSITORY"], *rows]) if rows else f"{path} has no VM", lines=True)


@click.group(short_help="Print lines for cron, or units for systemd.")
@common
def schedule() -> None:
    """Regular backups of the VMs of the configuration."""


@schedule.command(short_help="Print them; installs nothing.")
@click.argument("kind", type=click.Choice(["cron", "systemd"]))
@click.option("--to", type=click.Path(path_type=Path, file_okay=False), metavar="DIR", help="Write the units there.")
@common
def show(kind: str, to: Path | None) -> None:
    """Print lines for /etc/cron.d, or units for /etc/systemd/system: backups of all VMs each night, drills, prunes and
    syncs where the configuration has their tables, and for each VM whose table says so, incbak serve or incbak watch.
    What is left out is said on stderr.

    \b
    Example:
      incbak schedule show systemd --to /etc/systemd/system && systemctl daemon-reload
    """
    here = settings()
    if to:
        here.refuse_own(to)
    found, path = _read(here)
    refuse_unencodable_path("the path of the configuration", [path])
    for each in schedules.left_out(kind, found):
        click.echo(printable(f"incbak: {each}"), err=True)
    program = _program()
    state = _state_dir(here, found)
    options = ("--config", str(path.absolute()), *(("--state-dir", str(state)) if state else ()))
    if kind == "cron":
        if to:
            raise UsageError(
                "--to is for systemd's units", hint="Write: incbak schedule show cron > /etc/cron.d/incbak"
            )
        click.echo(schedules.cron(program, options, found, _user()), nl=False)
        return
    for name, text in schedules.systemd(program, options, found, state).items():
        if to:
            refuse_irreplaceable(to / name)
            durable.write_new(to / name, [text.encode()], replace=True, mode=0o644)
            here.say(f"wrote {to / name}")
        else:
            click.echo(printable(f"# {name}\n{text}"))


def _program() -> str:
    """Return the path of the command that runs, for lines that run without its environment.

    ``python -m incbak`` has no such path, but there is a command beside its interpreter or on ``PATH``. Raises
    `UsageError` where there is none.
    """
    beside = Path(sys.executable).with_name("incbak")
    for candidate in (Path(sys.argv[0]).absolute(), beside, Path(shutil.which("incbak") or beside)):
        if candidate.name == "incbak" and candidate.is_file() and os.access(candidate, os.X_OK):
            return str(candidate)
    raise UsageError("the command incbak is not on PATH", hint="Install the package, so that there is one to run.")


def _state_dir(here: Settings, found: Config) -> Path | None:
    """Where bitmaps are: as given, else as the environment says for a configuration that does not.

    What is printed runs without this command's options, and in another environment.
    """
    configured = any(found.vm(name).state_dir for name in found.vms)
    given = here.state or (None if configured else os.environ.get("INCBAK_STATE_DIR"))
    return Path(given).absolute() if given else None


def _user() -> str:
    """The name, or the number where there is no name."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return str(os.getuid())


def _read(here: Settings) -> tuple[Config, Path]:
    path = here.config or default_path()
    if not path.exists():
        raise UsageError(f"there is no configuration {path}", hint="See: incbak config --help")
    return here.configuration(), path

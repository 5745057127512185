"""The command line: one group, one place where an error becomes a message and an exit code."""

from __future__ import annotations

import importlib
import logging
import sys
import traceback
import warnings
from types import MappingProxyType
from typing import NoReturn

import click

from incbak import __version__
from incbak.cli import interrupts, streams
from incbak.cli.settings import common, debugging, one_line, printable
from incbak.errors import IncbakError

_COMMANDS = MappingProxyType(
    {
        "init": "repository:init",
        "full": "backup:full",
        "incremental": "backup:incremental",
        "inc": "backup:incremental",
        "status": "status:status",
        "list": "repository:list_backups",
        "show": "repository:show",
        "diff": "repository:diff",
        "restore": "restore:restore",
        "report": "report:report",
        "check": "repository:check",
        "drill": "drill:drill_command",
        "prune": "prune:prune_command",
        "remove": "remove:remove_command",
        "sync": "sync:sync_command",
        "pin": "prune:pin",
        "unpin": "prune:unpin",
        "export": "export:export",
        "files": "files:files",
        "bitmap": "bitmap:bitmap",
        "serve": "serve:serve",
        "watch": "watch:watch",
        "clean": "clean:clean",
        "doctor": "doctor:doctor",
        "config": "fleet:config",
        "schedule": "fleet:schedule",
        "key": "key:key",
        "man": "man:man",
    }
)
"""Where each command is: its module is imported when it is needed, so that a start is quick."""

_ACTS = frozenset(
    {
        *("init", "full", "incremental", "inc", "restore", "check", "drill", "prune", "remove", "sync", "clean"),
        *("pin", "unpin", "key", "report", "export", "serve", "watch"),
    }
)
"""Commands whose work is another than their output."""


Resolved = tuple[str | None, click.Command | None, list[str]]


class Lazy(click.Group):
    """A group that imports a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in _COMMANDS if name != "inc"]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, attribute = _COMMANDS[cmd_name].partition(":")
        found: click.Command = getattr(importlib.import_module(f"incbak.cli.{module}"), attribute)
        return found

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Resolved:
        resolved = super().resolve_command(ctx, args)
        if resolved[0] in _ACTS:
            streams.output_is_beside_the_point()
        interrupts.begin()
        return resolved


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=False)
@click.version_option(__version__, prog_name="incbak")
@common
def cli() -> None:
    """Incremental backups of virtual machine disks that a crash does not spoil.

    \b
    A first backup and a restore:
      incbak init -r /backup
      incbak -r /backup full qmp:/run/incbak/web1/qmp.sock
      incbak -r /backup incremental qmp:/run/incbak/web1/qmp.sock
      incbak -r /backup restore latest web1.raw
    """


def main() -> NoReturn:
    """Run the command line. Always raises `SystemExit`."""
    streams.adopt()
    logging.raiseExceptions = False  # an error that cannot be logged is not worth a traceback
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    logging.getLogger().handlers[0].setFormatter(_OneLine("incbak: %(message)s"))
    for name in ("qemu.qmp", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not debugging():
        warnings.filterwarnings("ignore", message="coroutine .* was never awaited")  # interrupted before it began
    try:
        status = _status()
        interrupts.over()
    except KeyboardInterrupt:  # once more, while the first was being told
        status = interrupts.INTERRUPTED
    sys.exit(status)


def _status() -> int:
    """Run the command; the exit code. An error becomes a message."""
    status: object = 0
    try:
        status = cli.main(prog_name="incbak", standalone_mode=False)
        sys.stdout.flush()
    except IncbakError as e:
        _say_error(str(e), e.hint)
        status = e.exit_code
    except click.ClickException as e:
        context = getattr(e, "ctx", None)
        _say_error(" ".join(e.format_message().split()), f"Try: {context.command_path} --help" if context else "")
        status = e.exit_code
    except (KeyboardInterrupt, click.Abort):
        _say_error("interrupted", "")
        status = interrupts.INTERRUPTED
    except BrokenPipeError:
        status = 1
    except MemoryError:
        _say_error("out of memory", "")
        status = 1
    except OSError as e:
        _say_error(f"{e.filename or 'the system'}: {e.strerror or e}", "")
        status = 1
    except SystemExit as e:
        status = e.code
    except Exception as e:  # noqa: BLE001 - whatever it is: a message and an exit code, never a traceback
        if debugging():
            traceback.print_exc()
        _say_error(f"internal error: {type(e).__name__}: {e}", "Please report it, with what INCBAK_DEBUG=1 prints.")
        status = 1
    if (error := streams.lost()) and not isinstance(error, BrokenPipeError):
        _say_error(f"cannot write to standard output: {error.strerror}", "The exit code says what was done.")
    return status if isinstance(status, int) else 0


class _OneLine(logging.Formatter):
    """A message is one line, whoever named what is in it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        return one_line(super().formatMessage(record))


def _say_error(message: str, hint: str) -> None:
    print(printable(f"incbak: error: {' '.join(message.splitlines())}"), file=sys.stderr)
    if hint:
        print(printable(f"incbak: {hint}"), file=sys.stderr)

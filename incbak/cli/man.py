"""``incbak man``: the manual page, from the texts of ``--help``."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from itertools import pairwise

import click

from incbak import __version__, errors
from incbak.cli.settings import common

_ALIASES = {"incremental": "inc"}
_ENV = re.compile(r"\[env: (\w+)\]")


@click.command("man", hidden=True)
@common
@click.pass_context
def man(ctx: click.Context) -> None:
    """Print the manual page, in roff.

    \b
    Example:
      incbak man > /usr/local/share/man/man1/incbak.1
    """
    click.echo(manual(ctx.find_root().command))


def manual(root: click.Command) -> str:
    """The page of ``root`` and all commands below it, hidden ones left out."""
    top = click.Context(root, info_name="incbak", color=False)
    shared: set[str | None] = {p.name for p in root.params}
    lines = [f'.TH INCBAK 1 "" "incbak {__version__}" "User Commands"', ".SH NAME"]
    lines.append(_text(f"incbak - {_summary(root)}"))
    lines += [".SH SYNOPSIS", ".B incbak", _text("[OPTIONS] COMMAND [ARGUMENTS]...")]
    lines += [".SH DESCRIPTION", *_paragraphs(root.help or "")]
    lines += [_text("The options of this list may stand before or after the command's name."), ".SH OPTIONS"]
    lines += _options(top, set())
    lines.append(".SH COMMANDS")
    for command in _below(top):
        lines += _command(command, shared)
    lines += [".SH EXIT STATUS", *_exit_codes(), ".SH ENVIRONMENT", *_environment(top)]
    return "\n".join(line for above, line in pairwise(["", *lines]) if line != ".PP" or above[:3] not in (".SH", ".SS"))


def _summary(command: click.Command) -> str:
    first = (command.help or "").strip().split("\n")[0].rstrip(".")
    return first[:1].lower() + first[1:]


def _below(ctx: click.Context) -> Iterator[click.Context]:
    """A context for each command, groups before what is in them."""
    group = ctx.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        if command is not None and not command.hidden:
            inside = click.Context(command, info_name=name, parent=ctx, color=False)
            yield inside
            yield from _below(inside)


def _command(ctx: click.Context, shared: set[str | None]) -> Iterator[str]:
    command = ctx.command
    pieces = [p for p in command.collect_usage_pieces(ctx) if p != "[OPTIONS]" or _own(command, shared)]
    yield f".SS {_text(' '.join([ctx.command_path, *pieces]))}"
    yield from _paragraphs(command.help or command.short_help or "")
    if alias := _ALIASES.get(ctx.info_name or ""):
        yield from [".PP", _text(f"The same by a shorter name: {alias}.")]
    yield from _options(ctx, shared)


def _own(command: click.Command, shared: set[str | None]) -> list[click.Parameter]:
    return [p for p in command.params if isinstance(p, click.Option) and p.name not in shared]


def _options(ctx: click.Context, shared: set[str | None]) -> Iterator[str]:
    for param in ctx.command.get_params(ctx):
        record = param.get_help_record(ctx) if isinstance(param, click.Option) else None
        if record is None or param.name in shared or (shared and "--help" in param.opts):
            continue
        yield from [".TP", f"\\fB{_text(record[0])}\\fR", _text(record[1])]


def _paragraphs(help_text: str) -> Iterator[str]:
    r"""Running text is filled; what stands below ``\b`` keeps its lines."""
    for block in re.split(r"\n\s*\n", help_text.strip()):
        lines = block.split("\n")
        yield ".PP"
        if lines[0].strip() == "\b":
            yield from [".nf", *(_text(line) for line in textwrap.dedent("\n".join(lines[1:])).split("\n")), ".fi"]
        else:
            yield _text(" ".join(line.strip() for line in lines))


def _exit_codes() -> Iterator[str]:
    texts = {0: "Done; also when a disk had to be read whole.", 130: "Interrupted."}
    for error in _tree(errors.IncbakError):
        text = (error.__doc__ or "").split("\n")[0]
        texts.setdefault(error.exit_code, "It failed." if error.exit_code == 1 else text)
    for code, text in sorted(texts.items()):
        yield from [".TP", f"\\fB{code}\\fR", _text(text)]


def _tree(error: type[errors.IncbakError]) -> Iterator[type[errors.IncbakError]]:
    yield error
    for below in error.__subclasses__():
        yield from _tree(below)


def _environment(top: click.Context) -> Iterator[str]:
    found: dict[str, str] = {}
    for ctx in [top, *_below(top)]:
        for param in ctx.command.params:
            text = getattr(param, "help", None) or ""
            for name in _ENV.findall(text):
                found.setdefault(name, f"{param.opts[-1]}: {_ENV.sub('', text).strip()}")
    for name, text in sorted(found.items()):
        yield from [".TP", f"\\fB{_text(name)}\\fR", _text(text)]


def _text(text: str) -> str:
    """Escaped, so that nothing in it is a request of roff's."""
    text = text.replace("``", "").replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    return f"\\&{text}" if text.startswith(".") else text

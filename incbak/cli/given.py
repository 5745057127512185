"""What a user gave on the command line, where it can be wrong in ways that nothing further on would notice.

- a VM's name is not empty (a shell variable that is not set), and a new one fits into a line and a path;
- a directory is made where its parent is, never a tree: that would be a mistyped path;
- what has no effect, or contradicts another option, is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from incbak.bitmap.names import component, unfit
from incbak.errors import UsageError


class _VmName(click.ParamType):  # type: ignore[type-arg]  # generic in newer releases only
    name = "VM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the name of a VM is empty; leave the option out for the default", param, ctx)
        return value


VM_NAME = _VmName()
"""The type of each ``--name``."""


def refuse_unfit_name(name: str | None, state_dir: Path) -> None:
    """Raise `UsageError` for a name that no VM should get. One that bitmaps have already goes on working."""
    if name and (why := unfit(name)) and not (state_dir / component(name)).exists():
        raise UsageError(f"not a name for a VM: {name[:200]!r}: {why}", hint="Use letters, digits, and . _ - .")


def refuse_tree(what: str, directory: Path) -> None:
    """Raise `UsageError` where more than the last part of ``directory`` is missing."""
    parent = directory.absolute().parent
    if not directory.exists() and not parent.exists():
        hint = f"Is the path right? If so: mkdir -p {parent}"
        raise UsageError(f"cannot make {what} {directory}: there is no directory {parent}", hint=hint)


def typed(option: str) -> bool:
    """Return whether an option of the command that runs was given, and not only its default."""
    source = click.get_current_context().get_parameter_source(option)
    return source is ParameterSource.COMMANDLINE


def refuse_without(needed: str, *options: str) -> None:
    """Raise `UsageError` for an option that was given though it means nothing without another, which was not."""
    for parameter in click.get_current_context().command.params:
        if parameter.name in options and typed(parameter.name):
            raise UsageError(f"{parameter.opts[0]} has no effect without {needed}", hint="Leave it out.")

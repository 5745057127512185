"""Commands by name: each with its table of arguments, checked before the function is called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from incbak.errors import IncbakError
from incbak.serve.schema import Fields, QmpError, check
from incbak.serve.vm import Vm

log = logging.getLogger(__name__)

Args = dict[str, Any]
Function = Callable[[Vm, Args], object]


@dataclass(frozen=True)
class Command:
    """One QMP command."""

    name: str
    fields: Fields
    function: Function


COMMANDS: dict[str, Command] = {}


def command(name: str, fields: Fields | None = None) -> Callable[[Function], Function]:
    """Register the decorated function, which gets the VM and checked arguments, as ``name``."""

    def register(function: Function) -> Function:
        COMMANDS[name] = Command(name, fields or {}, function)
        return function

    return register


def execute(vm: Vm, name: str, arguments: Mapping[str, object]) -> object:
    """The command's return value. Raises `QmpError` and nothing else."""
    found = COMMANDS.get(name)
    if found is None:
        raise QmpError(f"The command {name} has not been found", cls="CommandNotFound")
    checked = check(found.fields, arguments)
    try:
        result = found.function(vm, checked)
    except QmpError:
        raise
    except IncbakError as e:
        raise QmpError(f"{e.message}{': ' + e.hint if e.hint else ''}") from e
    except OSError as e:
        raise QmpError(f"{name}: {e.strerror or e}") from e
    except Exception as e:
        log.exception("command %s failed", name)
        raise QmpError(f"{name}: internal error: {type(e).__name__}") from e
    return {} if result is None else result

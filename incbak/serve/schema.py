"""Declared argument tables for QMP commands, checked with the texts of QEMU's own checker (7.2).

A table maps names to types; ``Opt(type)`` may be left out. A value that passes is returned normalised, an error is a
`QmpError` that names the argument by its path, as QEMU does (``actions[0].data.node``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from incbak.errors import IncbakError


class QmpError(IncbakError):
    """A command is refused; ``cls`` is QMP's error class."""

    code = "qmp"

    def __init__(self, message: str, *, cls: str = "GenericError", hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.cls = cls


class Type:
    """One type of argument."""

    def check(self, value: object, path: str) -> Any:
        """The value, normalised. Raises `QmpError` naming ``path``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Opt:
    """An argument that may be left out."""

    type: Type


Fields = Mapping[str, Type | Opt]


def _wrong_type(path: str, expected: str) -> QmpError:
    return QmpError(f"Invalid parameter type for '{path}', expected: {expected}")


class _Str(Type):
    def check(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        return value


class _Bool(Type):
    def check(self, value: object, path: str) -> bool:
        if not isinstance(value, bool):
            raise _wrong_type(path, "boolean")
        return value


@dataclass(frozen=True)
class Int(Type):
    """An integer of ``low`` to ``high``; ``kind`` is QEMU's name of the type, which its error texts use."""

    low: int
    high: int
    kind: str

    def check(self, value: object, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not -(1 << 63) <= value < 1 << 63:
            raise _wrong_type(path, "integer")
        if not self.low <= value <= self.high:
            raise QmpError(f"Parameter '{path}' expects {self.kind}")
        return value


STR = _Str()
BOOL = _Bool()
INT = Int(-(1 << 63), (1 << 63) - 1, "integer")
UINT32 = Int(0, (1 << 32) - 1, "uint32_t")


class Enum(Type):
    """One of some words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def check(self, value: object, path: str) -> str:
        if not isinstance(value, str):
            raise _wrong_type(path, "string")
        if value not in self.words:
            raise QmpError(f"Parameter '{path.rpartition('.')[2]}' does not accept value '{value}'")
        return value


@dataclass(frozen=True)
class List(Type):
    """A list of one type."""

    item: Type

    def check(self, value: object, path: str) -> list[Any]:
        if not isinstance(value, list):
            raise _wrong_type(path, "array")
        return [self.item.check(v, f"{path}[{i}]") for i, v in enumerate(value)]


@dataclass(frozen=True)
class Struct(Type):
    """An object with the given members."""

    fields: Fields

    def check(self, value: object, path: str) -> dict[str, Any]:
        return check(self.fields, _object(value, path), path)


@dataclass(frozen=True)
class Alternate(Type):
    """A string, or an object with the given members; ``kind`` is QEMU's name."""

    fields: Fields
    kind: str

    def check(self, value: object, path: str) -> str | dict[str, Any]:
        if isinstance(value, str):
            return value
        if not isinstance(value, dict):
            raise _wrong_type("null", self.kind)
        return check(self.fields, value, path)


@dataclass(frozen=True)
class Union(Type):
    """An object whose member ``tag`` says which others it has; with ``wrapped`` they are inside that member."""

    tag: str
    branches: Mapping[str, Fields]
    common: Fields = field(default_factory=dict)
    wrapped: str = ""

    def check(self, value: object, path: str) -> dict[str, Any]:
        given = _object(value, path)
        prefix = f"{path}." if path else ""
        if self.tag not in given:
            raise QmpError(f"Parameter '{prefix}{self.tag}' is missing")
        word = Enum(*self.branches).check(given[self.tag], f"{prefix}{self.tag}")
        branch: Fields = {self.wrapped: Struct(self.branches[word])} if self.wrapped else self.branches[word]
        return check({self.tag: STR, **self.common, **branch}, given, path)


def _object(value: object, path: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise _wrong_type(path, "object")
    return value


def check(fields: Fields, given: Mapping[str, object], path: str = "") -> dict[str, Any]:
    """``given`` as ``fields`` declares it. Raises `QmpError` for what is missing, unexpected or of the wrong type."""
    prefix = f"{path}." if path else ""
    out: dict[str, Any] = {}
    for name, declared in fields.items():
        if name in given:
            kind = declared.type if isinstance(declared, Opt) else declared
            out[name] = kind.check(given[name], prefix + name)
        elif not isinstance(declared, Opt):
            raise QmpError(f"Parameter '{prefix}{name}' is missing")
    for name in given:
        if name not in fields:
            raise QmpError(f"Parameter '{prefix}{name}' is unexpected")
    return out

"""Faults of the way to the repository and back."""

from __future__ import annotations

from torturelib.planted import Fault

FAULTS: tuple[Fault, ...] = ()

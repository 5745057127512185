"""What is done around the backup of one VM: hooks, and metrics."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from incbak.backup.runner import Outcome
from incbak.cli.settings import Settings, one_line
from incbak.cli.signals import interruptible
from incbak.errors import IncbakError, IncompleteError
from incbak.fleet.config import Hooks, Vm
from incbak.fleet.hooks import run_hook
from incbak.fleet.metrics import write_metrics
from incbak.newfile import refuse_irreplaceable
from incbak.report.backups import as_json
from incbak.units import parse_duration


def refuse_own_metrics(here: Settings, typed: Path | None) -> None:
    """Raise `UsageError` where no metrics are written: see `Settings.refuse_own`; or where it is no file."""
    if file := typed or (Path(here.vm.metrics) if here.vm and here.vm.metrics else None):
        here.refuse_own(file)
        refuse_irreplaceable(file)


class Surroundings:
    """A context around a run; its user sets ``outcome`` when there is one. A dry run has none of it."""

    def __init__(self, vm: Vm | None, name: str, kind: str, metrics: Path | None, *, dry_run: bool) -> None:
        self.outcome: Outcome | None = None
        self._hooks = (vm and vm.hooks) or Hooks()
        configured = Path(vm.metrics) if vm and vm.metrics else None
        self._name, self._kind, self._metrics = name, kind, metrics or configured
        self._dry_run = dry_run
        self._begun = time.monotonic()

    def __enter__(self) -> Surroundings:
        if not self._dry_run:
            try:
                self._run("before", "before", 0, "")
            except IncbakError as e:
                self._finish(e)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._dry_run:
            self._finish(error)

    def _finish(self, error: BaseException | None) -> None:
        code = _exit_code(error)
        there = isinstance(error, IncompleteError) or error is None
        result = "done" if error is None else "incomplete" if there else "failed"
        self._name = self.outcome.vm if self.outcome else self._name
        try:
            self._run("after" if there else "failed", result, code, str(error or ""))
            if self._metrics:
                record = self.outcome.record if self.outcome else None
                write_metrics(self._metrics, self._name, code, record)
        except IncbakError as e:
            print(one_line(f"incbak: {e}"), file=sys.stderr)

    def _run(self, which: str, result: str, code: int, error: str) -> None:
        record = self.outcome.record if self.outcome else None
        facts: dict[str, Any] = {
            "vm": self._name,
            "kind": self._kind,
            "result": result,
            "exit_code": code,
            "error": error,
            "seconds": round(time.monotonic() - self._begun, 3),
            "backup": record.id if record else None,
            "record": as_json(record) if record else None,
        }
        with interruptible():  # a hook is ended when we are
            run_hook(which, getattr(self._hooks, which), facts, parse_duration(self._hooks.timeout))


def _exit_code(error: BaseException | None) -> int:
    if error is None:
        return 0
    if isinstance(error, IncbakError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else 1

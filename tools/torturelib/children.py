"""incbak commands as forked children of this process: the imports are paid once."""

from __future__ import annotations

import importlib
import os
import pkgutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import incbak
from incbak import durable
from incbak.cli.main import main

DEADLINE = 60.0

for _module in pkgutil.walk_packages(incbak.__path__, "incbak."):
    if not _module.name.endswith(("__main__", ".start")):  # these are for a process of their own
        importlib.import_module(_module.name)  # commands import their parts late: here they are paid for once


@dataclass
class Child:
    """A running command; its output goes to files beside each other in ``log``."""

    pid: int
    argv: list[str]
    out: Path
    err: Path
    status: int | None = None

    def poll(self) -> int | None:
        """The exit status (negative: a signal), or ``None`` while it runs."""
        if self.status is None:
            pid, raw = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status = os.waitstatus_to_exitcode(raw)
        return self.status

    @property
    def steps(self) -> int:
        """Crash points it passed; 0 when it was killed, or nothing was armed."""
        counted = self.out.with_suffix(".steps")
        return int(counted.read_text()) if counted.exists() else 0

    def wait(self, deadline: float = DEADLINE) -> int:
        """The exit status; a command that hangs is killed and raises `TimeoutError`."""
        end = time.monotonic() + deadline
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"incbak {' '.join(self.argv)} did not end in {deadline} s")
            time.sleep(0.001)
        return status

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal; after SIGKILL the child is reaped."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, number)
        if number == signal.SIGKILL and self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def spawn(argv: list[str], log: Path, *, crash_at: str | None = None, fault_at: str | None = None) -> Child:
    """Start ``incbak argv`` with crash points armed; its output goes to ``log.out`` and ``log.err``."""
    child = Child(0, argv, log.with_suffix(".out"), log.with_suffix(".err"))
    for old in (child.out, child.err, child.out.with_suffix(".steps")):
        old.unlink(missing_ok=True)
    child.pid = os.fork()
    if child.pid == 0:
        _become(child, lambda: durable.arm(crash_at, fault_at))
    return child


def _become(child: Child, prepare: Callable[[], None]) -> NoReturn:
    status = 70
    try:
        for fd, path in ((1, child.out), (2, child.err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), fd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.closerange(3, 1024)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        sys.argv = ["incbak", *child.argv]
        prepare()
        main()
        status = 0
    except SystemExit as e:
        status = e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException:  # noqa: BLE001 - a traceback in a child is a finding, to be seen
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
            child.out.with_suffix(".steps").write_text(str(durable.passed()))
        os._exit(status)

"""Timing commands in turns, and what came of it."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Case:
    """One contestant: ``before`` is not timed; ``command`` is."""

    name: str
    command: Sequence[str | Path]
    before: Callable[[], None] = lambda: None
    env: Mapping[str, str] = field(default_factory=dict)
    output: Path | None = None
    """Where its stdout goes."""


@dataclass
class Figures:
    """Seconds of each run, and the most memory in MiB."""

    seconds: list[float] = field(default_factory=list)
    memory: float = 0.0

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


def timed(case: Case) -> tuple[float, float]:
    """(seconds, peak memory in MiB) of one run; a command that fails ends the benchmark."""
    case.before()
    argv = [str(a) for a in case.command]
    with (case.output or Path(os.devnull)).open("wb") as out:
        began = time.perf_counter()
        process = subprocess.Popen(argv, stdout=out, stderr=subprocess.PIPE, env={**os.environ, **case.env})
        assert process.stderr
        errors = process.stderr.read()
        _pid, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{case.name} exited {process.returncode}: {errors.decode(errors='replace')[-800:]}")
    return seconds, usage.ru_maxrss / 1024


def in_turns(cases: Sequence[Case], runs: int) -> dict[str, Figures]:
    """Every case ``runs`` times, one after the other, in alternating order."""
    found = {case.name: Figures() for case in cases}
    for number in range(runs):
        for case in cases if number % 2 == 0 else list(reversed(cases)):
            seconds, memory = timed(case)
            found[case.name].seconds.append(seconds)
            found[case.name].memory = max(found[case.name].memory, memory)
            print(f"    {case.name}: {seconds:.2f} s, {memory:.0f} MiB", file=sys.stderr, flush=True)
    return found


def have(*tools: str) -> bool:
    """Whether all of these programs are there."""
    return all(shutil.which(tool) for tool in tools)


def incbak(*argv: str | Path) -> list[str | Path]:
    """The command line of this checkout's incbak."""
    return [sys.executable, "-m", "incbak", *argv]


def emptied(path: Path) -> Callable[[], None]:
    """A ``before`` that removes what is at ``path``."""

    def remove() -> None:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    return remove

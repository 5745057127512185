"""What a piece of work needs, and the rows that come of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchlib.runs import Case, emptied, in_turns, incbak

_SECRET = {"RESTIC_PASSWORD": "x", "RESTIC_FROM_PASSWORD": "x",
           "BORG_PASSPHRASE": "x", "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
           "BORG_RELOCATED_REPO_ACCESS_IS_OK": "yes"}  # fmt: skip


@dataclass
class Row:
    """One line of the result. ``goal`` is what the ratio is to be; empty where there is none."""

    work: str
    who: str
    figure: str
    ratio: float | None = None
    goal: str = ""


@dataclass
class Bench:
    """Where things are, and how often to run."""

    directory: Path
    runs: int
    disk: Path
    data: int

    @property
    def repo(self) -> Path:
        return self.directory / "repo"

    def env(self) -> dict[str, str]:
        """For every command: state and caches below the directory."""
        home = str(self.directory)
        return {"INCBAK_REPOSITORY": str(self.repo), "INCBAK_STATE_DIR": f"{home}/state", "HOME": home,
                "XDG_CACHE_HOME": f"{home}/cache", "BORG_BASE_DIR": home, **_SECRET}  # fmt: skip

    def run(self, *argv: str | Path) -> bytes:
        """A command that is not timed; its stdout."""
        done = subprocess.run(
            [str(a) for a in argv], check=False, env={**os.environ, **self.env()}, capture_output=True
        )
        if done.returncode:
            sys.exit(f"{argv[0]} exited {done.returncode}: {done.stderr.decode(errors='replace')[-800:]}")
        return done.stdout

    def ask(self, *argv: str | Path) -> Any:
        """As `run`, of a command with ``--json`` and one line."""
        return json.loads(self.run(*argv))

    def forget(self) -> None:
        """No repository, no bitmaps; a new repository."""
        emptied(self.repo)()
        emptied(self.directory / "state")()
        self.run(*incbak("-q", "init"))

    def compare(self, work: str, cases: list[Case], goals: dict[str, str]) -> list[Row]:
        """Rows of seconds; the first case is ours, the ratio is how many times as long the other took."""
        for case in cases:
            case.env = {**self.env(), **case.env}
        found = in_turns(cases, self.runs)
        ours = found[cases[0].name]
        rows = [Row(work, "incbak", f"{ours.median:.2f} s, {ours.memory:.0f} MiB")]
        for case in cases[1:]:
            other = found[case.name]
            ratio = other.median / ours.median
            rows.append(Row(work, case.name, f"{other.median:.2f} s", ratio, goals.get(case.name, "")))
        return rows

"""Run ``incbak`` as a user does: a process, its exit code, what it printed."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DEADLINE = 120

Content = dict[int, bytes]


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    code: int
    out: str
    err: str

    def objects(self) -> list[dict[str, Any]]:
        """The lines of ``--json``."""
        return [json.loads(line) for line in self.out.splitlines()]


class Incbak:
    """Commands on one repository and one state directory, both below ``root``."""

    def __init__(self, root: Path) -> None:
        self.root, self.repo, self.state = root, root / "repo", root / "state"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """With nothing of the caller's own."""
        ours = {k: v for k, v in os.environ.items() if not k.startswith("INCBAK_") or k == "INCBAK_MUST_RUN"}
        return {**ours, "INCBAK_REPOSITORY": str(self.repo), "INCBAK_STATE_DIR": str(self.state), **(extra or {})}

    def popen(self, *argv: str | Path, env: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[str]:
        """Start a command."""
        command = [sys.executable, "-m", "incbak", *map(str, argv)]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, env=self.environment(env), text=True, **{**pipes, **more})

    def run(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> Ran:
        """Run a command to its end. A traceback on stderr fails the test, whatever the exit code."""
        process = self.popen(*argv, env=env)
        out, err = process.communicate(timeout=DEADLINE)
        assert "Traceback" not in err, err
        return Ran(process.returncode, out, err)

    def __call__(self, *argv: str | Path, env: Mapping[str, str] | None = None) -> Ran:
        """Run a command that must succeed."""
        ran = self.run(*argv, env=env)
        assert ran.code == 0, (argv, ran)
        return ran

    def list(self) -> list[dict[str, Any]]:
        """All backups, oldest first."""
        return self("--json", "list").objects()

    def restored(self, backup: str = "latest", disk: str | None = None) -> Content:
        """The content of a backup's disk."""
        target = self.root / "restored.raw"
        self("-q", "restore", backup, target, "--force", *(["--disk", disk] if disk else []))
        return content(target)


def content(path: Path, step: int = 65536) -> Content:
    """Size, and the pieces of ``step`` bytes that are not all zero; holes are not read."""
    found: Content = {-1: str(path.stat().st_size).encode()}
    with path.open("rb") as f:
        at = 0
        while True:
            try:
                at = os.lseek(f.fileno(), at, os.SEEK_DATA)
            except OSError:
                return found
            at -= at % step
            if (piece := os.pread(f.fileno(), step, at)).strip(b"\0"):
                found[at] = piece
            at += step


def differing(a: Content, b: Content) -> list[int]:
    """Offsets of the pieces that differ, -1 for the size: short to print, whatever the disk's size."""
    return sorted(at for at in a.keys() | b.keys() if a.get(at) != b.get(at))


def signal_another_thread(pid: int, number: int) -> None:
    """Send a signal to a thread of the process that is not the main one, once that one waits for a lock or an event.

    Python's handler runs in the main thread only.
    """
    deadline = time.monotonic() + DEADLINE
    while "futex" not in Path(f"/proc/{pid}/task/{pid}/wchan").read_text():
        assert time.monotonic() < deadline, "the main thread does not wait"
        time.sleep(0.01)
    other = next(int(task) for task in os.listdir(f"/proc/{pid}/task") if int(task) != pid)
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.tgkill(pid, other, number) == 0, os.strerror(ctypes.get_errno())

"""Commands of the user's around a backup.

``before`` runs first; if it fails no backup is made, and ``failed`` runs. ``after`` runs when the backup is there, also
when it lacks disks. What ``after`` and ``failed`` do cannot change what has happened, so their failure is a warning.
Each gets ``INCBAK_VM``, ``INCBAK_KIND``, ``INCBAK_RESULT`` (``before``, ``done``, ``incomplete``, ``failed``),
``INCBAK_EXIT_CODE``, ``INCBAK_BACKUP``, and the same with more as one JSON object on its standard input.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from incbak.errors import BackupError

_TOLD = ("vm", "kind", "result", "exit_code", "backup")


def run_hook(which: str, command: Sequence[str], facts: Mapping[str, Any], timeout: float) -> None:
    """Run it, with our stderr as its output. ``timeout`` in seconds. Raises `BackupError` when it fails."""
    if not command:
        return
    told = {f"INCBAK_{name.upper()}": "" if facts[name] is None else str(facts[name]) for name in _TOLD}
    what = f"hook {which} of {facts['vm']}: {command[0]}"
    try:
        done = subprocess.run(
            command,
            input=json.dumps(facts),
            text=True,
            stdout=2,
            env={**os.environ, **told},
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise BackupError(f"{what} did not end within {timeout:g} s, and was killed") from None
    except OSError as e:
        raise BackupError(f"{what}: {e.strerror}", hint="Is it there, and executable?") from e
    if done.returncode:
        raise BackupError(f"{what} exited with {done.returncode}")

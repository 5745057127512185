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

from incbak import programs
from incbak.errors import BackupError

_TOLD = ("vm", "kind", "result", "exit_code", "backup")


def run_hook(which: str, command: Sequence[str], facts: Mapping[str, Any], timeout: float) -> None:
    """Run it, with our stderr as its output. After ``timeout`` seconds it is ended with all that it has started.

    What it leaves running when it ends is not waited for. Raises `BackupError` when it fails.
    """
    if not command:
        return
    told = {f"INCBAK_{name.upper()}": "" if facts[name] is None else str(facts[name]) for name in _TOLD}
    what = f"hook {which} of {facts['vm']}: {command[0]}"
    environment, facts_sent = {**os.environ, **told}, json.dumps(facts).encode()
    try:
        done = programs.run(command, send=facts_sent, out=2, err=None, env=environment, timeout=timeout)
    except subprocess.TimeoutExpired:
        raise BackupError(f"{what} did not end within {timeout:g} s, and was killed") from None
    except (OSError, ValueError) as e:
        why = e.strerror if isinstance(e, OSError) else e
        raise BackupError(f"{what}: {why}", hint="Is it there, and executable?") from e
    if done.code:
        raise BackupError(f"{what} exited with {done.code}")

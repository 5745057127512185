"""A bounded slice of ``tools/torture``, with a new seed each time; a failure prints the seed that repeats it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.need import need, need_root

TOOLS = Path(__file__).parents[2] / "tools"
SEED = int(os.environ.get("INCBAK_TORTURE_SEED", time.time()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "rounds", "counted", "least"),
    [
        ("serve", 25, "kills of serve", 8),
        ("runner", 25, "kills of the runner", 8),
        ("restore", 40, "kills of restore", 13),
        ("fault", 12, "faults", 4),
        ("rot", 8, "spoilt", 2),
        ("prune", 20, "kills of prune", 6),
        ("power", 1, "different states examined", 100),
        ("filesystem", 1, "cuts of ext4", 20),
    ],
)
def test_nothing_is_lost_in_silence(target: str, rounds: int, counted: str, least: int) -> None:
    if target == "power":
        need("strace")
    if target == "filesystem":
        need_root()
        need("nbdfuse", "fusermount3", "mount", "setpriv", "mkfs.ext4")
    command = [
        sys.executable,
        "-m",
        "torturelib",
        "--json",
        "--target",
        target,
        "--rounds",
        str(rounds),
        "--kind",
        "ext4",
    ]
    ran = subprocess.run(
        [*command, "--seed", str(SEED)],
        env={**os.environ, "PYTHONPATH": str(TOOLS), "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert ran.returncode == 0, f"repeat with: tools/torture --target {target} --seed {SEED}\n{ran.stderr[-3000:]}"
    outcome = json.loads(ran.stdout)
    assert outcome["lost"] == 0
    assert sum(n for name, n in outcome.items() if name.startswith(counted)) >= least

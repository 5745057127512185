"""A bounded slice of ``tools/torture --target live``, with a new seed each time; a failure prints what repeats it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.kit.guest import need_guest

TOP = Path(__file__).parents[2]
SEED = int(os.environ.get("INCBAK_TORTURE_SEED", time.time()))


@pytest.mark.kvm
@pytest.mark.slow
def test_nothing_is_lost_in_silence() -> None:
    need_guest()
    command = [sys.executable, "-m", "torturelib", "--json", "--target", "live", "--rounds", "5", "--seed", str(SEED)]
    env = {**os.environ, "PYTHONPATH": f"{TOP / 'tools'}:{TOP}", "OPENBLAS_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500, check=False)
    assert ran.returncode == 0, f"repeat with: tools/torture --target live --seed {SEED}\n{ran.stderr[-3000:]}"
    outcome = json.loads(ran.stdout.splitlines()[-1])
    assert (outcome["lost"], outcome["rounds"]) == (0, 5)
    assert outcome["correct"] > 2

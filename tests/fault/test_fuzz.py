"""A bounded slice of ``tools/fuzz``, with a new seed each time; a failure prints what repeats it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
SEED = int(os.environ.get("INCBAK_FUZZ_SEED", time.time()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "cases"),
    [("nbd-server", 500), ("nbd-client", 2000), ("bitmap", 200), ("repo", 60), ("monitor", 80), ("text", 2000)],
)
def test_nothing_is_found(target: str, cases: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fuzzlib", "--json", "--target", target, "--cases", str(cases)]
    ran = subprocess.run(
        [*command, "--seed", str(SEED), "--keep", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{TOP / 'tools'}:{TOP}", "OPENBLAS_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    repeat = f"repeat with: tools/fuzz --target {target} --seed {SEED} --case N\n{ran.stderr[-3000:]}"
    assert ran.returncode == 0, repeat
    outcome = json.loads(ran.stdout)
    assert outcome["cases"] == {target: cases}
    assert not outcome["findings"]


def test_the_same_seed_makes_the_same_input(tmp_path: Path) -> None:
    """The input of a case is written when it is a finding; here it is asked for."""
    inputs = []
    for turn in ("a", "b"):
        env = {**os.environ, "PYTHONPATH": f"{TOP / 'tools'}:{TOP}", "OPENBLAS_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "fuzzlib", "--target", "all", "--seed", "5", "--case", "17", "--cases", "3"]
        command += ["--dump", str(tmp_path / turn)]
        subprocess.run(command, env=env, check=True, capture_output=True, timeout=300)
        inputs.append({path.name: path.read_bytes() for path in sorted((tmp_path / turn).iterdir())})
    assert len(inputs[0]) == 18
    assert [n for n in inputs[0] if inputs[0][n] != inputs[1][n]] == []

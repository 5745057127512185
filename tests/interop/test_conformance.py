"""``tools/conformance`` where nothing can be fetched: it says what is missing, and calls nothing passed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]


def run(tmp_path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(TOP / "tools"), str(TOP)])
    environment = {**os.environ, "PYTHONPATH": path, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "conformlib", "--mirror", "http://127.0.0.1:9", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("suite", ["iotests", "tester"])
def test_a_suite_that_cannot_be_had(tmp_path: Path, suite: str) -> None:
    done = run(tmp_path, suite)
    assert done.returncode == 2
    assert done.stderr.startswith(f"{suite}: cannot be run: ")
    assert any(word in done.stderr for word in ("no source package", "missing programs", "is not installed", "another"))
    assert "passed" not in done.stdout


def test_as_json(tmp_path: Path) -> None:
    done = run(tmp_path, "--json", "libnbd")
    told = json.loads(done.stdout)
    assert (done.returncode, told["tests"], list(told["unavailable"])) == (2, [], ["libnbd"])


def test_a_suite_that_there_is_not(tmp_path: Path) -> None:
    done = run(tmp_path, "nonsense")
    assert done.returncode == 2
    assert "no suite nonsense: there are iotests, injector, tester, libnbd" in done.stderr

"""Tests run on all cores but for those that must be alone; every test is in one of the two parts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TOP = Path(__file__).parents[2]
FILE = "tests/unit/serve/test_cbw.py"  # has tests of both kinds


def _collected(part: str) -> set[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", FILE]
    environment = {**os.environ, "INCBAK_TEST_PART": part}
    ran = subprocess.run(command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=60, check=True)
    return {line for line in ran.stdout.splitlines() if "::" in line}


def test_each_test_is_in_one_part() -> None:
    together, alone, everything = map(_collected, ("parallel", "alone", ""))
    assert together
    assert alone
    assert together | alone == everything
    assert not together & alone

"""The table of planted faults fits the tree: every text is there once, every test exists. And the tool itself works.

The whole campaign is ``tools/torture --planted``; it takes minutes and is not run here.
"""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

TOP = Path(__file__).parents[2]
MODULE = "incbak/extents.py"
TEST = "tests/unit/test_ground.py::test_merge_covers_the_same_bytes_once"


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tool's module."""
    monkeypatch.syspath_prepend(TOP / "tools")
    yield importlib.import_module("torturelib.planted")
    for name in [n for n in sys.modules if n.startswith("torturelib")]:
        del sys.modules[name]


def test_every_text_is_found_once_and_changes(planted: Any) -> None:
    """A step that was rewritten must be planted anew, or it is tried no more."""
    faults = planted.table()
    assert planted.stale(faults) == []
    assert [f.name for f in faults if f.old == f.new] == []
    assert len(faults) >= 30


def test_every_fault_leaves_a_program(planted: Any) -> None:
    """What does not compile would be caught by any test."""
    for fault in planted.table():
        compile(planted.planted(fault, TOP), fault.file, "exec")


def test_every_test_exists(planted: Any) -> None:
    wanted = sorted({test for fault in planted.table() for test in fault.tests})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *wanted]
    ran = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, (ran.stdout + ran.stderr)[-2000:]


def test_a_fault_is_caught_and_a_harmless_change_is_not(planted: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """In one run: the copy is whole again after each, and the tree that we are in is never touched."""
    before = (TOP / MODULE).read_text()
    whole, line = "return sum(e.length for e in extents)", "from typing import NamedTuple\n"
    faults = [
        planted.Fault("fatal", MODULE, line, f"{line}raise SystemError\n", (TEST,)),
        planted.Fault("caught", MODULE, whole, "return 0", (TEST,)),
        planted.Fault("harmless", MODULE, whole, "return sum([e.length for e in extents])", (TEST,)),
    ]
    assert planted.campaign(faults, 2, as_json=True) == 2
    told = {found["fault"]: found for found in map(json.loads, capsys.readouterr().out.splitlines())}
    assert {name: found["caught"] for name, found in told.items()} == {
        "fatal": False,
        "caught": True,
        "harmless": False,
    }
    assert told["caught"]["by"] == TEST
    assert told["harmless"]["trouble"] == "all its tests pass"
    assert (TOP / MODULE).read_text() == before


@pytest.mark.parametrize("text", ["no such text", "Extent"])
def test_a_stale_entry_is_an_error(planted: Any, text: str) -> None:
    with pytest.raises(planted.StaleError, match=r"found \d+ times"):
        planted.campaign([planted.Fault("stale", MODULE, text, "", (TEST,))], 1, as_json=False)
    assert planted.main(["--only", "no-such-fault"]) == 1

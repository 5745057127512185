"""Ctrl-C at any moment of the start: one line, 130, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED_AT_THE_IMPORT = """
import os, signal, sys

class At:
    def find_spec(self, name, *_):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

wanted = sys.argv.pop(1)
{before}
sys.meta_path.insert(0, At())
from incbak.cli.start import main
main()
"""


def _run(module: str, *argv: str, before: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", INTERRUPTED_AT_THE_IMPORT.format(before=before), module, *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("module", ["incbak.cli.main", "click", "incbak.cli.repository", "numpy", "msgspec"])
def test_an_interrupt_while_modules_are_imported(tmp_path: Path, module: str) -> None:
    ran = _run(module, "-r", str(tmp_path / "repo"), "init")
    assert (ran.returncode, ran.stdout, ran.stderr) == (130, "", "incbak: error: interrupted\n")
    assert not (tmp_path / "repo").exists()


def test_as_many_files_may_be_open_as_the_hard_limit_allows() -> None:
    program = (
        "import resource as r; r.setrlimit(r.RLIMIT_NOFILE, (100, 200)); import sys; from incbak.cli import start;"
        "sys.argv = ['incbak', '--version']\ntry: start.main()\nexcept SystemExit: print(r.getrlimit(r.RLIMIT_NOFILE))"
    )
    said = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said.splitlines()[-1] == "(200, 200)"


def test_one_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    before = "signal.signal(signal.SIGINT, signal.SIG_IGN)"
    ran = _run("click", "-r", str(tmp_path / "repo"), "init", before=before)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert (tmp_path / "repo" / "config").exists()


def test_from_a_program_the_handler_is_left_alone() -> None:
    """Whatever of the library it imports, the command line too."""
    code = "import signal; was = signal.getsignal(2); import incbak.cli.main; print(signal.getsignal(2) is was)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert said.stdout == "True\n"

"""Planted faults: each safety step of incbak is taken out once, in a copy of the tree, and a test must notice.

A step that can go without any test failing is held by nobody: either it is not needed, or a test is missing. The steps
are in the modules whose names begin with ``planted_``. An entry whose old text is not found exactly once is
stale, and an error. A run that hangs, or that breaks before a test has run, has caught nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

TOP = Path(__file__).parents[2]
MEMORY = Path("/dev/shm")
COPIED = ("incbak", "tests", "tools", "pyproject.toml", "README.md", "CHANGELOG.md")
DEADLINE = 90.0
"""Seconds for the tests of one fault."""


@dataclass(frozen=True)
class Fault:
    """``old`` becomes ``new`` in ``file``; one of ``tests`` (what pytest takes) must fail then."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def unit(name: str, *tests: str) -> tuple[str, ...]:
    """Tests of one file below ``tests/unit``."""
    return tuple(f"tests/unit/{name}.py::{test}" for test in tests)


@dataclass(frozen=True)
class Verdict:
    """``by``: the test that failed; empty where none did, and then ``trouble`` says what happened instead."""

    name: str
    by: str
    seconds: float
    trouble: str = ""


class StaleError(Exception):
    """The table does not fit the tree."""


def table() -> list[Fault]:
    """All faults. Raises `StaleError` when two have one name."""
    here = Path(__file__).parent
    tables = [importlib.import_module(f"torturelib.{each.stem}") for each in sorted(here.glob("planted_*.py"))]
    faults = [fault for each in tables for fault in each.FAULTS]
    if len({f.name for f in faults}) != len(faults):
        raise StaleError("two faults have the same name")
    return faults


def planted(fault: Fault, top: Path) -> str:
    """The file's text with the fault in it. Raises `StaleError`."""
    text = (top / fault.file).read_text()
    if (count := text.count(fault.old)) != 1:
        raise StaleError(f"{fault.name}: its text is found {count} times in {fault.file}")
    return text.replace(fault.old, fault.new)


def stale(faults: Iterable[Fault]) -> list[str]:
    """What is wrong with the entries that do not fit the tree."""
    found = []
    for fault in faults:
        try:
            planted(fault, TOP)
        except (StaleError, FileNotFoundError) as e:
            found.append(str(e))
    return found


class Copy:
    """The tree in a scratch directory, where faults are planted one at a time."""

    def __init__(self, scratch: Path) -> None:
        self.top = scratch / "tree"
        self.top.mkdir()
        for name in COPIED:
            source = TOP / name
            if source.is_dir():
                shutil.copytree(source, self.top / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, self.top / name)
        ours = {k: v for k, v in os.environ.items() if not k.startswith("INCBAK_") or k == "INCBAK_MUST_RUN"}
        temporary, self._base = scratch / "t", scratch / "b"  # short, since tests make sockets below them
        temporary.mkdir()
        self.environment = {**ours, "PYTHONPATH": str(self.top), "TMPDIR": str(temporary)}
        self._check_import(scratch)

    def _check_import(self, elsewhere: Path) -> None:
        """An installed incbak must not be the one that is tested: its children would not have the fault."""
        command = [sys.executable, "-c", "import incbak, tests; print(incbak.__file__); print(tests.__file__)"]
        for where in (elsewhere, self.top):
            ran = subprocess.run(command, cwd=where, env=self.environment, capture_output=True, text=True, check=True)
            for line in ran.stdout.splitlines():
                if not Path(line).is_relative_to(self.top):
                    raise StaleError(f"not the copy is imported but {line}")

    def pytest(self, tests: Iterable[str], deadline: float, *more: str) -> tuple[int | None, str]:
        """Exit code and output; ``None`` when it did not end in time. Stops at the first failure."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-p", "no:cacheprovider"]
        command += ["--hypothesis-seed=0", f"--basetemp={self._base}", *more, *dict.fromkeys(tests)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        child = subprocess.Popen(
            command, cwd=self.top, env=self.environment, text=True, start_new_session=True, **pipes
        )  # type: ignore[call-overload]
        try:
            out, _ = child.communicate(timeout=deadline)
            return child.returncode, out
        except subprocess.TimeoutExpired:
            return None, ""
        finally:
            _end_group(child)

    def try_out(self, fault: Fault) -> Verdict:
        """Plant it, run its tests, take it out again."""
        path = self.top / fault.file
        sound, faulty = path.read_text(), planted(fault, self.top)
        began = time.monotonic()
        try:
            self._put(path, faulty)
            code, out = self.pytest(fault.tests, DEADLINE)
        finally:
            self._put(path, sound)
        seconds = time.monotonic() - began
        by = _failed(out)
        if code == 1 and by:
            return Verdict(fault.name, by, seconds)
        trouble = {None: f"no end within {DEADLINE:g} s", 0: "all its tests pass"}.get(
            code, f"pytest exits with {code}"
        )
        return Verdict(fault.name, "", seconds, trouble)

    @staticmethod
    def _put(path: Path, text: str) -> None:
        """Without the compiled form, which may look as new as the text."""
        path.write_text(text)
        for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
            compiled.unlink()


def _end_group(child: subprocess.Popen[str]) -> None:
    """Whatever a test that was stopped has left running: it has the group of the child that we started."""
    try:
        os.killpg(child.pid, 9)
    except ProcessLookupError:
        pass
    child.wait()


def _failed(out: str) -> str:
    for line in out.splitlines():
        if line.startswith("FAILED "):
            return line.removeprefix("FAILED ").split(" - ")[0]
    return ""


def _chosen(faults: Sequence[Fault], only: Sequence[str]) -> list[Fault]:
    if unknown := set(only) - {f.name for f in faults}:
        raise StaleError(f"no such fault: {', '.join(sorted(unknown))}")
    return [f for f in faults if not only or f.name in only]


def campaign(faults: Sequence[Fault], jobs: int, *, as_json: bool) -> int:
    """Try all of ``faults``, each of ``jobs`` threads in a copy of its own. Raises `StaleError`.

    Return the number of those that nothing caught.
    """
    if old := stale(faults):
        raise StaleError("; ".join(old))
    jobs = min(jobs, len(faults))
    with tempfile.TemporaryDirectory(prefix="pl-", dir=MEMORY if MEMORY.is_dir() else None) as scratch:
        copies: queue.SimpleQueue[Copy] = queue.SimpleQueue()
        for number in range(jobs):
            place = Path(scratch) / str(number)
            place.mkdir()
            copies.put(Copy(place))
        copy = copies.get()
        tests, spread = (t for f in faults for t in f.tests), ("-n", str(jobs), "--dist=loadfile")
        code, out = copy.pytest(tests, DEADLINE + 10 * len(faults), *(spread if jobs > 1 else ()))
        copies.put(copy)
        if code != 0:
            raise StaleError(f"without any fault the tests do not pass:\n{out[-3000:]}")
        print(f"without a fault: {out.strip().splitlines()[-1]}", file=sys.stderr, flush=True)

        def try_out(fault: Fault) -> Verdict:
            copy = copies.get()
            try:
                return copy.try_out(fault)
            finally:
                copies.put(copy)

        missed = 0
        threads = ThreadPoolExecutor(jobs)
        try:
            for done in as_completed([threads.submit(try_out, fault) for fault in faults]):
                missed += not done.result().by
                _tell(done.result(), as_json)
        finally:
            threads.shutdown(cancel_futures=True)  # an interrupt ends it after the faults that are being tried
    print(f"{len(faults)} faults, {missed} not caught", file=sys.stderr)
    return missed


def _tell(verdict: Verdict, as_json: bool) -> None:
    if as_json:
        found = {"fault": verdict.name, "caught": bool(verdict.by), "by": verdict.by, "trouble": verdict.trouble}
        print(json.dumps({**found, "seconds": round(verdict.seconds, 2)}), flush=True)
        return
    what = f"caught      {verdict.by}" if verdict.by else f"NOT CAUGHT  {verdict.trouble}"
    print(f"{verdict.name:34} {verdict.seconds:6.1f} s  {what}", flush=True)


def main(argv: Sequence[str]) -> int:
    """``tools/torture --planted``: 0 when every fault is caught."""
    parser = argparse.ArgumentParser(prog="tools/torture --planted")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="only this fault; may be repeated")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, metavar="N", help="try N at a time")
    parser.add_argument("--list", action="store_true", help="say what would be planted")
    parser.add_argument("--json", action="store_true", help="one object per line")
    options = parser.parse_args(argv)
    try:
        faults = _chosen(table(), options.only)
        if options.list:
            for fault in faults:
                print(f"{fault.name:34} {fault.file}")
            return 0
        return min(campaign(faults, max(options.jobs, 1), as_json=options.json), 1)
    except StaleError as e:
        print(f"planted: {e}", file=sys.stderr)
        return 1

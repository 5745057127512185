"""``tools/fuzz``: see the package docstring."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from fuzzlib.bitmap import BitmapTarget
from fuzzlib.case import FuzzTarget, Watch, limit_memory
from fuzzlib.monitor import MonitorTarget
from fuzzlib.nbd_client import ClientTarget
from fuzzlib.nbd_server import ServerTarget
from fuzzlib.repo import RepoTarget
from fuzzlib.text import TextTarget

TARGETS: dict[str, type[FuzzTarget]] = {
    "nbd-server": ServerTarget,
    "nbd-client": ClientTarget,
    "bitmap": BitmapTarget,
    "repo": RepoTarget,
    "monitor": MonitorTarget,
    "text": TextTarget,
}
MEMORY = Path("/dev/shm")
ENOUGH = 20
"""Different findings after which a target is left alone."""


class Run:
    """One run of the tool."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.counts: dict[str, int] = {}
        self.findings: list[dict[str, object]] = []
        self.again: dict[str, int] = {}
        self.keep: Path | None = options.keep
        self._now: tuple[str, int, bytes] = ("", 0, b"")
        self.watch = Watch(self.found)

    def found(self, what: str) -> None:
        """Tell of a finding in the case that runs, and keep its input."""
        target, number, data = self._now
        lines = [line.strip() for line in what.strip().splitlines()]
        places = [line for line in lines if line.startswith("File ") and "/incbak/" in line]
        mark = f"{target} {places[-1:]} {lines[-1].split(':')[0]}"
        self.again[mark] = self.again.get(mark, 0) + 1
        if self.again[mark] > 1:
            return
        self.keep = self.keep or Path(tempfile.mkdtemp(prefix="incbak-fuzz-"))
        self.keep.mkdir(parents=True, exist_ok=True)
        path = self.keep / f"{target}-{self.options.seed}-{number}"
        path.write_bytes(data)
        self.findings.append({"target": target, "case": number, "what": lines[-1][:300], "input": str(path)})
        print(f"FOUND: {target} seed {self.options.seed} case {number}, input {path}\n{what[-4000:]}", file=sys.stderr)

    def target(self, name: str, seconds: float) -> None:
        """Cases of one target until time or cases are up."""
        directory = Path(tempfile.mkdtemp(prefix="incbak-fuzz-", dir=MEMORY if MEMORY.is_dir() else None))
        target = TARGETS[name](directory)
        end = time.monotonic() + seconds
        before, count, number = len(self.findings), 0, self.options.case or 0
        try:
            while count < self.options.cases if self.options.cases else time.monotonic() < end:
                self.one(name, target, number)
                number, count = number + 1, count + 1
                if count % target.settle_every == 0:
                    self.settled(target)
                if len(self.findings) - before >= ENOUGH:
                    break
            self.settled(target)
        finally:
            self.counts[name] = count
            target.close()
            shutil.rmtree(directory, ignore_errors=True)

    def one(self, name: str, target: FuzzTarget, number: int) -> None:
        """One case."""
        if self.options.input:
            data = self.options.input.read_bytes()
        else:
            data = target.make(Random(f"{self.options.seed}/{name}/{number}"))
        self._now = (name, number, data)
        if self.options.dump:
            self.options.dump.mkdir(parents=True, exist_ok=True)
            (self.options.dump / f"{name}-{number}").write_bytes(data)
        if what := self.watch.run(lambda: target.run(data)):
            self.found(what)

    def settled(self, target: FuzzTarget) -> None:
        """Whether all is well after some cases; the last one is named, though an earlier one may be to blame."""
        if what := self.watch.run(target.settle, 60):
            self.found(f"after the cases up to this one: {what}")


def main() -> int:
    """Run; 0 when nothing was found."""
    parser = argparse.ArgumentParser(prog="tools/fuzz")
    parser.add_argument("--target", choices=[*TARGETS, "all"], default="all")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--cases", type=int, help="stop each target after so many cases (default: by time)")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--case", type=int, help="run this case only; with --cases, begin there")
    parser.add_argument("--input", type=Path, help="run this input only")
    parser.add_argument("--keep", type=Path, help="where inputs of findings go (default: a new temporary directory)")
    parser.add_argument("--dump", type=Path, help="write every input here")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.cases is None and (options.case is not None or options.input):
        options.cases = 1
    names = list(TARGETS) if options.target == "all" else [options.target]
    print(f"seed {options.seed}", file=sys.stderr, flush=True)
    limit_memory()
    run = Run(options)
    begun = time.monotonic()
    for name in names:
        run.target(name, options.seconds / len(names))
    result = {"seed": options.seed, "seconds": round(time.monotonic() - begun, 1), "cases": run.counts}
    result["findings"] = run.findings
    if options.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key}: {value}")
    return int(bool(run.findings))


sys.exit(main())

"""``tools/bench``: see there."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from benchlib import rows, work
from benchlib.corpus import make_disk
from benchlib.daily import daily, large
from benchlib.guest import guest
from benchlib.marks import mark
from incbak import __version__
from incbak.units import format_size, parse_size

WORK = {
    "mark": mark,
    "serve": work.serve,
    "full": work.full,
    "encrypted": work.encrypted,
    "second": work.second,
    "sync": work.sync,
    "incremental": work.incremental,
    "fallback": work.fallback,
    "restore": work.restore,
    "guest": guest,
    "daily": daily,
    "large": large,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="tools/bench")
    parser.add_argument("--only", default=",".join(WORK))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", default="2G")
    parser.add_argument("--dir", type=Path, default=Path("/var/tmp"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [name for name in options.only.split(",") if name]
    if unknown := set(chosen) - set(WORK):
        sys.exit(f"no such work: {', '.join(sorted(unknown))}; there are {', '.join(WORK)}")
    top = Path(tempfile.mkdtemp(prefix="incbak-bench-", dir=options.dir))
    try:
        table = _measure(top, chosen, options.runs, parse_size(options.size))
    finally:
        shutil.rmtree(top)
    if options.json:
        machine = {"cpus": os.cpu_count(), "kernel": platform.release(), "incbak": __version__}
        options.json.write_text(json.dumps({"machine": machine, "rows": [asdict(r) for r in table]}, indent=1))
    print(f"{'WORK':34} {'WHO':24} {'MEDIAN':>26} {'RATIO':>7}  GOAL")
    for row in table:
        ratio = f"{row.ratio:.2f}" if row.ratio is not None else ""
        print(f"{row.work:34} {row.who:24} {row.figure:>26} {ratio:>7}  {row.goal}")


def _measure(top: Path, chosen: list[str], runs: int, size: int) -> list[rows.Row]:
    disk = top / "disk.raw"
    data = 0
    if set(chosen) & {"full", "encrypted", "second", "sync", "fallback", "restore"}:
        data = make_disk(disk, size)
        print(f"the disk: {format_size(disk.stat().st_size)} with {format_size(data)} of files", file=sys.stderr)
    bench = rows.Bench(top, runs, disk, data)
    made: list[rows.Row] = []
    for name in chosen:
        print(f"  {name}", file=sys.stderr)
        made += WORK[name](bench)
    return made


main()

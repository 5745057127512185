"""``tools/conformance``: see the package docstring."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from conformlib import injector, iotests, libnbd, tester
from conformlib.cache import MIRROR, Place, Row, Unavailable

SUITES: dict[str, Callable[[Place], Iterator[Row]]] = {
    "iotests": iotests.suite,
    "injector": injector.suite,
    "tester": tester.suite,
    "libnbd": libnbd.suite,
}


def main() -> int:
    """0: nothing failed; 1: something did; 2: a suite could not be had."""
    parser = argparse.ArgumentParser(prog="tools/conformance")
    parser.add_argument("suites", nargs="*", metavar="SUITE")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--mirror", default=MIRROR)
    options = parser.parse_args()
    if unknown := [s for s in options.suites if s not in SUITES]:
        parser.error(f"no suite {unknown[0]}: there are {', '.join(SUITES)}")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "incbak", "conformance")
    cache.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    lacking: dict[str, str] = {}
    for name in dict.fromkeys(options.suites or SUITES):
        with tempfile.TemporaryDirectory(prefix="incbak-conformance-") as work:
            try:
                for row in SUITES[name](Place(cache, Path(work), options.mirror)):
                    rows.append(row)
                    if not options.json:
                        print(f"{row.suite:10}{row.name:40}{row.outcome:8}{row.why}".rstrip(), flush=True)
            except Unavailable as e:
                lacking[name] = str(e)
    report(rows, lacking, as_json=options.json)
    return 1 if any(r.outcome == "failed" for r in rows) else 2 if lacking else 0


def report(rows: list[Row], lacking: dict[str, str], *, as_json: bool) -> None:
    """The sums, and what could not be had."""
    sums = {
        suite: {outcome: sum(r.suite == suite and r.outcome == outcome for r in rows) for outcome in OUTCOMES}
        for suite in dict.fromkeys(r.suite for r in rows)
    }
    if as_json:
        print(json.dumps({"tests": [vars(r) for r in rows], "sums": sums, "unavailable": lacking}))
        return
    for suite, sum_of in sums.items():
        print(f"{suite}: {', '.join(f'{count} {outcome}' for outcome, count in sum_of.items())}")
    for suite, why in lacking.items():
        print(f"{suite}: cannot be run: {why}", file=sys.stderr)


OUTCOMES = ("passed", "failed", "n/a")

if __name__ == "__main__":
    sys.exit(main())

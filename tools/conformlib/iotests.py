"""QEMU's own block tests over NBD, of the installed version: its clients and its QEMU, with our server for qemu-nbd.

Debian's QEMU has no qtest accelerator; the tests never run a guest, so TCG with the processors stopped does.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from conformlib.cache import Place, Row, Unavailable, installed, last_line, need

TESTS = [
    "001", "002", "003", "004", "008", "009", "010", "011", "021", "032",
    "033", "077", "104", "123", "145", "147", "181", "197", "215", "259",
]  # fmt: skip
"""Those of ``check -raw -nbd`` that start qemu-nbd."""
NOT_OURS = {"241": "wants sizes rounded up to 512 bytes, as qemu-nbd does; ours are what they are"}
PATIENT_SLEEP = """
/usr/bin/sleep "$@"
for ((i = 0; $# == 1 && $1 == 1 && i < 100; i++)); do [ -S "${SOCK_DIR:-}/nbd" ] && break; /usr/bin/sleep 0.1; done
"""
"""The tests give qemu-nbd one second to listen, too little for Python where others use the processors."""
SHIM = Path(__file__).resolve().parent.parent / "qemu-nbd-shim"
TIMEOUT = 600


def shim(place: Place) -> Path:
    """The shim as one executable file."""
    return place.script("qemu-nbd", f'exec {shlex.quote(sys.executable)} {shlex.quote(str(SHIM))} "$@"')


def suite(place: Place) -> Iterator[Row]:
    """One row per test."""
    need("qemu-img", "qemu-io", "qemu-system-x86_64", "qemu-storage-daemon")
    if not Path("/usr/bin/python3").exists():
        raise Unavailable("the tests want the system's Python, /usr/bin/python3")
    source = place.source("qemu", installed("qemu-utils")) / "tests" / "qemu-iotests"
    build = place.work / "qemu" / "tests" / "qemu-iotests"
    build.mkdir(parents=True)
    (build / "check").symlink_to(source / "check")
    programs = place.work / "programs"
    programs.mkdir()
    place.script("programs/sleep", PATIENT_SLEEP)
    stopped = 'set -- "${@/#qtest/tcg}"\nexec /usr/bin/qemu-system-x86_64 "$@" -S'
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")},
        "PATH": f"{programs}:/usr/bin:/bin:/usr/sbin:/sbin",
        "TEST_DIR": str(place.work / "scratch"),
        "QEMU_PROG": str(place.script("qemu-system-x86_64", stopped)),
        "QEMU_IMG_PROG": "/usr/bin/qemu-img",
        "QEMU_IO_PROG": "/usr/bin/qemu-io",
        "QSD_PROG": "/usr/bin/qemu-storage-daemon",
        "QEMU_NBD_PROG": str(shim(place)),
    }
    for name in TESTS:
        yield _run(name, source, build, environment)
    for name, why in NOT_OURS.items():
        yield Row("iotests", name, "n/a", why)


def _run(name: str, source: Path, build: Path, environment: dict[str, str]) -> Row:
    command = ["/usr/bin/python3", "./check", "-raw", "-nbd", "-tap", name]
    try:
        done = subprocess.run(
            command, cwd=build, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Row("iotests", name, "failed", f"not done within {TIMEOUT} s")
    if skipped := re.search(r"# SKIP (.*)", done.stdout):
        return Row("iotests", name, "n/a", skipped[1])
    if re.search(r"^ok ", done.stdout, re.M):
        return Row("iotests", name, "passed")
    changed = [line for line in (done.stdout + done.stderr).splitlines() if re.match(r"# [-+](?!--|\+\+)", line)]
    return Row("iotests", name, "failed", (changed or [last_line(done.stdout + done.stderr)])[0][:160])

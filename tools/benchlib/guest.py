"""What a guest feels of a backup: the time of its synced writes without one, during one, and when its sink stalls."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchlib.rows import Bench, Row
from benchlib.runs import have, incbak

_TOP = Path(__file__).parents[2]
_SIZE = 512 << 20
_SECONDS = 6.0


def guest(bench: Bench) -> list[Row]:
    """A real guest kernel writes 4 KiB records, each synced. Empty where no guest can be run."""
    sys.path.insert(0, str(_TOP))
    from tests.kit import initramfs
    from tests.kit.guest import Guest, GuestDisk, Target

    if not have("qemu-system-x86_64") or initramfs.kernel() is None or initramfs.busybox() is None:
        print("    left out: it needs qemu-system-x86, linux-image-cloud-amd64 and busybox-static", file=sys.stderr)
        return []
    image = bench.directory / "guest.raw"
    with image.open("wb") as file:
        for _ in range(_SIZE >> 20):
            file.write(os.urandom(1 << 20))
    rows: list[Row] = []
    for kind in ("plain", "iothread"):
        bench.forget()
        with Guest(bench.directory / kind, [GuestDisk("vda", image, iothread=kind == "iothread")]) as vm:
            vm.start_writer("w", 1, [Target("vda", spacing=3 * 65536)], slots=2000)
            vm.wait_acked("w", 50)
            rows += _figures(bench, vm, f"guest's synced writes, {kind} disk")
    image.unlink()
    return rows


def _figures(bench: Bench, vm: Any, work: str) -> Iterator[Row]:
    vm.figures("w")
    time.sleep(_SECONDS)
    yield _row(work, "no backup", vm.figures("w"))
    with _backup(bench, vm.monitor, "--speed-limit", "60M") as process:
        process.wait()
    yield _row(work, "during a full at 60 MiB/s", vm.figures("w"))
    with _backup(bench, vm.monitor, "--speed-limit", "60M") as process:
        time.sleep(2.0)
        process.send_signal(signal.SIGSTOP)
        vm.figures("w")
        time.sleep(_SECONDS)
        yield _row(work, "its sink stopped", vm.figures("w"))
        process.send_signal(signal.SIGCONT)
        process.wait()


@contextmanager
def _backup(bench: Bench, monitor: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = incbak("-q", "full", f"qmp:{monitor}", "--name", "vm", *options)
    process = subprocess.Popen([str(a) for a in command], env={**os.environ, **bench.env()})
    try:
        yield process
    finally:
        process.kill()
    if process.wait():
        sys.exit(f"the backup of the guest exited with {process.returncode}")


def _row(work: str, who: str, found: dict[str, Any]) -> Row:
    if found["failed"]:
        sys.exit(f"{found['failed']} writes of the guest failed")
    times = " / ".join(f"{found[name] * 1000:.1f}" for name in ("p50", "p99", "max"))
    return Row(work, who, f"{times} ms (p50 / p99 / max)")

"""What it costs to record a write, beside the write itself; in this process, without NBD."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

from benchlib.rows import Bench, Row
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk
from incbak.serve.tracker import TrackedDisk

_CLUSTER = 65536
_CLUSTERS = 4096


def mark(bench: Bench) -> list[Row]:
    """The first write of each cluster, later ones, and a 4 KiB pwrite into the page cache."""
    image = bench.directory / "marked.raw"
    with image.open("wb") as f:
        for _ in range(_CLUSTERS):
            f.write(bytes(_CLUSTER))
    disk = open_disk(image)
    store = BitmapStore(bench.directory / "state", "mark", "vda")
    store.lock()
    found: dict[str, list[float]] = {}
    data = os.urandom(4096)
    for run in range(bench.runs):
        tracked = TrackedDisk("vda", disk, store)
        tracked.bitmaps["b"] = store.create(f"b{run}", disk.size, _CLUSTER, disk.fingerprint())
        tracked.refresh()
        for offset in range(0, disk.size, 1 << 26):
            tracked.before_write(offset, 4096)  # the regions' syncs are paid for here

        def record(offset: int, tracked: TrackedDisk = tracked) -> None:
            tracked.before_write(offset, 4096)

        def write(offset: int) -> None:
            os.pwrite(disk.fd, data, offset)

        for name, step in (("first write of a cluster", record), ("later writes", record), ("the write itself", write)):
            found.setdefault(name, []).append(_nanoseconds(step))
    disk.close()
    store.unlock()
    image.unlink()
    medians = {name: statistics.median(times) for name, times in found.items()}
    whole = medians["the write itself"]
    return [Row("recording a 4 KiB write", name, f"{t:,.0f} ns", t / whole) for name, t in medians.items()]


def _nanoseconds(step: Callable[[int], None]) -> float:
    offsets = [n * _CLUSTER + 8192 for n in range(_CLUSTERS)]
    began = time.perf_counter_ns()
    for offset in offsets:
        step(offset)
    return (time.perf_counter_ns() - began) / len(offsets)

"""Looking after a repository: 100 backups of an 8 GiB disk, and a simulated disk of 1 TiB. Seconds and peak memory."""

from __future__ import annotations

import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from benchlib.rows import Bench, Row
from benchlib.runs import Case, have, in_turns, incbak
from benchlib.work import serving

BACKUPS = 100
SIZE = 8 << 30
_FILES = 512 << 20
_CHANGED = 120
"""Clusters between two backups: some are new content, most change in a few bytes."""
_LARGE = 1 << 40
_LIMIT = "< 300 MiB"
_READ = (
    "B=/bin/busybox; $B mount -t ext4 -o ro,noload /dev/vda /mnt && $B find /mnt -type f -exec $B cat {} + > /dev/null"
)
_TOP = Path(__file__).parents[2]


def daily(bench: Bench) -> list[Row]:
    """Check, prune, drill, export and files on a repository of many backups of a disk with a file system."""
    image = bench.directory / "daily.raw"
    if not _file_system(image):
        return []
    _history(bench, image)
    bench.run(*incbak("-q", "prune", "--keep-last", str(BACKUPS)))
    keep = bench.directory / "kept"
    shutil.move(bench.repo, keep)

    def again() -> None:
        """Files are never changed, so a tree of links is a copy."""
        shutil.rmtree(bench.repo, ignore_errors=True)
        shutil.copytree(keep, bench.repo, copy_function=lambda a, b: Path(b).hardlink_to(a))

    def never_pruned() -> None:
        again()
        shutil.rmtree(bench.repo / "needs")

    def prune(rest: int) -> Case:
        command = incbak("-q", "prune", "--keep-last", str(rest), "--grace", "0")
        return Case(f"prune, {BACKUPS - rest} backups go", command, again)

    first = Case("the first prune, 1 backup goes", prune(BACKUPS - 1).command, never_pruned)

    copied = bench.directory / "copied"
    cases = [
        Case("check", incbak("-q", "check"), again),
        Case("check --read-data", incbak("-q", "check", "--read-data"), again),
        first, prune(BACKUPS), prune(BACKUPS - 1), prune(BACKUPS // 2), prune(1),
        Case("drill", incbak("-q", "drill", "--scratch-dir", str(bench.directory)), again),
        Case("drill --sample 5%", incbak("-q", "drill", "--sample", "5%"), again),
        Case("files ls", incbak("-q", "files", "ls", "latest", "/"), again),
        Case("files cp", incbak("-q", "files", "cp", "latest", "-R", "/", copied), lambda: _emptied(copied)),
    ]  # fmt: skip
    rows = _figures(bench, f"{BACKUPS} backups of {SIZE >> 30} GiB", cases)
    again()
    rows += _export(bench, image)
    for left in (image, image.with_suffix(".out")):
        left.unlink(missing_ok=True)
    shutil.rmtree(keep)
    shutil.rmtree(copied, ignore_errors=True)
    return rows


def _emptied(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()


def large(bench: Bench) -> list[Row]:
    """The same of a disk of 1 TiB without a hole: its index and tree, not its data."""
    shutil.rmtree(bench.repo, ignore_errors=True)
    code = "import sys; from pathlib import Path; from benchlib.simulated import simulate; "
    code += f"simulate(Path(sys.argv[1]), {_LARGE}, 1000)"
    # in a process of its own: the memory of this one is the floor of what its children seem to take
    env = {**os.environ, "PYTHONPATH": f"{_TOP}:{_TOP}/tools"}
    subprocess.run([sys.executable, "-c", code, str(bench.repo)], check=True, env=env)
    cases = [Case("check", incbak("-q", "check")),
             Case("prune --dry-run", incbak("-q", "prune", "--keep-last", "1", "--dry-run")),
             Case("list", incbak("-q", "list"))]  # fmt: skip
    rows = _figures(bench, "1 TiB, index and tree only", cases)
    once = [Case("the first prune, nothing goes", incbak("-q", "prune", "--keep-last", "2", "--grace", "0")),
            Case("prune, 1 backup goes", incbak("-q", "prune", "--keep-last", "1", "--grace", "0"))]  # fmt: skip
    return rows + _figures(Bench(bench.directory, 1, bench.disk, bench.data), "1 TiB, index and tree only", once)


def _figures(bench: Bench, work: str, cases: Sequence[Case]) -> list[Row]:
    for case in cases:
        case.env = bench.env()
    found = in_turns(cases, bench.runs)
    return [Row(work, name, f"{f.median:.2f} s, {f.memory:.0f} MiB", goal=_LIMIT) for name, f in found.items()]


def _file_system(image: Path) -> bool:
    """An ext4 with real files in the first half. False where it cannot be made."""
    if not have("mkfs.ext4"):
        print("    left out: it needs mkfs.ext4", file=sys.stderr)
        return False
    source, left = image.with_suffix(".files"), _FILES
    source.mkdir()
    for path in sorted(p for p in Path("/usr/lib").rglob("*") if p.is_file() and not p.is_symlink()):
        size = path.stat().st_size
        if size < left:
            shutil.copy(path, source / f"{left:x}")
            left -= size
    with image.open("wb") as f:
        f.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", source, image, f"{SIZE >> 11}k"], check=True, capture_output=True)
    shutil.rmtree(source)
    return True


def _history(bench: Bench, image: Path) -> None:
    from incbak.nbd.client import NbdClient

    bench.forget()
    rng = random.Random(1)
    with serving(bench, image, "d") as uri:
        bench.run(*incbak("-q", "full", f"qmp:{bench.directory}/d.qmp"))
        for _ in range(BACKUPS - 1):
            client = NbdClient.connect(uri)
            for n in range(_CHANGED):  # behind the file system, so that it stays whole
                cluster = rng.randrange(SIZE // 2 >> 16, (SIZE >> 16) - 1024)
                client.submit_write(rng.randbytes(65536 if n % 10 == 0 else 2048), cluster << 16)
            client.drain()
            client.close()
            bench.run(*incbak("-q", "incremental", "--no-fallback", f"qmp:{bench.directory}/d.qmp"))


def _export(bench: Bench, image: Path) -> list[Row]:
    """Reading all of it, and a guest that mounts it and reads its files: beside the same from a local file."""
    work, out = "export", image.with_suffix(".out")
    rows: list[Row] = []
    with _exporting(bench, rows) as uri:
        for name, source in (("read whole", uri), ("the same, local file", str(image))):
            seconds = []
            for _ in range(bench.runs):
                began = time.perf_counter()
                bench.run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, out)
                seconds.append(time.perf_counter() - began)
            rows.append(Row(work, name, f"{statistics.median(seconds):.2f} s"))
        rows += _guests(bench, {"guest boots, reads its files": uri, "the same, local file": str(image)})
    return rows


@contextmanager
def _exporting(bench: Bench, rows: list[Row]) -> Iterator[str]:
    """The URI of the newest backup's disk; a row for the memory in the end."""
    argv = [str(a) for a in incbak("export", "latest", "--socket", bench.directory / "e.sock")]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, env={**os.environ, **bench.env()})
    try:
        assert process.stdout
        yield process.stdout.readline().split()[1]
        status = Path(f"/proc/{process.pid}/status").read_text()
        peak = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
        rows.append(Row("export", "most memory", f"{int(peak) >> 10} MiB", goal=_LIMIT))
    finally:
        process.terminate()
        process.communicate()


def _guests(bench: Bench, sources: dict[str, str]) -> list[Row]:
    sys.path.insert(0, str(_TOP))
    from tests.kit import initramfs
    from tests.kit.guest import Guest, GuestDisk

    if not have("qemu-system-x86_64") or initramfs.kernel() is None or initramfs.busybox() is None:
        print("    left out: a guest; it needs qemu-system-x86, a kernel and busybox-static", file=sys.stderr)
        return []
    rows, seconds = [], {name: list[float]() for name in sources}
    for turn in range(bench.runs):
        for name, source in sources.items():
            began = time.perf_counter()
            disk = GuestDisk("vda", source if source.startswith("nbd") else Path(source), read_only=True)
            with Guest(bench.directory / f"guest{turn}", [disk]) as guest:
                guest("run", 600, argv=["sh", "-c", _READ])
                seconds[name].append(time.perf_counter() - began)
    for name, found in seconds.items():
        rows.append(Row("export", name, f"{statistics.median(found):.2f} s"))
    return rows

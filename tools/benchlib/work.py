"""One function per row of the table. Each returns lines: (what, figure, goal or empty)."""

from __future__ import annotations

import json
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchlib.rows import Bench, Row
from benchlib.runs import Case, emptied, have, incbak
from incbak.units import format_size

# -- serve ------------------------------------------------------------------------------------------------------------


def serve(bench: Bench) -> list[Row]:
    """4 KiB random writes at depth 16: tracked, untracked, and qemu-nbd on a file of the same kind."""
    images = {who: bench.directory / f"{who}.raw" for who in ("tracked", "untracked", "qemu-nbd")}
    for image in images.values():
        with image.open("wb") as f:
            for _ in range(256):
                f.write(os.urandom(4096) * 256)
    rates: dict[str, dict[str, list[float]]] = {}
    bench.forget()
    with serving(bench, images["tracked"], "t") as tracked, serving(bench, images["untracked"], "u") as untracked:
        bench.run(*incbak("-q", "full", f"qmp:{bench.directory}/t.qmp"))
        with _qemu_nbd(bench, images["qemu-nbd"]) as rival:
            uris = {"incbak, tracked": tracked, "incbak, untracked": untracked, "qemu-nbd": rival}
            for shape, options in _SHAPES.items():
                for turn in range(bench.runs):
                    for who in random.Random(f"{shape} {turn}").sample(sorted(uris), len(uris)):
                        rates.setdefault(shape, {}).setdefault(who, []).append(_fio(who, uris[who], options))
    for image in images.values():
        image.unlink()
    return [row for shape, found in rates.items() for row in _rate_rows(shape, found)]


_SHAPES = {
    "4 KiB random writes, depth 16": ("randwrite", "4k", 16),
    "4 KiB random reads, depth 16": ("randread", "4k", 16),
    "1 MiB writes, depth 4": ("write", "1m", 4),
}


def _rate_rows(shape: str, found: dict[str, list[float]]) -> Iterator[Row]:
    """The ratio is the median of those of each turn: what the machine does changes from turn to turn."""
    ours = found["incbak, tracked"]
    yield Row(shape, "incbak, tracked", f"{statistics.median(ours):,.0f}/s")
    for who, goal in (("incbak, untracked", ">= 0.95"), ("qemu-nbd", ">= 2.5")):
        ratio = statistics.median(our / its for our, its in zip(ours, found[who], strict=True))
        wanted = goal if "4 KiB random writes" in shape else ""
        yield Row(shape, who, f"{statistics.median(found[who]):,.0f}/s", ratio, wanted)


def _fio(who: str, uri: str, options: tuple[str, str, int]) -> float:
    how, size, depth = options
    command = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={how}", f"--bs={size}",
               f"--iodepth={depth}", "--time_based", "--runtime=4", "--size=256m", "--randrepeat=0",
               "--output-format=json"]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"fio exited {done.returncode}: {done.stderr[-500:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    rate = float(job["read" if "read" in how else "write"]["iops"])
    print(f"    {who}: {how} {size}: {rate:,.0f}/s", file=sys.stderr, flush=True)
    return rate


@contextmanager
def serving(bench: Bench, image: Path, name: str) -> Iterator[str]:
    sock, monitor = bench.directory / f"{name}.sock", bench.directory / f"{name}.qmp"
    command = incbak("serve", "--name", name, "--socket", sock, "--monitor", monitor, f"vda={image}")
    argv = [str(a) for a in command]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, **bench.env()})
    try:
        assert process.stdout
        if b"ready" not in process.stdout.readline():
            sys.exit("serve did not start")
        yield f"nbd+unix:///vda?socket={sock}"
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def _qemu_nbd(bench: Bench, image: Path) -> Iterator[str]:
    sock = bench.directory / "rival.sock"
    argv = ["qemu-nbd", "-f", "raw", "-t", "-e", "8", "-k", str(sock), "-x", "vda", "--cache=writeback", str(image)]
    process = subprocess.Popen(argv)
    try:
        while not sock.exists():
            time.sleep(0.01)
        yield f"nbd+unix:///vda?socket={sock}"
    finally:
        process.terminate()
        process.wait()


# -- backups ----------------------------------------------------------------------------------------------------------


def _rivals(bench: Bench, *, fresh: bool) -> list[Case]:
    cases = []
    borg, restic = bench.directory / "borg", bench.directory / "restic"
    if have("borg"):

        def new_borg() -> None:
            emptied(borg)()
            bench.run("borg", "init", "-e", "none", borg)

        archive = f"{borg}::{{now:%H%M%S%f}}"
        create = ["borg", "create", "-C", "zstd,1", "--chunker-params", "fixed,65536", "--files-cache=disabled",
                  archive, bench.disk]  # fmt: skip
        cases.append(Case("borg", create, new_borg if fresh else lambda: None))
    if have("restic"):

        def new_restic() -> None:
            emptied(restic)()
            bench.run("restic", "init", "-r", restic)

        create = ["restic", "-r", restic, "backup", "--force", "-q", bench.disk]
        cases.append(Case("restic", create, new_restic if fresh else lambda: None))
    return cases


def full(bench: Bench) -> list[Row]:
    """The first full of a disk."""
    out = bench.directory / "out.qcow2"
    cases = [Case("incbak", incbak("-q", "full", bench.disk, "--name", "vm"), bench.forget)]
    cases += _rivals(bench, fresh=True)
    if have("qemu-img"):
        convert = ["qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd",
                   "-m", str(os.cpu_count()), "-W", bench.disk, out]  # fmt: skip
        cases.append(Case("qemu-img", convert, emptied(out)))
    if have("zstd"):
        limit = ["zstd", "-1", f"-T{os.cpu_count()}", "-q", "-c", bench.disk]
        cases.append(Case("limit: zstd -1", limit, output=bench.directory / "out.zst"))
    goals = dict.fromkeys(("borg", "restic", "qemu-img"), ">= 2")
    rows = bench.compare("first full", cases, {**goals, "limit: zstd -1": ">= 0.77"})
    for left in (out, bench.directory / "out.zst"):
        left.unlink(missing_ok=True)
    return rows


def encrypted(bench: Bench) -> list[Row]:
    """The first full of a disk into an encrypted repository, beside a plain one, and restic, which always encrypts."""
    passphrase = bench.directory / "passphrase"
    passphrase.write_text("x\n")
    passphrase.chmod(0o600)
    secret = {"INCBAK_PASSWORD_FILE": str(passphrase)}

    def new() -> None:
        bench.forget()
        emptied(bench.repo)()
        bench.run("env", f"INCBAK_PASSWORD_FILE={passphrase}", *incbak("-q", "init", "--encrypt"))

    command = incbak("-q", "full", bench.disk, "--name", "vm")
    cases = [Case("incbak", command, new, env=secret), Case("incbak, plain", command, bench.forget)]
    cases += [case for case in _rivals(bench, fresh=True) if case.name == "restic"]
    rows = bench.compare("first full, encrypted", cases, {"restic": ">= 2"})
    emptied(bench.repo)()
    return rows


def sync(bench: Bench) -> list[Row]:
    """A backup copied to an empty second repository, encrypted as restic's are, and plain; the limit: copying files."""
    passphrase, other, copied = bench.directory / "passphrase", bench.directory / "other", bench.directory / "copied"
    passphrase.write_text("x\n")
    passphrase.chmod(0o600)
    bench.forget()
    bench.run(*incbak("-q", "full", bench.disk, "--name", "vm"))

    def new(*how: str) -> None:
        emptied(other)()
        bench.run("env", f"INCBAK_PASSWORD_FILE={passphrase}", *incbak("-q", "init", other, *how))

    here, theirs = bench.directory / "restic", bench.directory / "restic2"

    def new_restic() -> None:
        emptied(theirs)()
        bench.run("restic", "init", "-q", "-r", theirs, "--from-repo", here, "--copy-chunker-params")

    command, secret = incbak("-q", "sync", other), {"INCBAK_TARGET_PASSWORD_FILE": str(passphrase)}
    cases = [Case("incbak", command, lambda: new("--encrypt"), env=secret), Case("incbak, plain", command, new)]
    for case in _rivals(bench, fresh=True):
        if case.name == "restic":
            case.before()
            bench.run(*case.command)
            cases.append(Case("restic copy", ["restic", "-q", "-r", theirs, "copy", "--from-repo", here], new_restic))
    cases.append(Case("limit: cp -r", _synced(f"cp -r {bench.repo} {copied}", f"-f {copied}"), emptied(copied)))
    rows = bench.compare("sync of one backup", cases, {"restic copy": ">= 2"})
    for left in (other, copied, theirs):
        emptied(left)()
    return rows


def second(bench: Bench) -> list[Row]:
    """A second full with nothing changed."""
    bench.forget()
    bench.run(*incbak("-q", "full", bench.disk, "--name", "vm"))
    rivals = _rivals(bench, fresh=False)
    for case in _rivals(bench, fresh=True):
        case.before()
        bench.run(*case.command)
    cases = [Case("incbak", incbak("-q", "full", bench.disk, "--name", "vm")), *rivals]
    return bench.compare("second full, nothing changed", cases, {"borg": ">= 2.5", "restic": ">= 2.5"})


def fallback(bench: Bench) -> list[Row]:
    """An incremental whose bitmap is not believed: everything is read, and only what differs is stored."""
    seconds, reports = [], []
    for _ in range(bench.runs):
        bench.forget()
        first = bench.ask(*incbak("--json", "full", bench.disk, "--name", "vm"))
        os.utime(bench.disk)
        began = time.perf_counter()
        reports.append(bench.ask(*incbak("--json", "incremental", bench.disk, "--name", "vm")))
        seconds.append(time.perf_counter() - began)
    last = reports[-1]["disks"][0]
    if last["reason"] != "disk-changed":
        sys.exit(f"the disk was not read whole: {last}")
    work = "incremental, bitmap not believed"
    naive = first["disks"][0]["stored"]
    what = f"{statistics.median(seconds):.2f} s, read {format_size(last['read'])}, stored {format_size(last['stored'])}"
    return [Row(work, "incbak", what), Row(work, "a naive full stores", format_size(naive))]


def incremental(bench: Bench) -> list[Row]:
    """1 000 random dirty clusters on a sparse disk of 1 TiB, and of 64 GiB."""
    medians = {}
    for name, size in (("1 TiB", 1 << 40), ("64 GiB", 1 << 36)):
        image = bench.directory / "sparse.raw"
        with image.open("wb") as f:
            f.truncate(size)
        bench.forget()
        monitor = bench.directory / "s.qmp"
        seconds = []
        with serving(bench, image, "s"):
            bench.run(*incbak("-q", "full", f"qmp:{monitor}"))
            for run in range(bench.runs):
                _dirty(bench, size, run)
                began = time.perf_counter()
                bench.run(*incbak("-q", "incremental", "--no-fallback", f"qmp:{monitor}"))
                seconds.append(time.perf_counter() - began)
                print(f"    {name}: {seconds[-1]:.2f} s", file=sys.stderr, flush=True)
        image.unlink()
        medians[name] = statistics.median(seconds)
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    work = "incremental, 1 000 dirty clusters"
    return [
        Row(work, "incbak, 1 TiB disk", f"{medians['1 TiB']:.2f} s (all children so far: {memory:.0f} MiB)"),
        Row(work, "incbak, 64 GiB disk", f"{medians['64 GiB']:.2f} s", medians["1 TiB"] / medians["64 GiB"], "< 1.2"),
    ]


def _dirty(bench: Bench, size: int, seed: int) -> None:
    from incbak.nbd.client import NbdClient

    client = NbdClient.connect(f"nbd+unix:///vda?socket={bench.directory}/s.sock")
    rng = random.Random(seed)
    for _ in range(1000):
        client.submit_write(rng.randbytes(4096), rng.randrange(size >> 16) << 16)
    client.drain()
    client.close()


def restore(bench: Bench) -> list[Row]:
    """The disk back to a raw file."""
    bench.forget()
    bench.run(*incbak("-q", "full", bench.disk, "--name", "vm"))
    out = bench.directory / "restored.raw"
    cases = [Case("incbak", incbak("-q", "restore", "latest", out), emptied(out))]
    goals = {}
    if have("qemu-img"):
        packed = bench.directory / "packed.qcow2"
        bench.run("qemu-img", "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", "compression_type=zstd", "-m",
                  str(os.cpu_count()), "-W", bench.disk, packed)  # fmt: skip
        cases.append(Case("qemu-img", _synced(f"qemu-img convert -O raw {packed} {out}", out), emptied(out)))
        goals["qemu-img"] = "> 1"
    if have("borg"):
        made = next(case for case in _rivals(bench, fresh=True) if case.name == "borg")
        made.before()
        bench.run("borg", "create", "-C", "zstd,1", "--chunker-params", "fixed,65536", f"{bench.directory}/borg::r",
                  bench.disk)  # fmt: skip
        extract = f"borg extract --stdout --sparse {bench.directory}/borg::r > {out}"
        cases.append(Case("borg", _synced(extract, out), emptied(out)))
        goals["borg"] = "> 1"
    cases.append(Case("limit: cp", _synced(f"cp --sparse=always {bench.disk} {out}", out), emptied(out)))
    goals["limit: cp"] = ">= 0.83"
    rows = bench.compare("restore to a raw file", cases, goals)
    subprocess.run(["cmp", bench.disk, out], check=True)
    return rows


def _synced(command: str, out: Path | str) -> list[str | Path]:
    """A shell command, and the sync that we make too."""
    return ["sh", "-c", f"{command} && sync {out}"]

"""``nbd-tester-client`` of the reference implementation against ``incbak serve``, as its own ``simple_test`` calls it.

Its test tool compiles alone; headers of GLib come from an unpacked package.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from conformlib.cache import Place, Row, Unavailable, compile_c, last_line, runtime_library
from conformlib.serving import served

MIB = 1 << 20
TIMEOUT = 600
CONFIG = """
#define PACKAGE_NAME "nbd"
#define PACKAGE_VERSION "0"
#define VERSION "0"
#define SIZEOF_UNSIGNED_LONG_INT 8
#define SIZEOF_UNSIGNED_INT 4
#define SIZEOF_UNSIGNED_SHORT_INT 2
#define HAVE_FDATASYNC 1
#define NBD_LFS 1
#define _FILE_OFFSET_BITS 64
"""


def suite(place: Place) -> Iterator[Row]:
    """The tests that do not judge the configuration file of nbd-server."""
    source = place.source("nbd")
    program = _build(place, source)
    run = source / "tests" / "run"
    plain = ["-N", "export1"]
    integrity, huge = run / "integrity-test.tr", _huge(place, source)
    cases: list[tuple[str, int, bool, Sequence[str | Path]]] = [
        ("handshake", 50, False, ["-h", *plain]),
        ("throughput, reading", 50, False, plain),
        ("throughput, writing", 50, False, [*plain, "-w"]),
        ("throughput, writing with flushes", 50, False, [*plain, "-w", "-f"]),
        ("writing to a read-only export", 50, True, [*plain, "-w", "-F"]),
        ("oversize", 50, False, ["-o", *plain]),
        ("integrity", 50, False, [*plain, "-i", "-t", integrity]),
        ("integrityhuge, to 32 MB", 50, False, [*plain, "-i", "-t", huge]),
    ]
    for name, size, read_only, options in cases:
        yield _run(place, program, name, size * MIB, read_only, options)
    yield Row("tester", "integrityhuge", "n/a", "requests of up to 50 MB; ours, and the protocol's default, are 32 MiB")
    for name in ("cfg1", "cfgmulti", "cfgsize", "dirconfig", "list", "rowrite", "tree", "rotree", "inetd"):
        yield Row("tester", name, "n/a", "judges nbd-server's configuration or layout of files")
    for name in ("tls", "tlshuge", "tlswrongcert"):
        yield Row("tester", name, "n/a", "needs the sources' GnuTLS build; TLS is tested with libnbd and QEMU")


def _huge(place: Place, source: Path) -> Path:
    """A trace as that of integrityhuge, from the same generator, with requests as large as the protocol promises."""
    text = (source / "make-integrityhuge.c").read_text()
    for theirs, ours in (
        ("filesize=50*1000*1000", "filesize=32*1000*1000"),
        ("(req.handle)", "(&req.cookie)"),  # as their header has it by now
        ("(rep.handle)", "(&rep.cookie)"),
    ):
        if theirs not in text:
            raise Unavailable(f"make-integrityhuge.c has no {theirs}")
        text = text.replace(theirs, ours)
    (place.work / "huge.c").write_text(text)
    options = f"-I{place.work}", f"-I{source}"
    program = compile_c(place, "make-huge", [place.work / "huge.c", source / "cliserv.c"], *options)
    trace = place.work / "huge.tr"
    with trace.open("wb") as out:
        subprocess.run([program], stdout=out, check=True, timeout=TIMEOUT)
    return trace


def _build(place: Place, source: Path) -> Path:
    (place.work / "config.h").write_text(CONFIG)
    glib = place.library("libglib2.0-dev")
    configured = next(glib.glob("usr/lib/*/glib-2.0/include"))
    includes = [place.work, source, glib / "usr" / "include" / "glib-2.0", configured]
    return compile_c(
        place,
        "nbd-tester-client",
        [source / "tests" / "run" / "nbd-tester-client.c", source / "cliserv.c"],
        *(f"-I{i}" for i in includes),
        runtime_library("libglib-2.0"),
    )


def _run(place: Place, program: Path, name: str, size: int, read_only: bool, options: Sequence[str | Path]) -> Row:
    with served(place, "export1", size, "--read-only" if read_only else "") as (host, port):
        command = [str(program), *(str(o) for o in options), host, str(port)]
        try:
            done = subprocess.run(command, cwd=place.work, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        except subprocess.TimeoutExpired:
            return Row("tester", name, "failed", f"not done within {TIMEOUT} s")
    if done.returncode:
        return Row("tester", name, "failed", last_line(done.stderr + done.stdout) or f"exit code {done.returncode}")
    return Row("tester", name, "passed")

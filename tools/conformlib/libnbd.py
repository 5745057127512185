"""libnbd's own interop programs, of the installed version, with our server where they start one of theirs.

They are compiled against the header of the source package and the installed library. A program that starts ``qemu-nbd``
gets the shim, one that starts ``nbdkit`` a script that serves a file or zeroes on stdin and stdout.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from conformlib.cache import Place, Row, Unavailable, compile_c, installed, last_line, runtime_library
from conformlib.iotests import shim
from tests.kit.certs import Authority

TIMEOUT = 60
NBDKIT = """
[ "$1" = --version ] && exit 0
tls=()
while :; do
    case "${1:-}" in
    -s | -v | --exit-with-parent | --tls=*) ;;
    --tls-certificates=*) tls=(--tls-certs "${1#*=}") ;;
    *) break ;;
    esac
    [ "$1" = --tls=off ] && off=1
    shift
done
[ -z "${off:-}" ] || tls=()
d=$(mktemp -d)
trap 'rm -rf "$d"' EXIT
case "$1" in
memory) truncate -s "$2" "$d/image"; image=$d/image ;;
file) image=$2 ;;
*) exit 3 ;;
esac
%s -m incbak serve --stdio --name x --state-dir "$d" "${tls[@]}" "disk=$image"
"""
NOT_OURS = {
    "errors-server-unadvertised-cmd": "an export that takes writes but no trims, which we have not",
    "errors-server-zerosize": "the protocol leaves a length of 0 open: we succeed, as qemu-nbd does; nbdkit refuses",
    "errors-server-unaligned": "we take requests of any alignment",
    "interop-nbd-server": "the same program as interop-nbdkit, and nbd-server's command line",
    "interop-qemu-nbd-tls-psk": "no pre-shared keys, certificates only",
    "interop-nbdkit-tls-psk": "no pre-shared keys, certificates only",
    "list-exports-nbdkit": "nbdkit's command line; as list-exports-qemu-nbd",
    "dirty-bitmap": "a bitmap of a qcow2 image; ours are in tests/interop",
    "structured-read": "a qcow2 image with a hole; of a raw one the client sees data",
    "interop-qemu-block-size": "block sizes of qcow2 and LUKS images",
    "interop-qemu-storage-daemon": "no server of ours in it",
}


def suite(place: Place) -> Iterator[Row]:
    """One row per program."""
    source = place.source("libnbd", installed("libnbd0"))
    (place.work / "config.h").write_text("#define HAVE_GNUTLS_NO_SIGNAL 1\n")
    programs = place.work / "programs"
    programs.mkdir(exist_ok=True)
    nbdkit = place.script("programs/nbdkit", NBDKIT % shlex.quote(sys.executable))
    qemu_nbd = shim(place)
    ours = f'-DSERVER="{qemu_nbd}"', "-DSOCKET_ACTIVATION=1", "-DNEEDS_TMPFILE=1"
    params = '"-f", "raw", "-x", "disk", '
    cases: list[tuple[str, str, tuple[str, ...]]] = [
        ("interop-qemu-nbd", "interop/interop.c", (*ours, f"-DSERVER_PARAMS={params}TMPFILE", '-DEXPORT_NAME="disk"')),
        (
            "interop-nbdkit",
            "interop/interop.c",
            (
                f'-DSERVER="{nbdkit}"',
                "-DNEEDS_TMPFILE=1",
                '-DSERVER_PARAMS="-s", "--exit-with-parent", "file", TMPFILE',
            ),
        ),
        (
            "list-exports-qemu-nbd",
            "interop/list-exports.c",
            (
                *ours,
                f"-DSERVER_PARAMS={params}TMPFILE",
                '-DEXPORTS="disk", "disk:ro"',
                '-DDESCRIPTIONS="disk disk", "disk disk, read-only"',
            ),
        ),
        (
            "socket-activation-qemu-nbd",
            "interop/socket-activation.c",
            (f'-DSERVER="{qemu_nbd}"', f"-DSERVER_PARAMS={params}tmpfile"),
        ),
    ]
    cases += _with_tls(place, qemu_nbd, nbdkit)
    errors = sorted(p.stem for p in (source / "tests").glob("errors-server-*.c"))
    cases += [(name, f"tests/{name}.c", ()) for name in errors if name not in NOT_OURS]
    for name, file, options in cases:
        try:
            outcome = _run(place, source, name, source / file, options)
        except Unavailable as e:
            outcome = Row("libnbd", name, "failed", str(e))
        yield outcome
    for name, why in NOT_OURS.items():
        yield Row("libnbd", name, "n/a", why)


def _with_tls(place: Place, qemu_nbd: Path, nbdkit: Path) -> list[tuple[str, str, tuple[str, ...]]]:
    """The same program, which finds certificates in ``../tests/pki``."""
    pki = place.work / "tests" / "pki"
    Authority(place.work / "ca").issue(pki, "server", "client")
    creds = f'"--object", "tls-creds-x509,id=tls0,endpoint=server,dir={pki}", "--tls-creds", "tls0", '
    params = f'{creds}"-f", "raw", "-x", "disk", TMPFILE'
    common = ("-DNEEDS_TMPFILE=1", "-DCERTS=1")
    found: list[tuple[str, str, tuple[str, ...]]] = [
        (
            "interop-qemu-nbd-tls-certs",
            "interop/interop.c",
            (
                *common,
                f'-DSERVER="{qemu_nbd}"',
                "-DSOCKET_ACTIVATION=1",
                f"-DSERVER_PARAMS={params}",
                '-DEXPORT_NAME="disk"',
                "-DTLS_MODE=LIBNBD_TLS_REQUIRE",
            ),
        )
    ]
    for name, mode, server in (
        ("", "-DTLS_MODE=LIBNBD_TLS_REQUIRE", "require"),
        ("-allow-enabled", "-DTLS_MODE=LIBNBD_TLS_ALLOW", "require"),
        ("-allow-fallback", "-DTLS_MODE=LIBNBD_TLS_ALLOW", "off"),
    ):
        params = f'"--tls={server}", "--tls-certificates={pki}", "-s", "--exit-with-parent", "file", TMPFILE'
        fallback = ("-DTLS_FALLBACK=1",) if server == "off" else ()
        options = (*common, f'-DSERVER="{nbdkit}"', f"-DSERVER_PARAMS={params}", mode, *fallback)
        found.append((f"interop-nbdkit-tls-certs{name}", "interop/interop.c", options))
    return found


def _run(place: Place, source: Path, name: str, main: Path, options: tuple[str, ...]) -> Row:
    includes = [place.work, source / "include", source / "common" / "include", source / "tests"]
    program = compile_c(
        place,
        f"libnbd-{name}",
        [main, source / "tests" / "requires.c"],
        *(f"-I{i}" for i in includes),
        *options,
        runtime_library("libnbd"),
    )
    where = place.work / "cwd"
    where.mkdir(exist_ok=True)
    environment = {**os.environ, "PATH": f"{place.work / 'programs'}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(
            [program], cwd=where, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return Row("libnbd", name, "failed", f"not done within {TIMEOUT} s")
    if done.returncode == 77:
        return Row("libnbd", name, "n/a", last_line(done.stdout + done.stderr))
    return (
        Row("libnbd", name, "passed") if not done.returncode else Row("libnbd", name, "failed", last_line(done.stderr))
    )

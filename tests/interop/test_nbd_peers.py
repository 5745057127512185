"""Other people's NBD software against ours: their clients on ``incbak serve``, our client on their servers."""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from incbak.errors import NbdError, NbdProtocolError, NbdRequestError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from tests.kit.need import missing, need
from tests.kit.serve import Serve, listens, serving, wait_until

MIB = 1 << 20
SIZE = 8 * MIB + 512
CLUSTER = 65536
BITMAP = "b0"
CONTEXT = f"qemu:dirty-bitmap:{BITMAP}"


def run(*command: str | Path, timeout: float = 60) -> str:
    """What a program prints; fails with what it complains about."""
    need(str(command[0]))
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def content(seed: int = 1) -> bytes:
    """Data with holes between: of each MiB the first quarter is data."""
    rng = random.Random(seed)
    data = bytearray(SIZE)
    for start in range(0, SIZE, MIB):
        length = min(MIB // 4, SIZE - start)
        data[start : start + length] = rng.randbytes(length)
    return bytes(data)


def sparse(path: Path, data: bytes) -> Path:
    """A file with that content, and holes where it has zeroes."""
    with path.open("wb") as f:
        for start in range(0, len(data), CLUSTER):
            if any(piece := data[start : start + CLUSTER]):
                f.seek(start)
                f.write(piece)
        f.truncate(len(data))
    return path


@dataclass
class Served:
    """A disk of ``incbak serve`` that one test has to itself."""

    serve: Serve
    name: str
    image: Path

    @property
    def uri(self) -> str:
        """For their tools."""
        return str(self.serve.uri(self.name))

    def add_bitmap(self) -> None:
        """Record writes from now on."""
        qmp = self.serve.qmp()
        qmp("block-dirty-bitmap-add", node=self.name, name=BITMAP, granularity=CLUSTER)
        qmp.close()


@pytest.fixture(scope="module")
def disks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Iterator[Served]]:
    """One server for all tests, with a disk for each."""
    directory = tmp_path_factory.mktemp("serve")
    images = {f"vd{letter}": directory / f"vd{letter}.raw" for letter in "abcdefgh"}
    for image in images.values():
        sparse(image, content())
    with serving(directory, images) as started:
        yield (Served(started, name, image) for name, image in images.items())
        assert started.stop() == 0, "the server had died, or did not end well"


@pytest.fixture
def disk(disks: Iterator[Served]) -> Served:
    return next(disks)


def tiles(extents: list[tuple[int, int]]) -> None:
    """(offset, length) pairs cover the disk exactly."""
    assert [o for o, _ in extents] == [0, *(o + n for o, n in extents[:-1])]
    assert sum(n for _, n in extents) == SIZE


# -- their clients, our server -----------------------------------------------------------------------------------------


def test_nbdinfo_reads_the_description(disk: Served) -> None:
    disk.add_bitmap()
    told = json.loads(run("nbdinfo", "--json", disk.uri))
    assert (told["protocol"], told["structured"]) == ("newstyle-fixed", True)
    (export,) = told["exports"]
    assert export["export-size"] == SIZE
    assert export["contexts"] == ["base:allocation", CONTEXT]
    can = {"can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache"}
    assert {name for name in can if export[name]} == can
    assert not export["is_read_only"]
    assert (export["block_size_minimum"], export["block_size_maximum"]) == (1, p.MAX_PAYLOAD)
    listed = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={disk.serve.nbd}"))
    assert [e["export-name"] for e in listed["exports"]][::2] == [f"vd{letter}" for letter in "abcdefgh"]


def test_nbdinfo_reads_the_allocation(disk: Served) -> None:
    told = json.loads(run("nbdinfo", "--map", "--json", disk.uri))
    tiles([(e["offset"], e["length"]) for e in told])
    data = content()
    for extent in told:
        if extent["type"] & p.STATE_ZERO:
            assert not any(data[extent["offset"] : extent["offset"] + extent["length"]])
    assert sum(e["length"] for e in told if e["type"] == 0) <= SIZE // 4 + MIB


def test_nbdinfo_and_qemu_img_read_the_dirty_bitmap(disk: Served) -> None:
    """``x-dirty-bitmap`` shows what is dirty as no data, as QEMU's own servers do."""
    disk.add_bitmap()
    client = disk.serve.connect(disk.name)
    client.write(b"x", 3 * CLUSTER - 1)
    client.write_zeroes(5 * CLUSTER, 1)
    client.trim(SIZE - 1, 1)
    client.close()
    dirty = {2, 5, SIZE // CLUSTER}
    told = json.loads(run("nbdinfo", f"--map={CONTEXT}", "--json", disk.uri))
    tiles([(e["offset"], e["length"]) for e in told])
    assert {e["offset"] // CLUSTER for e in told if e["type"] == 1} == dirty
    assert sum(e["length"] for e in told if e["type"] == 1) == 2 * CLUSTER + SIZE % CLUSTER
    options = f"driver=nbd,server.type=unix,server.path={disk.serve.nbd},export={disk.name},x-dirty-bitmap={CONTEXT}"
    seen = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", options))
    assert {e["start"] // CLUSTER for e in seen if not e["data"]} == dirty


def test_nbdcopy_out_and_in(disk: Served, tmp_path: Path) -> None:
    """Four connections each way, many requests in flight on each."""
    uri, out = disk.uri, tmp_path / "out.raw"
    options = ("--connections=4", "--requests=32", "--flush")
    run("nbdcopy", *options, uri, out)
    assert out.read_bytes() == content()
    other = sparse(tmp_path / "other.raw", content(2)[::-1])
    run("nbdcopy", *options, other, uri)
    assert disk.image.read_bytes() == other.read_bytes()
    disk.add_bitmap()
    run("nbdcopy", *options, "--destination-is-zero", "--request-size=65536", "--allocated", other, uri)
    assert disk.image.read_bytes() == other.read_bytes()
    client = disk.serve.connect(disk.name, CONTEXT)
    data = other.read_bytes()
    assert not any(
        any(data[offset : offset + length]) for offset, length, flags in client.extents(CONTEXT) if not flags
    )
    client.close()


def test_qemu_img(disk: Served, tmp_path: Path) -> None:
    """Convert there and back, compare, measure the map."""
    uri = disk.uri
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, tmp_path / "out.qcow2")
    run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", uri, tmp_path / "out.qcow2")
    other = sparse(tmp_path / "other.raw", content(3)[::-1])
    run("qemu-img", "convert", "-n", "-W", "-m", "8", "-f", "raw", "-O", "raw", other, uri)
    assert disk.image.read_bytes() == other.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, other)
    seen = json.loads(run("qemu-img", "map", "--output=json", "-f", "raw", uri))
    end = -(-SIZE // 512) * 512
    assert sum(e["length"] for e in seen) == end
    assert any(e["zero"] for e in seen)
    assert any(e["data"] for e in seen)


def test_qemu_io(disk: Served) -> None:
    """Every kind of write that it has, overlapping, at odd sizes, in flight together; read back by itself and by us."""
    commands = [
        "write -P 1 0 1M",
        "write -f -P 2 512 3k",
        "write -z 64k 64k",
        "write -z -u 256k 8k",
        "discard 512k 64k",
        "aio_write -P 3 1M 256k",
        "aio_write -P 4 2M 256k",
        "aio_flush",
        "flush",
        "read -P 1 0 512",
        "read -P 2 512 3k",
        "read -P 0 64k 64k",
        "read -P 0 256k 8k",
        "read -P 3 1M 256k",
        "read -P 4 2M 256k",
    ]
    flat = [part for command in commands for part in ("-c", command)]
    told = run("qemu-io", "-f", "raw", *flat, disk.uri)
    assert "verification failed" not in told
    data = disk.image.read_bytes()
    assert data[512:3584] == b"\2" * 3072
    assert data[CLUSTER : 2 * CLUSTER] == bytes(CLUSTER)
    assert data[2 * MIB : 2 * MIB + 256 * 1024] == b"\4" * 256 * 1024


def test_fio_verifies_what_it_wrote(disk: Served) -> None:
    """Random sizes at a depth of 16, trims among them, every block with its checksum."""
    need("fio")
    if "nbd" not in subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=True).stdout:
        missing("fio", "it has no nbd engine")
    told = run(
        *("fio", "--name=t", "--ioengine=nbd", f"--uri={disk.uri}", "--rw=randwrite", "--bsrange=512-64k"),
        *("--bs_unaligned=0", "--iodepth=16", "--size=8M", "--verify=crc32c", "--verify_fatal=1", "--randseed=1"),
        *("--output-format=json", "--fsync=64", "--allow_file_create=0", "--verify_state_save=0"),
    )
    (job,) = json.loads(told[told.index("{") :])["jobs"]
    assert job["error"] == 0
    assert job["read"]["total_ios"] >= job["write"]["total_ios"] > 100


LIBNBD = """
import nbd, random, sys
socket, disk, context = sys.argv[1:]
h = nbd.NBD()
h.set_opt_mode(True)
h.set_export_name(disk)
h.connect_unix(socket)
names = []
h.opt_list(lambda name, text: names.append(name))
assert disk in names and disk + ":ro" in names and len(names) == 16, names
found = []
h.add_meta_context("base:allocation")
h.add_meta_context(context)
h.opt_list_meta_context(found.append)
assert found == ["base:allocation", context], found
h.set_export_name("nothing")
try:
    h.opt_info()
    raise SystemExit("an export that is not there")
except nbd.Error as e:
    assert "ENOENT" in str(e.errno) or e.errno, e
h.set_export_name(disk)
h.opt_info()
size = h.get_size()
h.opt_go()
assert h.get_structured_replies_negotiated() and h.can_meta_context(context)
h.set_strict_mode(0)
data = random.Random(1).randbytes(200000)
h.pwrite(data, 123, nbd.CMD_FLAG_FUA)
assert h.pread(len(data), 123, nbd.CMD_FLAG_DF) == data
h.zero(1000, 200, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(1000, 200) == bytes(1000)
h.zero(100, 1000, nbd.CMD_FLAG_FAST_ZERO)
for refused in (lambda: h.pwrite(b"xx", size - 1), lambda: h.pread(2, size - 1), lambda: h.trim(1, size)):
    try:
        refused()
        raise SystemExit("a request that cannot be was accepted")
    except nbd.Error as e:
        assert e.errno in ("EINVAL", "ENOSPC", "ENOTSUP", "EOPNOTSUPP"), e.errno
h.trim(4096, 8192)
h.cache(size, 0)
h.flush()
seen = {}
h.block_status(size, 0, lambda name, at, entries, error: seen.setdefault(name, []).extend(entries))
for name, entries in seen.items():
    assert sum(entries[0::2]) <= size and all(entries[0::2]), name
assert seen[context][:2] == [(123 + 200000 + 65535) // 65536 * 65536, 1], seen[context]
flying = []
for i in range(300):
    buf = nbd.Buffer.from_bytearray(bytearray([i % 256]) * 4096)
    flying.append((h.aio_pwrite(buf, i * 4096), buf))
while any(not h.aio_command_completed(c) for c, _ in flying[-1:]) or h.aio_in_flight():
    h.poll(-1)
for i in range(300):
    assert h.pread(4096, i * 4096) == bytes([i % 256]) * 4096
h.shutdown()
print("all well")
"""


def test_libnbd(disk: Served) -> None:
    """Option by option, request by request, also those that its own checks would not let out."""
    python = Path("/usr/bin/python3")
    if not python.exists() or subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False).returncode:
        missing("nbdsh", "python3-libnbd is not installed")
    disk.add_bitmap()
    assert run(python, "-c", LIBNBD, disk.serve.nbd, disk.name, CONTEXT) == "all well\n"


# -- our client, their servers -----------------------------------------------------------------------------------------


@contextmanager
def started(socket: Path, *command: str | Path) -> Iterator[NbdUri]:
    """A server in the foreground that listens on ``socket``."""
    need(str(command[0]))
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.PIPE)
    try:
        wait_until(lambda: listens(socket) or process.poll() is not None, "the server's socket")
        yield NbdUri("", path=str(socket))
    finally:
        process.terminate()
        process.communicate(timeout=30)


def exercise(uri: NbdUri, size: int, *contexts: str) -> None:
    """Reads, writes, zeroes, trims and flushes of our client, checked against a byte array."""
    client = NbdClient.connect(uri, contexts=[p.ALLOCATION, *contexts])
    assert client.size == size
    assert p.ALLOCATION in client.contexts
    model, rng = bytearray(size), random.Random(4)
    for number in range(120):
        offset = rng.randrange(size)
        length = min(rng.choice([1, 511, 4096, 70_000, 300_000]), size - offset)
        if number % 5 == 4:
            client.write_zeroes(offset, length, no_hole=number % 2 == 0)
            model[offset : offset + length] = bytes(length)
        elif number % 17 == 3:
            client.trim(offset, length)
            model[offset : offset + length] = client.read(offset, length)
        else:
            data = rng.randbytes(length)
            client.submit_write(data, offset)
            client.drain()
            model[offset : offset + length] = data
    client.flush()
    assert client.read(0, size) == model
    at = 0
    for offset, length, flags in client.extents(p.ALLOCATION):
        assert offset == at
        assert not flags & p.STATE_ZERO or not any(model[at : at + length])
        at += length
    assert at == size
    client.close()


def test_our_client_on_qemu_nbd(tmp_path: Path) -> None:
    with (tmp_path / "disk.raw").open("wb") as f:
        f.truncate(4 * MIB)
    socket = tmp_path / "s"
    with started(socket, "qemu-nbd", "-t", "-f", "raw", "-e", "4", "-k", socket, tmp_path / "disk.raw") as uri:
        exercise(uri, 4 * MIB)


def test_our_client_reads_a_qcow2_bitmap(tmp_path: Path) -> None:
    """The bitmap that QEMU itself keeps in an image, cluster by cluster."""
    image, socket = tmp_path / "disk.qcow2", tmp_path / "s"
    run("qemu-img", "create", "-q", "-f", "qcow2", image, str(SIZE))
    run("qemu-img", "bitmap", "--add", "-g", str(CLUSTER), image, BITMAP)
    run("qemu-io", "-f", "qcow2", "-c", "write 100 1", "-c", f"write {4 * CLUSTER - 512} 1k", image)
    with started(socket, "qemu-nbd", "-t", "-r", "-f", "qcow2", "-B", BITMAP, "-k", socket, image) as uri:
        client = NbdClient.connect(uri, contexts=[CONTEXT])
        assert client.read_only
        found = list(client.extents(CONTEXT))
        tiles([(o, n) for o, n, _flags in found])
        assert [(o // CLUSTER, n // CLUSTER) for o, n, flags in found if flags] == [(0, 1), (3, 2)]
        with pytest.raises(NbdRequestError) as caught:
            client.write(b"x", 0)
        assert caught.value.errno in (1, 22)
        assert client.read(100, 1) == b"\xcd"
        client.close()


def test_our_client_on_nbdkit(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with started(socket, "nbdkit", "-f", "-U", socket, "memory", "4M") as uri:
        exercise(uri, 4 * MIB)


@pytest.mark.parametrize(
    ("options", "filters"),
    [(["--no-sr"], []), ([], ["--filter=nozero"]), ([], ["--filter=noparallel"]), (["--mask-handshake=1"], [])],
)
def test_our_client_on_less_able_servers(tmp_path: Path, options: list[str], filters: list[str]) -> None:
    """Simple replies only; no zeroes; one request at a time; without the short form of the handshake."""
    socket = tmp_path / "s"
    with started(socket, "nbdkit", "-f", "-U", socket, *options, *filters, "memory", "1M") as uri:
        client = NbdClient.connect(uri, contexts=[p.ALLOCATION], window=8)
        for i in range(64):
            client.submit_write(bytes([i]) * 16_384, i * 16_384)
        client.flush()
        assert client.read(0, MIB) == b"".join(bytes([i]) * 16_384 for i in range(64))
        assert bool(client.contexts) == ("--no-sr" not in options)
        client.close()


def test_our_client_on_a_server_without_fixed_newstyle(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with started(socket, "nbdkit", "-f", "-U", socket, "--mask-handshake=0", "memory", "1M") as uri:
        client = NbdClient.connect(uri, contexts=[p.ALLOCATION])
        client.write(b"unfixed", 100)
        client.flush()
        assert client.read(100, 7) == b"unfixed"
        assert client.contexts == {}
        client.close()


def test_our_client_refuses_oldstyle(tmp_path: Path) -> None:
    socket = tmp_path / "s"
    with started(socket, "nbdkit", "-f", "-o", "-U", socket, "memory", "1M") as uri:
        with pytest.raises(NbdProtocolError, match="does not speak newstyle"):
            NbdClient.connect(uri)


@pytest.mark.parametrize("kind", ["pread", "pwrite", "zero"])
def test_our_client_is_told_of_errors(tmp_path: Path, kind: str) -> None:
    """L11: the error of each kind of request reaches the caller; the connection goes on."""
    socket = tmp_path / "s"
    command = ("nbdkit", "-f", "-U", socket, "--filter=error", "memory", "1M", f"error-{kind}=ENOSPC")
    with started(socket, *command, f"error-{kind}-rate=100%") as uri:
        client = NbdClient.connect(uri)
        act: dict[str, Any] = {
            "pread": lambda: client.read(0, 512),
            "pwrite": lambda: client.write(b"x" * 512, 0),
            "zero": lambda: client.write_zeroes(0, 512),
        }
        with pytest.raises(NbdRequestError) as caught:
            act[kind]()
        assert caught.value.errno == 28
        act["pread" if kind != "pread" else "pwrite"]()
        client.flush()
        client.close()


def test_our_client_notices_that_a_server_was_killed(tmp_path: Path) -> None:
    need("nbdkit")
    socket = tmp_path / "s"
    process = subprocess.Popen(["nbdkit", "-f", "-U", str(socket), "memory", "64M"])
    wait_until(lambda: listens(socket), "the server's socket")
    client = NbdClient.connect(NbdUri("", path=str(socket)))
    client.write(b"x", 0)
    process.kill()
    process.wait()
    with pytest.raises(NbdError) as caught:
        for _ in range(100):
            client.submit_write(bytes(MIB), 0)
        client.drain()
    assert caught.value.retry
    client.close()

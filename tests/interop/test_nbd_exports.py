"""Each disk as two exports, several bitmaps on each; and other people's programs that put a disk to use."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from incbak.nbd import protocol as p
from tests.interop.test_nbd_peers import CLUSTER, MIB, SIZE, content, run, sparse, tiles
from tests.kit.need import missing, need, need_root
from tests.kit.serve import Serve, serving, wait_until

DISKS = ("vda", "vdb")
SYSTEM = {**os.environ, "PATH": f"/usr/bin:{os.environ['PATH']}"}
"""Where nbdsh finds the Python that has its module."""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Of two disks of the same content."""
    images = {name: sparse(tmp_path / f"{name}.raw", content()) for name in DISKS}
    with serving(tmp_path, images) as started:
        yield started
        assert started.stop() == 0, "the server had died, or did not end well"


def _options(serve: Serve, export: str, prefix: str = "") -> str:
    """A disk as QEMU's ``--image-opts``, below ``prefix``."""
    server = f"{prefix}file.server.type=unix,{prefix}file.server.path={serve.nbd}"
    return f"{prefix}driver=raw,{prefix}file.driver=nbd,{server},{prefix}file.export={export}"


# -- a read-only and a writable export ---------------------------------------------------------------------------------

CAN = ("connect", "read", "cache", "df", "flush", "fua", "multi-conn")
CAN_CHANGE = ("write", "trim", "zero", "fast-zero")


def test_nbdinfo_can(serve: Serve) -> None:
    """Each question that a script may ask, of both exports."""
    need("nbdinfo")

    def told(export: str) -> dict[str, int]:
        command = ["nbdinfo", "--can"]
        uri = str(serve.uri(export))
        asked = (*CAN, *CAN_CHANGE)
        return {what: subprocess.run([*command, what, uri], timeout=60, check=False).returncode for what in asked}

    assert told("vda") == dict.fromkeys((*CAN, *CAN_CHANGE), 0)
    assert told("vda:ro") == {**dict.fromkeys(CAN, 0), **dict.fromkeys(CAN_CHANGE, 2)}


def test_each_disk_is_listed_twice(serve: Serve) -> None:
    listed = json.loads(run("nbdinfo", "--list", "--json", f"nbd+unix:///?socket={serve.nbd}"))["exports"]
    assert [(e["export-name"], e["is_read_only"]) for e in listed] == [
        (name + suffix, bool(suffix)) for name in DISKS for suffix in ("", ":ro")
    ]
    assert [e["description"] for e in listed][:2] == ["disk vda", "disk vda, read-only"]
    assert all(e["can_multi_conn"] for e in listed)
    assert serve.ready.count("nbd+unix:") == len(DISKS), "what is said at the start is where guests go"


def test_the_read_only_export_shows_what_the_writable_one_takes(serve: Serve, tmp_path: Path) -> None:
    """With programs that would write: refused, and nothing changed."""
    uri, ro = str(serve.uri("vda")), str(serve.uri("vda:ro"))
    run("nbdinfo", "--is", "read-only", ro)
    run("qemu-io", "-f", "raw", "-c", "write -P 7 4k 64k", uri)
    run("qemu-io", "-r", "-f", "raw", "-c", "read -P 7 4k 64k", ro)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, ro)
    run("nbdcopy", "--connections=4", ro, tmp_path / "copy")
    before = serve.connect("vda").read(0, SIZE)
    assert (tmp_path / "copy").read_bytes() == before
    for command in (
        ["qemu-io", "-f", "raw", "-c", "write -P 8 4k 64k", ro],
        ["nbdcopy", tmp_path / "copy", ro],
        ["nbdsh", "-u", ro, "-c", "h.set_strict_mode(0)", "-c", "h.pwrite(b'x', 0)"],
        ["nbdsh", "-u", ro, "-c", "h.set_strict_mode(0)", "-c", "h.trim(512, 0)"],
    ):
        done = subprocess.run(command, env=SYSTEM, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode
        assert command[0] != "nbdsh" or "Operation not permitted" in done.stderr
    assert serve.connect("vda").read(0, SIZE) == before


def test_the_only_disk_is_also_there_without_a_name(tmp_path: Path) -> None:
    """That it has two exports does not make the name that is not given ambiguous: it is the writable one."""
    with serving(tmp_path, {"vda": sparse(tmp_path / "vda.raw", content())}) as started:
        uri = f"nbd+unix:///?socket={started.nbd}"
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", uri)
        listed = json.loads(run("nbdinfo", "--list", "--json", uri))["exports"]
        assert [e["export-name"] for e in listed] == ["vda", "vda:ro"]


def test_several_bitmaps_of_several_exports(serve: Serve) -> None:
    """Each export tells its own, and each bitmap what was written since it came."""
    qmp = serve.qmp()
    for number, name in enumerate(("early", "late")):
        for disk in DISKS:
            qmp("block-dirty-bitmap-add", node=disk, name=f"{disk}-{name}", granularity=CLUSTER)
        for disk, shift in (("vda", 0), ("vdb", 8)):
            client = serve.connect(disk)
            client.write(b"x", (2 * number + shift) * CLUSTER)
            client.close()
    qmp.close()
    for disk, shift in (("vda", 0), ("vdb", 8)):
        early, late = (f"qemu:dirty-bitmap:{disk}-{name}" for name in ("early", "late"))
        for export in (disk, f"{disk}:ro"):
            (told,) = json.loads(run("nbdinfo", "--json", str(serve.uri(export))))["exports"]
            assert told["contexts"] == [p.ALLOCATION, early, late]
            for context, expected in ((early, {shift, shift + 2}), (late, {shift + 2})):
                extents = json.loads(run("nbdinfo", f"--map={context}", "--json", str(serve.uri(export))))
                tiles([(e["offset"], e["length"]) for e in extents])
                assert {e["offset"] // CLUSTER for e in extents if e["type"] == 1} == expected
            client = serve.connect(export, p.ALLOCATION, early, late)
            assert [o // CLUSTER for o, _n, flags in client.extents(late) if flags] == [shift + 2]
            assert [o // CLUSTER for o, _n, flags in client.extents(early) if flags] == [shift, shift + 2]
            client.close()


# -- QEMU's tools ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [["-w", "--flush-interval=256"], ["-w", "-o", "512", "-s", "1536"], []])
def test_qemu_img_bench(serve: Serve, options: list[str]) -> None:
    run("qemu-img", "bench", "-q", "-f", "raw", "-c", "2000", "-d", "32", *options, str(serve.uri("vda")))


def test_image_opts(serve: Serve, tmp_path: Path) -> None:
    """Convert there and back and compare, with nodes instead of URIs."""
    there = _options(serve, "vda")
    run("qemu-img", "convert", "--image-opts", "-O", "qcow2", _options(serve, "vda:ro"), tmp_path / "out.qcow2")
    other = sparse(tmp_path / "other.raw", content(5))
    run("qemu-img", "convert", "-n", "--image-opts", "--target-image-opts", f"driver=raw,file.filename={other}", there)
    run("qemu-img", "compare", "--image-opts", f"driver=raw,file.filename={other}", there)
    data = serve.connect("vda").read(0, SIZE)
    assert data == other.read_bytes()
    done = subprocess.run(
        ["qemu-img", "compare", "--image-opts", there, f"driver=qcow2,file.filename={tmp_path / 'out.qcow2'}"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1, "it is the disk as it was before"


def _verified(serve: Serve, plain: Path, *commands: str) -> subprocess.CompletedProcess[str]:
    """qemu-io on a disk of ours and a plain file at once: every write goes to both, every read is compared."""
    need("qemu-io")
    where = f"driver=blkverify,raw.driver=file,raw.filename={plain},{_options(serve, 'vda', 'test.')}"
    flat = [part for command in commands for part in ("-c", command)]
    return subprocess.run(
        ["qemu-io", *flat, "--image-opts", where], capture_output=True, text=True, timeout=120, check=False
    )


def test_blkverify(serve: Serve, tmp_path: Path) -> None:
    """QEMU's own oracle: requests of many sizes, in flight together; it also notices a single wrong byte."""
    plain = sparse(tmp_path / "plain.raw", content())
    rng, commands = random.Random(11), []
    stripe = MIB // 512
    for number in range(160):
        offset = number % 8 * stripe + rng.randrange(stripe - 300)  # what is in flight together does not overlap
        kind = rng.choice(
            ["aio_write -q -P {fill}", "aio_write -q -P 0", "aio_read -q", "write -q -P {fill}", "read -q"]
        )
        commands.append(
            f"{kind.format(fill=rng.randrange(1, 250))} {512 * offset} {512 * rng.choice([1, 7, 8, 64, 300])}"
        )
        commands += ["aio_flush", "flush"] if number % 8 == 7 else []
    commands += ["aio_flush", *(f"read -q {at} {min(MIB, SIZE - at)}" for at in range(0, SIZE, MIB))]
    done = _verified(serve, plain, *commands)
    assert done.returncode == 0, done.stderr
    assert "mismatch" not in done.stderr
    assert serve.connect("vda").read(0, SIZE) == plain.read_bytes()
    with plain.open("r+b") as f:
        f.seek(5 * MIB + 4)
        f.write(b"\xff" if f.read(1) != b"\xff" else b"\0")
    done = _verified(serve, plain, "read -q 5M 4k")
    assert done.returncode != 0
    assert "contents mismatch" in done.stderr


# -- a file system -----------------------------------------------------------------------------------------------------


@contextmanager
def _mounted(uri: str, directory: Path) -> Iterator[Path]:
    """The export as a loop device, by way of a file of nbdfuse, with a new ext4 in it: where that is mounted."""
    fuse, mount = directory / "fuse", directory / "mount"
    with ExitStack() as stack:
        for path in (fuse, mount):
            path.mkdir()
        process = subprocess.Popen(["nbdfuse", str(fuse), uri])
        stack.callback(process.wait, 60)
        stack.callback(run, "fusermount3", "-u", fuse)
        wait_until(lambda: (fuse / "nbd").exists() or process.poll() is not None, "nbdfuse has mounted")
        loop = run("losetup", "--find", "--show", fuse / "nbd").strip()
        stack.callback(run, "losetup", "--detach", loop)
        run("mkfs.ext4", "-q", loop)
        run("mount", loop, mount)
        stack.callback(run, "umount", mount)
        yield mount
        run("fstrim", mount)


def test_a_file_system_through_nbdfuse_and_a_loop_device(tmp_path: Path) -> None:
    """The kernel writes, discards and flushes; what changed is in the bitmap, and the file system is whole."""
    need_root()
    need("nbdfuse", "fusermount3", "losetup", "mkfs.ext4", "e2fsck", "fstrim")
    if not os.path.exists("/dev/fuse") or not os.path.exists("/dev/loop-control"):
        missing("root", "there is no /dev/fuse, or there are no loop devices")
    image = tmp_path / "vda.raw"
    with image.open("wb") as f:
        f.truncate(64 * MIB)
    rng = random.Random(9)
    files = {f"f{number}": rng.randbytes(rng.randrange(200_000)) for number in range(40)}
    with serving(tmp_path, {"vda": image}) as serve:
        qmp = serve.qmp()
        qmp("block-dirty-bitmap-add", node="vda", name="b0", granularity=CLUSTER)
        qmp.close()
        with _mounted(str(serve.uri("vda")), tmp_path) as mount:
            for name, data in files.items():
                (mount / name).write_bytes(data)
            for name in list(files)[::3]:
                (mount / name).unlink()
                del files[name]
        run("e2fsck", "-fn", image)
        client = serve.connect("vda", "qemu:dirty-bitmap:b0")
        clean = [(o, n) for o, n, flags in client.extents("qemu:dirty-bitmap:b0") if not flags]
        assert not any(any(client.read(offset, length)) for offset, length in clean)
        client.close()
        again = tmp_path / "again"
        again.mkdir()
        shutil.copy(image, tmp_path / "copy.raw")
        run("mount", "-o", "loop,ro", tmp_path / "copy.raw", again)
        try:
            assert {f.name: f.read_bytes() for f in again.iterdir() if f.is_file()} == files
        finally:
            run("umount", again)
        assert serve.stop() == 0

"""Restore onto what is there already and cannot be renamed: block devices and NBD exports."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.file import FileDisk, open_disk
from incbak.disk.holders import holders
from incbak.disk.memory import MemoryDisk
from incbak.errors import DamagedError, DiskError, DurabilityError, ImageInUseError, NbdError, RestoreError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.repo.tree import FANOUT
from incbak.restore.images import InPlaceTarget
from incbak.restore.restore import Restored, restore_disk
from incbak.restore.targets import DeviceTarget, open_target
from tests.kit.cli import Content, Incbak, content, differing
from tests.kit.devices import loop_device
from tests.kit.need import missing, need
from tests.kit.serve import Peer, listens, wait_until
from tests.unit.backup.scene import Disk, FakeEngine, back_up
from tests.unit.backup.scene import made as record_of
from tests.unit.repo.scene import new
from tests.unit.restore.conftest import CLUSTER, SIZE, Made

ROUND = -(-SIZE // 4096) * 4096
JUNK = 0xEE


def _restore(made: Made, where: str | Path, *, salvage: bool = False) -> Restored:
    return restore_disk(made.repo, made.record, made.disk, open_target(str(where), SIZE), salvage=salvage)


def _on_device(path: Path) -> tuple[Content, bytes]:
    """The disk's part of a device, in pieces, and what lies behind it."""
    disk = open_disk(path, read_only=True)
    try:
        return _cut(disk.read(0, SIZE)), disk.read(SIZE, disk.size - SIZE)
    finally:
        disk.close()


def _cut(data: bytes) -> Content:
    pieces = ((at, data[at : at + CLUSTER]) for at in range(0, len(data), CLUSTER))
    return {-1: str(len(data)).encode(), **{at: piece for at, piece in pieces if any(piece)}}


@pytest.mark.root
@pytest.mark.parametrize("target", [DeviceTarget, InPlaceTarget])
def test_a_read_only_device_is_refused_before_it_is_written(tmp_path: Path, target: Callable[..., object]) -> None:
    (tmp_path / "backing").write_bytes(bytes([JUNK]) * ROUND)
    with loop_device(tmp_path / "backing", "--read-only") as device:
        with pytest.raises(DiskError, match="is read-only") as refused:
            target(device, SIZE)
        assert "Nothing was written" in refused.value.hint


# -- block devices -----------------------------------------------------------------------------------------------------


@pytest.mark.root
def test_a_device_is_what_the_disk_was(made: Made, loop: Callable[[int], Path]) -> None:
    """I1: zeroes are written over what was there; what lies behind the disk stays."""
    device = loop(ROUND + 4096)
    _restore(made, device)
    found, behind = _on_device(device)
    assert differing(found, made.held) == []
    assert set(behind) == {JUNK}


@pytest.mark.root
def test_a_device_that_is_too_small_is_not_touched(made: Made, loop: Callable[[int], Path]) -> None:
    """faults row 82."""
    device = loop(ROUND - 4096)
    with pytest.raises(RestoreError, match="too small"):
        _restore(made, device)
    disk = open_disk(device)
    assert set(disk.read(0, 65536)) == {JUNK}
    disk.close()


@pytest.mark.root
@pytest.mark.parametrize("how", ["exclusively", "as an image"])
def test_a_device_in_use_is_not_touched(made: Made, loop: Callable[[int], Path], how: str) -> None:
    """faults row 82: mounted or otherwise claimed, and held by a virtual machine."""
    device = loop(ROUND)
    if how == "exclusively":
        fd = os.open(device, os.O_RDONLY | os.O_EXCL)
        with pytest.raises(DiskError, match="ourselves alone"):
            _restore(made, device)
        os.close(fd)
    else:
        disk = open_disk(device)
        with pytest.raises(ImageInUseError):
            _restore(made, device)
        disk.close()
    with device.open("rb") as f:
        assert set(f.read(65536)) == {JUNK}
    _restore(made, device)


@pytest.mark.root
@pytest.mark.parametrize("use", ["mounted", "a partition of it"])
def test_what_a_device_is_used_for_is_named(made: Made, loop: Callable[[int], Path], tmp_path: Path, use: str) -> None:
    """And it is not touched."""
    device, at = loop(64 << 20), tmp_path / "a mount point"
    at.mkdir()
    undo, said = _use(device, at, use)
    try:
        with pytest.raises(DiskError, match=said):
            _restore(made, device)
    finally:
        for command in undo:
            subprocess.run(command, check=True, timeout=60)


def _escaped(path: Path) -> str:
    """As the kernel's tables have it."""
    return str(path).replace(" ", r"\040")


def _use(device: Path, at: Path, use: str) -> tuple[list[list[str | Path]], str]:
    """How to undo it, and what must be said."""
    part = device
    if use != "mounted":
        need("sfdisk", "partx")
        subprocess.run(["sfdisk", "-q", device], input=b",,L\n", check=True, timeout=60)
        subprocess.run(["partx", "-u", device], check=True, timeout=60)
        part = Path(f"{device}p1")
        wait_until(part.exists, "the partition")
    need("mkfs.ext4")
    subprocess.run(["mkfs.ext4", "-q", part], check=True, timeout=60)
    subprocess.run(["mount", "-o", "ro", part, at], check=True, timeout=60)
    return [
        ["umount", at],
        *([["partx", "-d", device]] if part != device else []),
    ], f"mounted on {re.escape(_escaped(at))}"


@pytest.mark.root
def test_what_is_built_on_a_device_is_named(
    loop: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sysfs shows them; not every kernel that tests run on has device-mapper."""
    device = loop(SIZE)
    number = os.stat(device).st_rdev
    holder = tmp_path / f"{os.major(number)}:{os.minor(number)}" / "holders" / "dm-3"
    (holder / "dm").mkdir(parents=True)
    (holder / "dm" / "name").write_text("vg-root\n")
    monkeypatch.setattr("incbak.disk.holders._BLOCK", tmp_path)
    assert holders(device) == ["used by dm-3 (vg-root)"]


@pytest.mark.root
def test_a_device_that_a_process_may_write_to_is_not_touched(made: Made, loop: Callable[[int], Path]) -> None:
    """Without a claim and without locks: a QEMU that takes none. One that only reads is no matter."""
    device = loop(ROUND)
    for mode, refused in (("r+b", True), ("rb", False)):
        code = f"import sys; f = open(sys.argv[1], {mode!r}); print(flush=True); sys.stdin.read()"
        command = [sys.executable, "-c", code, device]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout
        process.stdout.readline()
        if refused:
            with pytest.raises(ImageInUseError, match=rf"process {process.pid} "):
                _restore(made, device)
            with device.open("rb") as f:
                assert set(f.read(65536)) == {JUNK}
        else:
            _restore(made, device)
        process.communicate(timeout=20)


@pytest.mark.root
def test_a_file_behind_a_loop_device_is_not_restored_in_place(loop: Callable[[int], Path], tmp_path: Path) -> None:
    device = loop(SIZE)
    with pytest.raises(ImageInUseError, match=f"loop device {device}$"):
        InPlaceTarget(tmp_path / "backing-0", SIZE)


@pytest.mark.root
def test_a_device_is_synced_before_it_is_said_to_be_done(
    made: Made, loop: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """faults row 31: and a sync that fails fails the restore."""
    device = loop(ROUND)
    steps: list[str] = []
    write, flush = FileDisk.write, FileDisk.flush

    def traced_write(self: FileDisk, buf: bytes, offset: int) -> None:
        steps.append("write")
        write(self, buf, offset)

    def traced_flush(self: FileDisk) -> None:
        steps.append("flush")
        flush(self)

    monkeypatch.setattr(FileDisk, "write", traced_write)
    monkeypatch.setattr(FileDisk, "flush", traced_flush)
    _restore(made, device)
    assert steps.index("flush") == len(steps) - 1

    def failing_flush(self: FileDisk) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(FileDisk, "flush", failing_flush)
    with pytest.raises(DurabilityError, match="Input/output error"):
        _restore(made, device)
    target = open_target(str(device), SIZE)
    assert isinstance(target, DeviceTarget), "the failed restore has let the device go"
    target.abandon()


@pytest.mark.root
def test_salvage_leaves_zeroes_where_content_is_lost(made: Made, loop: Callable[[int], Path]) -> None:
    """Never what was on the device before."""
    made.spoil(made.cluster(5))
    device = loop(ROUND)
    with pytest.raises(DamagedError):
        _restore(made, device)
    done = _restore(made, device, salvage=True)
    assert [e.offset for e in done.damaged] == [5 * CLUSTER]
    found, _behind = _on_device(device)
    assert differing(found, made.held) == [5 * CLUSTER]
    assert 5 * CLUSTER not in found


@pytest.mark.root
def test_a_device_that_is_overwritten_loses_its_bitmaps(tmp_path: Path, loop: Callable[[int], Path]) -> None:
    """I5: a device has no time of change that would tell, so an incremental would miss all of it."""
    incbak = Incbak(tmp_path)
    device = loop(64 * 65536)
    incbak("init")
    incbak("full", device, "--name", "vm")
    first = incbak.list()[0]["id"]
    with device.open("r+b") as f:
        f.write(b"newer")
    incbak("full", device, "--name", "vm")
    (bitmap,) = incbak("--json", "bitmap", "list").objects()
    assert bitmap["state"] == "clean"
    ran = incbak("restore", first, device)
    assert "is invalid from now on" in ran.out
    (bitmap,) = incbak("--json", "bitmap", "list").objects()
    assert bitmap["reason"] == "disk-changed"
    disk = incbak("--json", "incremental", device, "--name", "vm").objects()[0]["disks"][0]
    assert (disk["kind"], disk["reason"]) == ("full", "disk-changed")
    assert incbak.restored(first) == incbak.restored("latest")


# -- NBD ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[..., Peer]]:
    """Makes servers of ours over memory full of something else."""
    peers: list[Peer] = []

    def make(size: int, faults: Faults | None = None) -> Peer:
        disk = MemoryDisk(size)
        disk.data[:] = bytes([JUNK]) * size
        peers.append(Peer(tmp_path / f"{len(peers)}.sock", FaultyDisk(disk, faults) if faults else disk))
        return peers[-1]

    yield make
    for each in peers:
        each.stop()


def test_an_export_is_what_the_disk_was(made: Made, peer: Callable[..., Peer]) -> None:
    target = peer(SIZE + 5000)
    _restore(made, str(target.uri))
    data = bytes(target.disk.data)  # type: ignore[union-attr]
    assert differing(_cut(data[:SIZE]), made.held) == []
    assert set(data[SIZE:]) == {JUNK}


def test_zeroes_at_the_end_are_written_too(tmp_path: Path, peer: Callable[..., Peer]) -> None:
    """The last page of the tree is not there: all of it is zeroes. So is the first."""
    data = bytearray(3 * FANOUT * CLUSTER)
    data[FANOUT * CLUSTER : FANOUT * CLUSTER + 4] = b"data"
    repo = new(tmp_path / "other")
    record = record_of(back_up(repo, FakeEngine({"vda": Disk(data)}), incremental=False))
    target = peer(len(data))
    restore_disk(repo, record, record.disks[0], open_target(str(target.uri), len(data)))
    assert differing(_cut(bytes(target.disk.data)), _cut(bytes(data))) == []  # type: ignore[union-attr]


def test_an_export_that_is_too_small_is_not_touched(made: Made, peer: Callable[..., Peer]) -> None:
    target = peer(SIZE - 1)
    with pytest.raises(RestoreError, match="too small"):
        _restore(made, str(target.uri))
    assert target.wrote == []


def test_a_read_only_export_is_refused(made: Made, peer: Callable[..., Peer]) -> None:
    target = peer(SIZE)
    target.read_only = True
    with pytest.raises(RestoreError, match="read-only"):
        _restore(made, str(target.uri))


@pytest.mark.parametrize("kind", ["write", "zero", "flush"])
def test_an_export_that_fails_fails_the_restore(made: Made, peer: Callable[..., Peer], kind: str) -> None:
    """faults row 31: also when only the flush fails; nothing is said to be done that is not durable."""
    target = peer(SIZE, Faults(fail={kind: (1, errno.EIO)}))
    with pytest.raises((NbdError, RestoreError)):
        _restore(made, str(target.uri))
    assert target.disk.faults.seen[kind]  # type: ignore[union-attr]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_restore_to_a_server_that_stalls_can_be_interrupted(
    tmp_path: Path, peer: Callable[..., Peer], number: signal.Signals
) -> None:
    """Once is enough, also while every thread waits for the server."""
    data = bytearray(os.urandom(256 * CLUSTER))
    back_up(new(tmp_path / "repo"), FakeEngine({"vda": Disk(data)}), incremental=False)
    faults = Faults(stall={"write": threading.Event()})
    target = peer(len(data), faults)
    ran = Incbak(tmp_path).popen("restore", "latest", str(target.uri))
    try:
        wait_until(lambda: faults.seen.get("write"), "the restore is under way")
        time.sleep(0.3)
        ran.send_signal(number)
        _out, err = ran.communicate(timeout=20)
    finally:
        faults.stall["write"].set()
        if ran.poll() is None:
            ran.kill()
            ran.communicate()
    assert ran.returncode == 130
    assert "Traceback" not in err


@contextmanager
def _server(socket: Path, *command: str | Path) -> Iterator[str]:
    need(str(command[0]))
    process = subprocess.Popen([str(c) for c in command], stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: listens(socket) or process.poll() is not None, "the server's socket")
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait(30)


def test_qemu_nbd_takes_a_restore(made: Made, tmp_path: Path) -> None:
    """Into a qcow2 image that had other content."""
    need("qemu-img", "qemu-io")
    image, out, socket = tmp_path / "disk.qcow2", tmp_path / "out.raw", tmp_path / "s"
    for command in (
        ["qemu-img", "create", "-q", "-f", "qcow2", image, str(ROUND)],
        ["qemu-io", "-f", "qcow2", "-c", f"write -P 0xee 0 {ROUND}", image],
    ):
        subprocess.run([str(c) for c in command], check=True, stdout=subprocess.DEVNULL)
    with _server(socket, "qemu-nbd", "-t", "-f", "qcow2", "-k", socket, image) as uri:
        _restore(made, uri)
    subprocess.run(["qemu-img", "convert", "-O", "raw", str(image), str(out)], check=True)
    os.truncate(out, SIZE)
    assert differing(content(out, CLUSTER), made.held) == []


@pytest.mark.parametrize("options", [[], ["--filter=nozero"]])
def test_nbdkit_takes_a_restore(made: Made, tmp_path: Path, options: list[str]) -> None:
    """Also where zeroes must be sent as such."""
    out, socket = tmp_path / "out.raw", tmp_path / "s"
    out.write_bytes(bytes([JUNK]) * SIZE)
    with _server(socket, "nbdkit", "-f", "-U", socket, *options, "file", out) as uri:
        _restore(made, uri)
    assert differing(content(out, CLUSTER), made.held) == []


def test_a_server_that_cannot_flush_is_asked_for_every_reply(made: Made, tmp_path: Path) -> None:
    """A write that fails late, after all have been sent, still fails the restore."""
    need("nbdkit")
    if subprocess.run(["nbdkit", "--dump-plugin", "eval"], capture_output=True, check=False).returncode:
        missing("nbdkit", "it lacks the eval plugin")
    socket = tmp_path / "s"
    script = f"get_size=echo {SIZE}", "pread=exit 1", "pwrite=sleep 0.2; echo EIO >&2; exit 1"
    with _server(socket, "nbdkit", "-f", "-U", socket, "eval", *script) as uri:
        client = NbdClient.connect(uri)
        assert not client.can(p.SEND_FLUSH)
        client.close()
        with pytest.raises(NbdError, match="Input/output error"):
            _restore(made, uri)

"""The process: how it begins, is reached, and ends; and what its bitmaps are worth at the next start."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import click
import pytest

from incbak.bitmap.file import Bitmap, Found
from incbak.bitmap.format import REGION
from incbak.cli.serve import serve as serve_command
from incbak.disk.faults import Faults, FaultyDisk
from incbak.disk.locks import lock_image
from incbak.disk.memory import MemoryDisk
from incbak.errors import IncbakError, NbdRequestError, UsageError
from incbak.nbd import protocol as p
from incbak.nbd.client import NbdClient
from incbak.nbd.uri import NbdUri
from incbak.serve import opening
from incbak.serve.daemon import Daemon, ServeOptions
from incbak.serve.opening import close_tracked
from tests.kit.need import need, need_root
from tests.kit.serve import DEADLINE, Machine, Peer, Qmp, Serve, holding, raw_image, serving, wait_until

GRAIN = 65536
SIZE = 2 * REGION + 4096


def _command(directory: Path, *arguments: str) -> list[str]:
    state = ["--state-dir", str(directory / "state")]
    return [sys.executable, "-m", "incbak", "serve", "--name", "vm", *state, *arguments]


def _refused(directory: Path, *arguments: str) -> tuple[int, str]:
    """Exit code and message of a command line that cannot be served; called in this process, as the program does."""
    options = ["--name", "vm", "--state-dir", str(directory / "state")]
    options += ["--socket", str(directory / "n.sock"), "--monitor", str(directory / "q.sock")]
    with pytest.raises((IncbakError, click.ClickException)) as refused:
        serve_command.main([*options, *arguments], standalone_mode=False)
    assert not (directory / "n.sock").exists()
    assert not (directory / "q.sock").exists()
    if isinstance(refused.value, IncbakError):
        return refused.value.exit_code, refused.value.message
    return refused.value.exit_code, refused.value.format_message()


def _mark(serve: Serve, *offsets: int) -> None:
    client = serve.connect("vda")
    for offset in offsets:
        client.write(b"data", offset)
    client.close()


def _with_bitmap(directory: Path, image: Path, *, end: int) -> None:
    """A session that makes bitmap ``b``, writes clusters 1 and 2 of region 0, and ends by that signal."""
    with serving(directory, {"vda": image}) as serve:
        qmp = serve.qmp()
        qmp("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        _mark(serve, GRAIN, 2 * GRAIN)
        qmp.close()
        assert serve.stop(end) == (0 if end != signal.SIGKILL else -signal.SIGKILL)


def _found(directory: Path, image: Path, **env: str) -> dict[str, object]:
    with serving(directory, {"vda": image}, env=env) as serve:
        qmp = serve.qmp()
        bitmap = qmp.bitmaps("vda")["b"]
        qmp.close()
        assert serve.stop() == 0
    return bitmap


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return raw_image(tmp_path / "a.raw", SIZE)


@pytest.mark.parametrize(
    ("end", "boot", "found", "count"),
    [
        (signal.SIGTERM, False, "clean", 2 * GRAIN),
        pytest.param(signal.SIGINT, False, "clean", 2 * GRAIN, marks=pytest.mark.slow),
        (signal.SIGKILL, False, "recovered", 2 * GRAIN),
        (signal.SIGKILL, True, "coarse", REGION),
        pytest.param(signal.SIGTERM, True, "clean", 2 * GRAIN, marks=pytest.mark.slow),
    ],
)
def test_what_a_bitmap_is_worth_at_the_next_start(
    tmp_path: Path, image: Path, end: int, boot: bool, found: str, count: int
) -> None:
    """faults rows 7, 17: a clean end, a killed process, a host that went down; and a second clean end after each."""
    _with_bitmap(tmp_path, image, end=end)
    env = {}
    if boot:
        (tmp_path / "boot").write_text("01234567-89ab-cdef-0123-456789abcdef\n")
        env = {"INCBAK_BOOT_ID_FILE": str(tmp_path / "boot")}
    bitmap = _found(tmp_path, image, **env)
    assert (bitmap["x-incbak-found"], bitmap["count"], bitmap["recording"]) == (found, count, True)
    again = _found(tmp_path, image, **env)
    assert (again["x-incbak-found"], again["count"]) == ("clean", count)


def test_an_image_that_was_changed_behind_our_back_makes_the_bitmap_invalid(tmp_path: Path, image: Path) -> None:
    """faults row 8."""
    _with_bitmap(tmp_path, image, end=signal.SIGTERM)
    with image.open("r+b") as f:
        f.seek(50 * GRAIN)
        f.write(b"behind")
    bitmap = _found(tmp_path, image)
    assert (bitmap["inconsistent"], bitmap["x-incbak-reason"], bitmap["count"]) == (True, "disk-changed", 0)


def test_a_disk_that_cannot_be_flushed_is_no_clean_end(tmp_path: Path) -> None:
    """faults row 31: the flag is set only after the disk is flushed, and not when that fails."""
    disk = FaultyDisk(MemoryDisk(SIZE), Faults(fail={"flush": (1, 5)}))
    with Machine(tmp_path, {"vda": disk}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        machine.guest["vda"].write(memoryview(b"x"), 0)
        tracked = machine.tracked["vda"]
        assert close_tracked(tracked, 1) is False
        assert tracked.store
        tracked.store.lock()
        found = tracked.store.open("b", disk.fingerprint())
        assert isinstance(found, Bitmap)
        assert found.found is Found.RECOVERED
        found.close(None)
        tracked.store.unlock()
        del machine.tracked["vda"]


def test_the_disk_is_flushed_before_the_flag_is_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of a clean end: gate shut, disk flushed, fingerprint taken, bitmap closed."""
    steps: list[str] = []

    class Disk(MemoryDisk):
        def flush_times(self) -> None:
            assert machine.tracked["vda"].gate._draining
            steps.append("flush")

        def fingerprint(self) -> object:  # type: ignore[override]
            steps.append("fingerprint")
            return super().fingerprint()

    real = Bitmap.close

    def close(self: Bitmap, fingerprint: object) -> None:
        steps.append("close")
        real(self, fingerprint)  # type: ignore[arg-type]

    monkeypatch.setattr(Bitmap, "close", close)
    with Machine(tmp_path, {"vda": Disk(SIZE)}) as machine:
        machine("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        steps.clear()
    assert steps == ["flush", "fingerprint", "close"]


def test_when_an_image_was_written_is_made_durable_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that after a power cut an older image is known to have been put back. A failure ends nothing."""
    told: list[str] = []

    class Disk(MemoryDisk):
        def flush_times(self) -> None:
            told.append("flush")
            raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(opening, "DURABLE", 0.001)
    with Machine(tmp_path, {"vda": Disk(SIZE)}) as machine:
        heartbeat = opening.Heartbeat(machine.vm)
        try:
            wait_until(lambda: len(told) > 1, "the second sync")
        finally:
            heartbeat.stop()


def test_sigterm_ends_with_clients_connected_and_a_job_running(tmp_path: Path, image: Path) -> None:
    """Connections get to finish, jobs are cancelled, the end is clean and in time."""
    peer = Peer(tmp_path / "t.sock", MemoryDisk(SIZE))
    with serving(tmp_path, {"vda": image}) as serve:
        qmp = serve.qmp()
        qmp("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        qmp("blockdev-add", peer.blockdev("t0"))
        qmp("blockdev-backup", device="vda", target="t0", sync="none", job_id="j")
        client = serve.connect("vda")
        client.write(b"x", 0)
        began = time.monotonic()
        serve.process.send_signal(signal.SIGTERM)
        qmp.wait_event("SHUTDOWN", guest=False, reason="host-signal")
        assert serve.stop() == 0
        assert time.monotonic() - began < 10
        assert not serve.monitor.exists()
        assert not serve.nbd.exists()
        with pytest.raises(Exception):  # noqa: B017 (whichever way the connection is found to be gone)
            client.read(0, 1)
        client.abort()
        qmp.close()
    peer.stop()
    assert _found(tmp_path, image)["x-incbak-found"] == "clean"


@pytest.mark.parametrize("late", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_after_the_clean_end_does_not_make_it_a_failure(tmp_path: Path, late: signal.Signals) -> None:
    """A service manager, or a terminal that is closed, may send one while the process is on its way out."""
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "import incbak.serve.daemon as d\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "directory = Path(sys.argv[1])\n"
        "options = d.ServeOptions('vm', [('vda', directory / 'a.raw')], directory / 'state', "
        "directory / 'n.sock', directory / 'q.sock')\n"
        "status = d.Daemon(options).run()\n"
        f"os.kill(os.getpid(), {int(late)})\n"
        "sys.exit(status)\n"
    )
    raw_image(tmp_path / "a.raw", SIZE)
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(b"ready: ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


def test_quit_ends_as_sigterm_does(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, {"vda": image}) as serve:
        qmp = serve.qmp()
        assert qmp("quit") == {}
        qmp.wait_event("SHUTDOWN", reason="host-qmp-quit")
        assert serve.process.wait(DEADLINE) == 0
        qmp.close()
        serve.stop()


def test_a_second_sigterm_ends_in_time_whatever_it_waits_for(tmp_path: Path) -> None:
    """A disk that hangs: the process is gone soon after the second signal, and no bitmap is called clean."""
    code = (
        "import sys, threading, incbak.serve.daemon as d, incbak.serve.opening as o\n"
        "from pathlib import Path\n"
        "from incbak.disk.file import FileDisk\n"
        "FileDisk.flush = lambda self: threading.Event().wait()\n"
        "d.SECOND_SIGNAL = 0.3\n"
        "directory = Path(sys.argv[1])\n"
        "options = d.ServeOptions('vm', [('vda', directory / 'a.raw')], directory / 'state', "
        "directory / 'n.sock', directory / 'q.sock')\n"
        "sys.exit(d.Daemon(options).run())\n"
    )
    raw_image(tmp_path / "a.raw", SIZE)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stdout.readline().startswith(b"ready: ")
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 1


def test_sockets_are_ours_alone(tmp_path: Path, image: Path) -> None:
    """faults row 74: mode 0600, in a directory of mode 0700 when serve makes it."""
    runtime = tmp_path / "run"
    environment = {**os.environ, "INCBAK_RUNTIME_DIR": str(runtime)}
    with subprocess.Popen(
        _command(tmp_path, f"vda={image}"), stdout=subprocess.PIPE, env=environment, text=True
    ) as process:
        assert process.stdout
        line = process.stdout.readline()
        for name in ("nbd.sock", "qmp.sock"):
            path = runtime / "vm" / name
            assert str(path) in line
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert stat.S_IMODE((runtime / "vm").stat().st_mode) == 0o700
        process.terminate()
        assert process.wait(DEADLINE) == 0


def test_several_disks_each_under_its_name(tmp_path: Path) -> None:
    images = {name: raw_image(tmp_path / f"{name}.raw", (i + 1) * 4096 + 5) for i, name in enumerate("abc")}
    with serving(tmp_path, images) as serve:
        for i, name in enumerate("abc"):
            assert f"nbd+unix:///{name}?socket=" in serve.ready
            client = serve.connect(name)
            assert client.size == (i + 1) * 4096 + 512
            client.write(name.encode(), 4096)
            client.close()
        qmp = serve.qmp()
        assert [d["device"] for d in qmp("query-block")] == ["a", "b", "c"]
        qmp.close()
        assert serve.stop() == 0
    for name in "abc":
        assert images[name].read_bytes()[4096:4097] == name.encode()


def test_stdio_serves_one_connection_and_ends_clean(tmp_path: Path, image: Path) -> None:
    ours, theirs = socket.socketpair()
    process = subprocess.Popen(
        _command(tmp_path, "--stdio", f"vda={image}"), stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    )
    theirs.close()
    client = NbdClient.connect(ours, "vda")
    client.write(b"through stdio", 100)
    assert client.read(100, 13) == b"through stdio"
    client.close()
    assert process.wait(DEADLINE) == 0
    assert process.stderr
    process.stderr.close()
    assert image.read_bytes()[100:113] == b"through stdio"


def test_stdio_as_two_pipes(tmp_path: Path, image: Path) -> None:
    process = subprocess.Popen(
        _command(tmp_path, "--stdio", f"vda={image}"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin
    assert process.stdout
    assert process.stdout.read(16) == b"NBDMAGICIHAVEOPT"
    process.stdin.close()
    assert process.wait(DEADLINE) == 0
    process.stdout.close()


def test_sockets_handed_over_by_systemd(tmp_path: Path, image: Path) -> None:
    """``LISTEN_FDS`` with names: one for NBD, one for the monitor; readiness and signs of life go to
    ``NOTIFY_SOCKET``."""
    nbd, monitor, notify = tmp_path / "n", tmp_path / "q", tmp_path / "notify"
    listeners = []
    for path in (nbd, monitor):
        listeners.append(socket.socket(socket.AF_UNIX))
        listeners[-1].bind(str(path))
        listeners[-1].listen()
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(notify))
    told.settimeout(DEADLINE)
    launcher = (
        "import os, sys\n"
        "a, b = int(sys.argv[1]), int(sys.argv[2])\n"
        "os.dup2(a, 100); os.dup2(b, 101); os.dup2(100, 3); os.dup2(101, 4)\n"
        "os.environ['LISTEN_PID'] = str(os.getpid())\n"
        "os.execv(sys.executable, [sys.executable, *sys.argv[3:]])\n"
    )
    fds = [s.fileno() for s in listeners]
    environment = {**os.environ, "LISTEN_FDS": "2", "LISTEN_FDNAMES": "nbd:monitor", "NOTIFY_SOCKET": str(notify)}
    environment["WATCHDOG_USEC"] = "100000"
    process = subprocess.Popen(
        [sys.executable, "-c", launcher, *map(str, fds), *_command(tmp_path, f"vda={image}")[1:]],
        pass_fds=fds,
        env=environment,
        stdout=subprocess.PIPE,
    )
    assert told.recv(100).startswith(b"READY=1")
    assert [told.recv(100) for _ in range(3)] == [b"WATCHDOG=1"] * 3
    client = NbdClient.connect(NbdUri("vda", path=str(nbd)))
    assert client.size == SIZE
    client.close()
    qmp = Qmp(monitor)
    assert qmp("query-name") == {"name": "vm"}
    qmp("quit")
    while (word := told.recv(100)) == b"WATCHDOG=1":
        pass
    assert word == b"STOPPING=1"
    assert process.wait(DEADLINE) == 0
    qmp.close()
    for sock in (*listeners, told):
        sock.close()
    assert process.stdout
    process.stdout.close()


# -- refused, with nothing left behind -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["vda"], 2, "not DISK=IMAGE: vda"),
        (["=x"], 2, "not DISK=IMAGE"),
        (["vda=a.raw", "vda=b.raw"], 2, "disk vda is given twice"),
        (["--tcp", "nowhere", "vda=a.raw"], 2, "not HOST:PORT"),
        (["--scratch-dir", "/nonexistent", "vda=a.raw"], 2, "nonexistent"),
        (["--scratch-limit", "lots", "vda=a.raw"], 2, "lots"),
        (["vda=missing.raw"], 1, "cannot read"),
        (["vda=."], 1, "."),
        (["vda=q.qcow2"], 1, "is a qcow2 image"),
        ([], 2, "Missing argument"),
        (["--bogus", "vda=a.raw"], 2, "No such option"),
        (["n" * 300 + "=a.raw"], 2, "not a name"),
    ],
    ids=lambda v: repr(v)[:40],
)
def test_bad_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, text: str
) -> None:
    monkeypatch.chdir(tmp_path)
    raw_image(tmp_path / "a.raw", SIZE)
    raw_image(tmp_path / "b.raw", SIZE)
    (tmp_path / "q.qcow2").write_bytes(b"QFI\xfb".ljust(4096, b"\0"))
    found, stderr = _refused(tmp_path, *arguments)
    assert found == code, stderr
    assert text in stderr


def test_an_image_in_use_is_refused(tmp_path: Path, image: Path) -> None:
    """faults rows 47, 82: by another process of ours, and by anybody with QEMU's locks."""
    other = tmp_path / "other"
    other.mkdir()
    with serving(other, {"vda": image}):
        code, text = _refused(tmp_path, f"vda={image}")
        assert (code, "is in use by another process" in text) == (1, True), text
    with image.open("r+b") as f:
        lock_image(f.fileno(), str(image), write=True)
        assert _refused(tmp_path, f"vda={image}")[0] == 1


@pytest.mark.root
def test_an_image_that_others_write_without_locks_is_refused(tmp_path: Path, image: Path) -> None:
    """What they write would be in no bitmap; also from where the bytes are, below the image. Readers are no matter."""
    need_root()
    need("losetup")
    made = subprocess.run(["losetup", "--find", "--show", image], capture_output=True, text=True, check=True)
    device = Path(made.stdout.strip())
    try:
        with holding(device, "r+b") as pid:
            for options in ((), ("--read-only",)):
                code, text = _refused(tmp_path, *options, f"vda={device}")
                assert (code, f"image {device} is in use: process {pid} " in text) == (1, True), text
        with holding(image, "r+b") as pid:
            code, text = _refused(tmp_path, f"vda={device}")
            assert (code, f"process {pid} " in text) == (1, True), text
        code, text = _refused(tmp_path, f"vda={image}")
        assert (code, f"loop device {device}" in text) == (1, True), text
        with holding(device, "rb"), holding(image, "rb"), serving(tmp_path, {"vda": device}) as serve:
            assert serve.stop() == 0
    finally:
        subprocess.run(["losetup", "-d", device], check=True)


def test_two_servers_of_one_vm_cannot_share_its_bitmaps(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, {"vda": image}):
        code, text = _refused(tmp_path, f"vda={raw_image(tmp_path / 'b.raw', SIZE)}")
        assert (code, "are in use" in text) == (11, True), text


def test_one_disk_that_cannot_be_opened_releases_the_others(tmp_path: Path, image: Path) -> None:
    code, _text = _refused(tmp_path, f"vda={image}", f"vdb={tmp_path / 'missing'}")
    assert code == 1
    with serving(tmp_path, {"vda": image}) as serve:
        assert serve.stop() == 0


def test_a_live_socket_of_another_server_is_not_taken_away(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, {"vda": image}) as serve:
        other = raw_image(tmp_path / "b.raw", SIZE)
        options = ServeOptions("vm", [("vdb", other)], tmp_path / "x", nbd_socket=serve.nbd)
        with pytest.raises(UsageError, match="another process does"):
            Daemon(options).run()
        client = serve.connect("vda")
        client.close()


def test_read_only_refuses_writes_and_persistent_bitmaps(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, {"vda": image}, "--read-only") as serve:
        for name in ("vda", "vda:ro", ""):
            client = serve.connect(name)
            assert client.read_only
            client.close()
        qmp = serve.qmp()
        with pytest.raises(Exception, match="Operation not supported"):
            qmp("block-dirty-bitmap-add", node="vda", name="b", persistent=True)
        qmp.close()
        before = image.stat().st_mtime_ns
        assert serve.stop() == 0
        assert image.stat().st_mtime_ns == before


def test_the_read_only_export_of_a_writable_disk(tmp_path: Path, image: Path) -> None:
    """It refuses every kind of change itself, whatever its client believes; and it is no other disk: it sees writes."""
    with serving(tmp_path, {"vda": image}) as serve:
        writer, reader = serve.connect("vda"), serve.connect("vda:ro")
        assert (reader.read_only, reader.size) == (True, writer.size)
        assert reader.can(p.MULTI_CONN)
        assert not reader.can(p.SEND_TRIM | p.SEND_ZEROES | p.SEND_FAST_ZERO)
        writer.write(b"seen", 4096)
        for change in (
            lambda: reader.write(b"x", 0),
            lambda: reader.write(b"x", 0, fua=True),
            lambda: reader.write_zeroes(0, 4096),
            lambda: reader.trim(0, 4096),
        ):
            with pytest.raises(NbdRequestError) as caught:
                change()
            assert caught.value.errno == errno.EPERM
        reader.flush()
        assert reader.read(4096, 4) == b"seen"
        writer.close()
        reader.close()
        assert serve.stop() == 0


def test_connections_are_capped(tmp_path: Path, image: Path) -> None:
    """faults row 69."""
    with serving(tmp_path, {"vda": image}, "--max-connections", "2") as serve:
        clients = [serve.connect("vda") for _ in range(2)]
        with pytest.raises(Exception):  # noqa: B017 (closed at once: how that surfaces is the client's affair)
            serve.connect("vda")
        clients[0].close()

        def again() -> bool:
            try:
                serve.connect("vda").close()
            except (IncbakError, OSError):
                return False
            return True

        wait_until(again, "a slot is free again")
        clients[1].close()


@pytest.mark.alone
def test_a_stalled_target_process_holds_no_guest(tmp_path: Path, image: Path) -> None:
    """I4 through the real process: the target hangs, every guest write is answered within the bound; measured."""
    stall = threading.Event()
    peer = Peer(tmp_path / "t.sock", FaultyDisk(MemoryDisk(SIZE), Faults(stall={"write": stall, "zero": stall})))
    with image.open("r+b") as f:
        f.write(os.urandom(8 << 20))
    with serving(tmp_path, {"vda": image}) as serve:
        qmp = serve.qmp()
        qmp("blockdev-add", peer.blockdev("t0"))
        qmp("blockdev-backup", device="vda", target="t0", sync="full", job_id="j")
        client = serve.connect("vda")
        took = []
        for cluster in range(0, 2 * REGION // GRAIN, 8):
            began = time.monotonic()
            client.write(b"new", cluster * GRAIN)
            took.append(time.monotonic() - began)
        assert max(took) < 2.0
        assert [j["id"] for j in qmp("query-jobs")] == ["j"]
        qmp("block-job-cancel", device="j")
        qmp.wait_event("BLOCK_JOB_CANCELLED", device="j")
        client.close()
        qmp.close()
        stall.set()
        assert serve.stop() == 0
    peer.stop()


def test_query_block_tells_what_runners_need(tmp_path: Path, image: Path) -> None:
    with serving(tmp_path, {"vda": image}) as serve:
        qmp = serve.qmp()
        qmp("block-dirty-bitmap-add", node="vda", name="b", persistent=True, granularity=4096)
        device = qmp("query-block")[0]
        node = device["inserted"]
        assert node["x-incbak-path"] == str(image)
        assert node["image"]["virtual-size"] == SIZE
        told = {"name": "b", "granularity": 4096, "count": 0, "recording": True, "busy": False, "persistent": True}
        (bitmap,) = node["dirty-bitmaps"]
        assert Path(bitmap.pop("x-incbak-path")).is_file()
        assert bitmap == {**told, "x-incbak-found": "created"}
        assert json.dumps(device)
        qmp.close()

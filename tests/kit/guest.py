"""Boots a real guest (Debian's kernel, our initramfs) under QEMU: 2 s with KVM, 10 s without; with deadlines.

::

    with Guest(tmp, [GuestDisk("vda", image, iothread=True)]) as guest:
        guest.start_writer("w", 1, [Target("vda", slots=500)])
        guest.wait_acked("w", 100)
        ... guest.monitor is QEMU's QMP socket for incbak, guest.qmp a second client that knows the truth ...
        guest.stop_writer("w")

The disk is a file (raw, qcow2) or an NBD URI (``nbd+unix:///vda?socket=PATH``), on virtio, SCSI, IDE or NVMe, with an
I/O thread or not, set up with ``-blockdev`` or with ``-drive``.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.kit import initramfs, records
from tests.kit.need import missing, need
from tests.kit.qmp import Qmp


def need_guest() -> None:
    """Go on only where a guest can be booted (with KVM or without)."""
    need("qemu-system-x86_64")
    if initramfs.kernel() is None:
        missing("kvm", "there is no kernel with modules in /boot (Debian: linux-image-cloud-amd64)")
    if initramfs.busybox() is None:
        missing("kvm", "there is no static busybox (Debian: busybox-static)")


def accelerator() -> str:
    """``kvm`` where it can run an ordinary kernel, else ``tcg``; ``INCBAK_TEST_ACCEL`` decides if set.

    A ``/dev/kvm`` without the processor's own virtualization (kvm_pvm) hangs in the boot code, so it does not count.
    """
    if chosen := os.environ.get("INCBAK_TEST_ACCEL"):
        return chosen
    hardware = any(Path("/sys/module", module).exists() for module in ("kvm_intel", "kvm_amd"))
    return "kvm" if hardware and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg"


@functools.cache
def _initramfs() -> Path:
    directory = tempfile.mkdtemp(prefix="incbak-guest-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return initramfs.build(Path(directory) / "initramfs")


@dataclass(frozen=True)
class GuestDisk:
    """One disk; ``name`` is its serial number, its device id, and its node name (or, with ``legacy``, its drive id)."""

    name: str
    source: Path | str
    format: str = "raw"
    bus: str = "virtio"
    iothread: bool = False
    legacy: bool = False
    read_only: bool = False
    node_options: dict[str, Any] = field(default_factory=dict)

    def arguments(self) -> list[str]:
        """QEMU's command line for it."""
        return [*self._iothread(), *self._backend(), *self._frontend()]

    def _iothread(self) -> list[str]:
        return ["-object", f"iothread,id=io-{self.name}"] if self.iothread else []

    def _backend(self) -> list[str]:
        if self.legacy:
            source = str(self.source)
            return ["-drive", f"if=none,id={self.name},format={self.format},file={source}"]
        node = {"driver": self.format, "node-name": self.name, "discard": "unmap", "read-only": self.read_only}
        return ["-blockdev", json.dumps({**node, "file": self.file(), **self.node_options})]

    def file(self) -> dict[str, Any]:
        """The protocol node."""
        if not str(self.source).startswith("nbd"):
            driver = "host_device" if Path(self.source).is_block_device() else "file"
            return {"driver": driver, "filename": str(self.source), "read-only": self.read_only}
        uri = urlsplit(str(self.source))
        if "unix" in uri.scheme:
            server = {"type": "unix", "path": parse_qs(uri.query)["socket"][0]}
        else:
            server = {"type": "inet", "host": str(uri.hostname), "port": str(uri.port or 10809)}
        return {"driver": "nbd", "server": server, "export": uri.path.lstrip("/")}

    def _frontend(self) -> list[str]:
        thread = f",iothread=io-{self.name}" if self.iothread else ""
        common = f"drive={self.name},id={self.name}"
        if self.bus == "virtio":
            return ["-device", f"virtio-blk-pci,{common}-dev,serial={self.name}{thread}"]
        if self.bus == "scsi":
            hub = f"virtio-scsi-pci,id=hub-{self.name}{thread}"
            return ["-device", hub, "-device", f"scsi-hd,{common}-dev,bus=hub-{self.name}.0,serial={self.name}"]
        if self.bus == "ide":
            return ["-device", f"ide-hd,{common}-dev,serial={self.name}"]
        return ["-device", f"nvme,{common}-dev,serial={self.name}"]


@dataclass(frozen=True)
class Target:
    """Where a writer puts its records: a raw disk, or a file on a mounted one. ``spacing`` bytes from slot to slot."""

    disk: str = ""
    file: str = ""
    base: int = 0
    spacing: int = 4096

    def options(self) -> dict[str, Any]:
        place = {"file": self.file} if self.file else {"disk": self.disk}
        return {**place, "base": self.base, "spacing": self.spacing}

    def blocks(self, image: Path, slots: int) -> list[bytes]:
        """The slots in a raw image of the disk."""
        with image.open("rb") as f:
            out = []
            for slot in range(slots):
                f.seek(self.base + slot * self.spacing)
                out.append(f.read(records.SIZE).ljust(records.SIZE, b"\0"))
        return out


class GuestFailed(Exception):
    """The guest answered with an error, or did not answer in time."""


class Guest:
    """A running guest. ``monitor`` is a QMP socket nobody uses yet; ``qmp`` is the test's own client on another."""

    def __init__(
        self,
        directory: Path,
        disks: Sequence[GuestDisk],
        *,
        memory: int = 256,
        machine: str = "pc",
        arguments: Sequence[str] = (),
        boot_timeout: float = 120,
    ) -> None:
        self.directory, self.disks = directory, list(disks)
        directory.mkdir(parents=True, exist_ok=True)
        # Sockets have short names in a directory of their own: a path of a socket may have 107 bytes.
        self._run = Path(tempfile.mkdtemp(prefix="ibg"))
        self.monitor = self._run / "qmp"
        self.failures: list[dict[str, Any]] = []
        self.acked: dict[str, int] = {}
        self._changed = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._serial = 0
        self._ready = 0
        self._gone = False
        self.process = subprocess.Popen(self._command(memory, machine, arguments), stdin=subprocess.DEVNULL)
        try:
            self.qmp = Qmp(self._run / "truth")
            self._channel = self._connect(self._run / "port")
            self._thread = threading.Thread(target=self._listen, daemon=True)
            self._thread.start()
            if "-S" not in arguments:
                self.wait_ready(1, boot_timeout)
        except BaseException:
            self.kill()
            raise

    def _command(self, memory: int, machine: str, arguments: Sequence[str]) -> list[str]:
        chardev = "socket,id=port,server=on,wait=off,path="
        command = ["qemu-system-x86_64", "-accel", accelerator(), "-M", machine, "-m", str(memory),
                   "-nodefaults", "-no-user-config", "-display", "none",
                   "-kernel", str(initramfs.kernel()), "-initrd", str(_initramfs()),
                   "-append", "console=ttyS0 quiet panic=-1 mitigations=off",
                   "-serial", f"file:{self.directory}/console",
                   "-qmp", f"unix:{self.monitor},server=on,wait=off",
                   "-qmp", f"unix:{self._run}/truth,server=on,wait=off",
                   "-device", "virtio-serial-pci", "-chardev", chardev + f"{self._run}/port",
                   "-device", "virtserialport,chardev=port,name=incbak"]  # fmt: skip
        for disk in self.disks:
            command += disk.arguments()
        return [*command, *arguments]

    def _connect(self, path: Path) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(path))
        return sock

    def _listen(self) -> None:
        rest = b""
        while True:
            try:
                data = self._channel.recv(1 << 16)
            except OSError:
                data = b""
            with self._changed:
                if not data:
                    self._gone = True
                    self._changed.notify_all()
                    return
                *lines, rest = (rest + data).split(b"\n")
                for line in lines:
                    self._take(json.loads(line))
                self._changed.notify_all()

    def _take(self, message: dict[str, Any]) -> None:
        if "ack" in message:
            self.acked[message["ack"]] = message["n"]
        elif "id" in message:
            self._answers[message["id"]] = message
        elif "failed" in message:
            self.failures.append(message)
        elif "ready" in message:
            self._ready += 1

    def _wait(self, condition: Any, timeout: float, what: str) -> None:
        with self._changed:
            if not self._changed.wait_for(lambda: condition() or self._gone, timeout) or not condition():
                why = "QEMU is gone" if self._gone else f"not within {timeout} s"
                raise GuestFailed(f"{what}: {why}; the console says: {self.console()[-500:]}")

    def console(self) -> str:
        """What the kernel has said."""
        path = self.directory / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_ready(self, boots: int = 1, timeout: float = 120) -> None:
        """Wait until the guest has booted ``boots`` times."""
        self._wait(lambda: self._ready >= boots, timeout, "the guest did not boot")

    def __call__(self, command: str, timeout: float = 60, /, **arguments: Any) -> Any:
        """Run a command of ``guest_program.py`` and return its result."""
        return self.wait_answer(self.send(command, **arguments), timeout, command)

    def wait_answer(self, number: int, timeout: float = 60, command: str = "the command") -> Any:
        """Wait for the result of a command that `send` began."""
        self._wait(lambda: number in self._answers, timeout, f"no answer to {command}")
        answer = self._answers.pop(number)
        if "error" in answer:
            raise GuestFailed(f"{command}: {answer['error']}")
        return answer["result"]

    def send(self, command: str, **arguments: Any) -> int:
        """Begin a command and do not wait for it."""
        with self._changed:
            self._serial += 1
            number = self._serial
        self._channel.sendall(json.dumps({"id": number, "do": command, **arguments}).encode() + b"\n")
        return number

    def start_writer(
        self, name: str, stream: int, targets: Sequence[Target], *, slots: int = 499, pause: float = 0.0, first: int = 0
    ) -> None:
        """Let a writer go on until `stop_writer`; what it has synced is in ``acked[name]``."""
        options = [t.options() for t in targets]
        self.acked.setdefault(name, first - 1)
        self("start", writer=name, stream=stream, slots=slots, targets=options, pause=pause, first=first)

    def wait_acked(self, name: str, n: int, timeout: float = 60) -> int:
        """Wait until record ``n`` is synced; returns the newest that is."""
        self._wait(lambda: self.acked.get(name, -1) >= n, timeout, f"record {n} of {name} was not written")
        return self.acked[name]

    def wait_more(self, name: str, count: int = 20, timeout: float = 60) -> int:
        """Wait for ``count`` more records."""
        return self.wait_acked(name, self.acked.get(name, -1) + count, timeout)

    def stop_writer(self, name: str) -> dict[str, Any]:
        """Stop it; its figures: count, p50, p99, max in seconds, failed."""
        result: dict[str, Any] = self("stop", writer=name)
        return result

    def figures(self, name: str) -> dict[str, Any]:
        """The figures since the last call, without stopping it."""
        result: dict[str, Any] = self("figures", writer=name)
        return result

    def poweroff(self, timeout: float = 60) -> int:
        """A clean shutdown of the guest; QEMU's exit status."""
        self.send("poweroff")
        return self.process.wait(timeout)

    def quit(self, timeout: float = 30) -> int:
        """A clean end of QEMU without the guest's help."""
        self.qmp("quit")
        return self.process.wait(timeout)

    def kill(self) -> None:
        """End QEMU at once, and clear up."""
        self.process.kill()
        self.process.wait()
        for held in ("qmp", "_channel"):
            if hasattr(self, held):
                getattr(self, held).close()
        shutil.rmtree(self._run, ignore_errors=True)

    def __enter__(self) -> Guest:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()

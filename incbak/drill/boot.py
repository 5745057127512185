"""Boot a guest from a backup: QEMU on exports with an overlay, until the guest says something on its serial console."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from incbak.drill import guard
from incbak.errors import UsageError
from incbak.export.image import BackupImage
from incbak.export.overlay import Overlay
from incbak.export.server import ImageExport
from incbak.nbd.server import NbdServer
from incbak.private import PrivateDirectory
from incbak.repo.drills import BootDrill
from incbak.repo.record import DiskRecord, Record
from incbak.repo.repository import Repository

BUSES = ("virtio", "scsi", "ide", "nvme")
_KEPT = 64 << 10
"""Bytes of what the guest said last in which the sign of life is looked for."""
_TOLD = 300
_REFUSED = re.compile(r"\S+: (?:(?P<option>-[\w-]+)\b|unsupported machine type|unable to find CPU model)")
"""What QEMU says first of an argument that it does not take, before there is a guest."""


@dataclass(frozen=True)
class Boot:
    """``expect``: the sign of life; ``timeout`` in seconds; ``memory`` in bytes; ``arguments``: more for QEMU."""

    expect: re.Pattern[str]
    timeout: float = 300.0
    memory: int = 1 << 30
    bus: str = "virtio"
    arguments: tuple[str, ...] = ()
    program: str = f"qemu-system-{platform.machine()}"

    def check(self) -> None:
        """Raises `UsageError` when it cannot be done here."""
        if shutil.which(self.program) is None:
            raise UsageError(
                f"{self.program} is not installed", hint="Install it (Debian: qemu-system), or leave out --boot."
            )


def boot(repo: Repository, record: Record, disks: Sequence[DiskRecord], wanted: Boot, scratch: Path) -> BootDrill:
    """Run the guest and end it, whatever happens.

    What it writes is kept in ``scratch``, in files without a name. Raises `DiskError` when that cannot be, and
    `UsageError` when QEMU does not take an option: that says nothing of the backup.
    """
    began = time.monotonic()
    with ExitStack() as stack:
        private = stack.enter_context(PrivateDirectory())
        exports = {}
        for number, disk in enumerate(disks):
            overlay = Overlay(BackupImage(repo, record, disk), scratch)
            stack.callback(overlay.close)
            exports[str(number)] = ImageExport(overlay, disk.name)
        server = NbdServer(lambda: exports)
        stack.callback(server.stop)
        sock = server.listen_unix(private / "nbd")
        why = _run(command(wanted, list(exports), sock), wanted)
    return BootDrill(good=not why, seconds=round(time.monotonic() - began, 3), why=why)


def command(wanted: Boot, exports: Sequence[str], sock: Path) -> list[str]:
    """QEMU's command line. What the user adds comes behind our own values, and so wins."""
    argv = [wanted.program, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
    argv += ["-name", "incbak-drill", "-cpu", "max", "-m", f"{max(wanted.memory >> 20, 1)}M", "-serial", "stdio"]
    root = os.geteuid() == 0  # QEMU becomes nobody in the sandbox, which must let it
    rights = "" if root else ",elevateprivileges=deny"
    argv += ["-sandbox", f"on,obsolete=deny,spawn=deny,resourcecontrol=deny{rights}"]
    argv += ["-runas", "nobody"] if root else []
    if wanted.bus == "scsi":
        argv += ["-device", "virtio-scsi-pci"]
    for index, name in enumerate(exports):
        argv += _disk(wanted.bus, index, name, sock)
    argv += ["-nic", "none", *wanted.arguments]
    if not any(a.startswith("-accel") or "accel=" in a for a in wanted.arguments):
        argv += ["-accel", "kvm"] if _has_kvm() else []
        argv += ["-accel", "tcg"]
    return argv


def _disk(bus: str, index: int, name: str, sock: Path) -> list[str]:
    server = {"type": "unix", "path": str(sock)}
    node = {"driver": "raw", "node-name": f"disk{index}", "discard": "unmap",
            "file": {"driver": "nbd", "server": server, "export": name}}  # fmt: skip
    kind = {"virtio": "virtio-blk-pci", "scsi": "scsi-hd", "ide": "ide-hd", "nvme": "nvme"}[bus]
    device = f"{kind},drive=disk{index},bootindex={index + 1}" + (f",serial=disk{index}" if bus == "nvme" else "")
    return ["-blockdev", json.dumps(node), "-device", device]


def _has_kvm() -> bool:
    """On x86 only with the processor's own virtualization: others there are cannot run every kernel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    modules = [Path("/sys/module", name).exists() for name in ("kvm_intel", "kvm_amd")]
    return platform.machine() != "x86_64" or any(modules)


def _run(argv: Sequence[str], wanted: Boot) -> str:
    """Why there was no sign of life; empty if there was. Raises `UsageError` when QEMU does not take an option."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", guard.__file__, *argv],
        stdin=subprocess.PIPE,  # nothing is written: its end is ours
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    timer = threading.Timer(wanted.timeout, _kill, [process])
    timer.start()
    said = b""
    try:
        assert process.stdout
        while piece := os.read(process.stdout.fileno(), 65536):
            said = (said + piece)[-_KEPT:]
            if wanted.expect.search(said.decode(errors="replace")):
                return ""
        process.wait()
        late = not timer.is_alive()
    finally:
        timer.cancel()
        _kill(process)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
    tail = " ".join(said[-_TOLD:].decode(errors="replace").split())
    if not late and process.returncode == 1 and _refused(tail, wanted.arguments):
        raise UsageError(f"{wanted.program} does not start: {tail}", hint="Look at --qemu-arg.")
    why = f"QEMU ended with {process.returncode}"
    if late:
        why = f"{wanted.expect.pattern!r} (--boot-expect) did not come within {wanted.timeout:g} s"
    return f"{why}; the console says: {tail or 'nothing'}"


def _refused(said: str, arguments: Sequence[str]) -> bool:
    """Whether QEMU complains of what the user has added, so that nothing was tried."""
    found = _REFUSED.match(said)
    return bool(found and arguments and (found["option"] is None or found["option"] in arguments))


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


__all__ = ["BUSES", "Boot", "boot", "command"]

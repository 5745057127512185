"""The host that incbak runs on."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from incbak import __version__, host, programs
from incbak.bitmap.body import MappedBody, WrittenBody, shows_writes
from incbak.bitmap.format import Flag
from incbak.bitmap.store import views
from incbak.doctor import places
from incbak.doctor.finding import Finding, fault, guarded, ok, warning
from incbak.reasons import Reason

_YEAR_2024 = 1704067200.0
_STATE_ROOM = 256 << 20
_WHOLE = "The next backup reads the disk whole, and makes a new one."
_TOOLS = {
    "qemu-img": "restores to qcow2",
    "qemu-nbd": "restores to an existing qcow2 image",
    "qemu-storage-daemon": "backups of qcow2 images whose VM is off",
}


def look_at_host(state_dir: Path) -> list[Finding]:
    """All of it, without a repository or a VM."""
    found = [ok("incbak", f"{__version__}, Python {platform.python_version()}, numpy {np.__version__}")]
    found += guarded("kernel", _kernel)
    found += guarded("clock", _clock)
    found += guarded("state directory", lambda: _state(state_dir))
    found += guarded("bitmaps", lambda: _bitmaps(state_dir))
    found += guarded("runtime directory", _runtime)
    for tool, use in _TOOLS.items():
        found += guarded(tool, lambda tool=tool, use=use: _tool(tool, use))  # type: ignore[misc]
    return found


def _kernel() -> list[Finding]:
    if sys.platform != "linux":
        return [fault("kernel", f"{platform.system()} is not Linux")]
    host.boot_id()
    return [ok("kernel", platform.release())]


def _clock() -> list[Finding]:
    now = time.time()
    if now < _YEAR_2024:
        text = f"the clock says {time.strftime('%Y-%m-%d', time.gmtime(now))}"
        return [warning("clock", text, "Set it: backups are dated by it.")]
    return [ok("clock", time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))]


def _state(path: Path) -> list[Finding]:
    what = "state directory"
    where = places.nearest(path)
    found = places.works(what, where)
    if where == path.absolute():
        found += places.private(what, where)
    loss = "the bitmaps are lost, and all disks read whole,"
    found += places.lasting(what, where, loss) + places.roomy(what, where, _STATE_ROOM)
    return [*found, ok(what, f"bitmaps there are {_body_kind(where)}")]


def _body_kind(directory: Path) -> str:
    """Return how a bitmap below ``directory`` is read: see `incbak.bitmap.body`."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if shows_writes(fd):
            return f"{MappedBody.kind} (and each store is a write of its own)"
        return f"{WrittenBody.kind} (from a copy in memory)"
    finally:
        os.close(fd)


def _bitmaps(path: Path) -> list[Finding]:
    seen = views(path) if path.exists() else []
    good = [v for v in seen if v.slot and not v.reason]
    lost = [v for v in seen if v.reason and v.reason is not Reason.UNSAVED]  # those, QEMU has, while it runs
    found = [
        warning("bitmaps", f"{v.vm} {v.disk}: {v.name} is invalid: {v.reason.text} [{v.reason}]", _WHOLE)
        for v in lost
        if v.reason
    ]
    if good or not found:
        used = sum(v.in_use for v in good)
        clean = sum(not v.in_use and bool(v.slot and v.slot.flags & Flag.CLEAN) for v in good)
        found.append(ok("bitmaps", f"{used} in use, {clean} clean, {len(good) - used - clean} to be recovered"))
    return found


def _runtime() -> list[Finding]:
    what, path = "runtime directory", host.runtime_dir()
    where = places.nearest(path)
    if not os.access(where, os.W_OK | os.X_OK):
        hint = "Set XDG_RUNTIME_DIR or INCBAK_RUNTIME_DIR, or give serve --socket and --monitor."
        return [warning(what, f"{where} cannot be written: incbak serve cannot put its sockets in {path}", hint)]
    private = places.private(what, where) if where == path.absolute() else []
    return [ok(what, str(path)), *private]


def _tool(name: str, use: str) -> list[Finding]:
    path = shutil.which(name)
    if path is None:
        return [warning(name, f"is not there: no {use}", "Debian has it in qemu-utils or qemu-system-common.")]
    try:
        done = programs.run([path, "--version"], timeout=20)
    except (subprocess.SubprocessError, OSError) as e:
        return [fault(name, f"{path} does not run: {e}")]
    if done.code:
        return [fault(name, f"{path} does not run: {done.said or f'it exits with {done.code}'}")]
    return [ok(name, programs.text(done.out).splitlines()[0] if done.out else path)]

"""What this host says of itself: its boot, its processes, and where state and sockets live."""

from __future__ import annotations

import os
import time
from pathlib import Path

from incbak.errors import UsageError


def boot_id() -> bytes:
    """16 bytes that change with every boot of the host.

    ``INCBAK_BOOT_ID_FILE`` names another file to read it from: that is how tests and the demo act out a power cut.
    """
    path = os.environ.get("INCBAK_BOOT_ID_FILE", "/proc/sys/kernel/random/boot_id")
    return bytes.fromhex(Path(path).read_text(encoding="ascii").strip().replace("-", ""))


def boot_began_ns() -> int:
    """When this boot began, in ns since the epoch, by the clock as it is now."""
    if acted := os.environ.get("INCBAK_BOOT_ID_FILE"):
        return Path(acted).stat().st_mtime_ns
    return time.time_ns() - time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def start_time(pid: int) -> int | None:
    """When process ``pid`` started, in clock ticks since boot; ``None`` if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(stat.rpartition(")")[2].split()[19])


def default_state_dir() -> Path:
    """``INCBAK_STATE_DIR``, ``/var/lib/incbak`` for root, else the XDG state directory.

    Raises `UsageError` where there is none: a user without a home, as in a container.
    """
    if configured := os.environ.get("INCBAK_STATE_DIR"):
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/var/lib/incbak")
    if base := os.environ.get("XDG_STATE_HOME"):
        return Path(base) / "incbak"
    if (place := home()) is None:
        hint = "Say where bitmaps are kept with --state-dir DIR or INCBAK_STATE_DIR, or set HOME."
        raise UsageError("there is no state directory: HOME is not set, and the user has no entry in passwd", hint=hint)
    return place / ".local" / "state" / "incbak"


def home() -> Path | None:
    """The user's home, if there is one."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def runtime_dir() -> Path:
    """Where sockets go: ``INCBAK_RUNTIME_DIR``, ``/run/incbak`` for root, else ``$XDG_RUNTIME_DIR/incbak``."""
    if configured := os.environ.get("INCBAK_RUNTIME_DIR"):
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/run/incbak")
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "incbak" if base else default_state_dir() / "run"

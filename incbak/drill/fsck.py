"""What the tools of file systems say of a copy that may be changed. See the package's table for what is damage."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from incbak import programs
from incbak.drill.scratch import NOBODY, Scratch
from incbak.files import systems

GOOD, BAD, UNCHECKED = "good", "bad", "unchecked"
DEADLINE = 3600.0
"""Seconds for one call of a tool: some of what they are given is made to take for ever."""
_HEAD = 16 << 10
_TOLD = 300
_CHATTER = ("e2fsck 1.", "fsck.fat 4", "Pass ", "Failed to determine whether")
_TOOLS = {"ext2": "e2fsck", "ext3": "e2fsck", "ext4": "e2fsck", systems.FAT: "fsck.fat", systems.NTFS: "ntfsfix"}
_PACKAGES = {"e2fsck": "e2fsprogs", "fsck.fat": "dosfstools", "ntfsfix": "ntfs-3g"}
_PATH = os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))
_MENDED = 0b11
"""What ``e2fsck -p`` exits with when it has mended something; more is what it leaves to people."""


@dataclass(frozen=True)
class Verdict:
    """``why`` it is bad, or was not checked."""

    state: str
    why: str = ""


def checkable(system: str) -> str:
    """Why a file system cannot be checked here; empty if it can."""
    if (tool := _TOOLS.get(system)) is None:
        return "no tool here checks it"
    if shutil.which(tool, path=_PATH) is None:
        return f"{tool} is not installed (Debian: {_PACKAGES[tool]})"
    return ""


def check(system: str, scratch: Scratch, deadline: float = DEADLINE) -> Verdict:
    """Look at a file system that is `checkable`; ``scratch`` is changed."""
    try:
        if _TOOLS[system] == "e2fsck":
            return _ext(scratch, deadline)
        return _fat(scratch, deadline) if system == systems.FAT else _ntfs(scratch, deadline)
    except subprocess.TimeoutExpired as e:
        return Verdict(BAD, f"{e.cmd[0]} did not end within {deadline:g} s")


def _ext(scratch: Scratch, deadline: float) -> Verdict:
    code, said = _run(["e2fsck", "-p", scratch.path], scratch, deadline)
    if code & ~_MENDED:
        return _too_new(said) or Verdict(BAD, f"e2fsck -p exits with {code}: {said}")
    code, said = _run(["e2fsck", "-fn", scratch.path], scratch, deadline)
    return Verdict(BAD, f"e2fsck -fn exits with {code}: {said}") if code else Verdict(GOOD)


def _too_new(said: str) -> Verdict | None:
    newer = "unsupported feature" in said or "Get a newer version" in said
    return Verdict(UNCHECKED, "it has features that this e2fsck does not know") if newer else None


def _fat(scratch: Scratch, deadline: float) -> Verdict:
    _forget_in_use(scratch)
    code, said = _run(["fsck.fat", "-n", scratch.path], scratch, deadline)
    return Verdict(BAD, f"fsck.fat exits with {code}: {said}") if code else Verdict(GOOD)


def _forget_in_use(scratch: Scratch) -> None:
    """A FAT that is mounted is marked so, and its count of free clusters lags behind: both are as after a power cut."""
    boot = scratch.read(0, 512)
    is_32 = boot[22:24] == b"\0\0"
    flags = 65 if is_32 else 37
    scratch.write(bytes([boot[flags] & ~1]), flags)
    sector, info = int.from_bytes(boot[11:13], "little"), int.from_bytes(boot[48:50], "little")
    if is_32 and scratch.read(sector * info, 4) == b"RRaA":
        scratch.write(b"\xff" * 4, sector * info + 488)


def _ntfs(scratch: Scratch, deadline: float) -> Verdict:
    if _run(["ntfsfix", "-n", scratch.path], scratch, deadline)[0] == 0:
        return Verdict(GOOD)
    _run(["ntfsfix", scratch.path], scratch, deadline)
    code, said = _run(["ntfsfix", "-n", scratch.path], scratch, deadline)
    return Verdict(BAD, f"ntfsfix exits with {code}: {said}") if code else Verdict(GOOD)


def _run(argv: Sequence[str], scratch: Scratch, deadline: float) -> tuple[int, str]:
    """Exit code, and what it said, cut. The tool is nobody when we are root. Raises `subprocess.TimeoutExpired`."""
    root = os.geteuid() == 0
    ran = programs.run(
        argv,
        timeout=deadline,
        kept=_HEAD,
        err=subprocess.STDOUT,
        pass_fds=[scratch.fd],
        env={"PATH": _PATH, "LC_ALL": "C"},
        user=NOBODY if root else None,
    )
    return ran.code, _cut(ran.out.decode(errors="replace").replace(scratch.path, "it"))


def _cut(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith(_CHATTER)]
    whole = "; ".join(lines)
    return whole if len(whole) <= _TOLD else f"{whole[:_TOLD]} ..."


__all__ = ["BAD", "GOOD", "UNCHECKED", "Verdict", "check", "checkable"]

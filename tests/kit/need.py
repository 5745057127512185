"""A skip cannot hide: ``INCBAK_MUST_RUN=qemu,kvm,root,...`` (or ``all``) turns it into a failure."""

from __future__ import annotations

import os
import shutil

import pytest

_GROUP = {
    "qemu-img": "qemu",
    "qemu-io": "qemu",
    "qemu-nbd": "qemu",
    "qemu-storage-daemon": "qemu",
    "qemu-system-x86_64": "qemu",
    "mkfs.btrfs": "root",
    "btrfs": "root",
    "nbdinfo": "nbd",
    "nbdcopy": "nbd",
    "nbdsh": "nbd",
    "nbdfuse": "nbd",
    "nbdkit": "nbd",
    "fio": "fio",
}


def _must_run(what: str) -> bool:
    wanted = {w.strip() for w in os.environ.get("INCBAK_MUST_RUN", "").split(",")}
    return bool(wanted & {"all", what, _GROUP.get(what, what)})


def missing(what: str, why: str) -> None:
    """Skip the test because ``what`` is not there; fail it where ``INCBAK_MUST_RUN`` names ``what``."""
    if _must_run(what):
        pytest.fail(f"INCBAK_MUST_RUN asks for {what}, but {why}")
    pytest.skip(f"{what}: {why}")


def need(*tools: str) -> None:
    """Go on only if every program of ``tools`` is on the PATH."""
    for tool in tools:
        if shutil.which(tool) is None:
            missing(tool, "it is not installed")


def need_root() -> None:
    """Go on only as root."""
    if os.geteuid() != 0:
        missing("root", "not running as root")

"""A drill that boots Linux on a backup: it mounts the file system that was backed up, and writes to it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.kit import initramfs
from tests.kit.cli import Incbak
from tests.kit.guest import accelerator, need_guest
from tests.kit.need import need
from tests.kit.serve import raw_image


@pytest.mark.kvm
def test_a_kernel_mounts_and_writes(tmp_path: Path) -> None:
    need_guest()
    need("mkfs.ext4")
    incbak = Incbak(tmp_path)
    incbak("init")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "greeting").write_text("from the backup\n")
    image = raw_image(tmp_path / "root.raw", 64 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-d", tmp_path / "files", image], check=True, timeout=60)
    incbak("full", image, "--name", "vm")
    guest = ["-accel", accelerator(), "-kernel", str(initramfs.kernel()), "-append", "console=ttyS0 quiet",
             "-initrd", str(initramfs.build_mounting(tmp_path / "initramfs"))]  # fmt: skip
    argv = ["drill", "--boot", "--boot-expect", r"from the backup\s+vm login:", "--boot-memory", "256M",
            "--qemu", "qemu-system-x86_64", *(f"--qemu-arg={word}" for word in guest)]  # fmt: skip
    for _ in range(2):  # what the first guest wrote, the second does not find
        assert "the guest was up after" in incbak(*argv, "--boot-timeout", "110s").out
    assert "disk0: 1024 of 1024 clusters restored" in incbak("drill").out

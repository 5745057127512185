"""``tools/demo IMAGE``: the user's image is only read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kit.need import need

TOP = Path(__file__).parents[2]


@pytest.mark.qemu
def test_a_qcow2_image_of_the_users_is_only_read(tmp_path: Path) -> None:
    """Its bitmap would be stored in it."""
    need("qemu-img", "qemu-io", "qemu-storage-daemon")
    image, venv = tmp_path / "q.qcow2", tmp_path / "venv"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", image, "4M"], check=True, timeout=60)
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write -q -P 7 1M 300k", image], check=True, timeout=60)
    before = image.read_bytes()
    venv.mkdir()
    (venv / "bin").symlink_to(Path(sys.executable).parent)
    (venv / ".incbak-run").touch()
    env = {**os.environ, "INCBAK_VENV": str(venv), "TMPDIR": str(tmp_path)}
    ran = subprocess.run(
        [TOP / "tools" / "demo", image], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "bit for bit" in ran.stdout
    assert image.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("incbak-demo")] == []

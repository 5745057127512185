"""A QEMU that does not flush (``cache=unsafe``): what its image stores may lack writes. No guest is booted."""

from __future__ import annotations

import json
import subprocess
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cli import Incbak, differing
from tests.kit.guest import Guest, GuestDisk
from tests.kit.live import content_of, device_write, qcow2_image

pytestmark = pytest.mark.kvm
SIZE = 4 << 20
UNSAFE: dict[str, Any] = {"cache": {"no-flush": True}}


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return qcow2_image(tmp_path / "vda.qcow2", SIZE)


def _start(stack: ExitStack, image: Path, options: dict[str, Any], name: str) -> Guest:
    disk = GuestDisk("vda", image, format="qcow2", node_options=options)
    guest = Guest(image.parent / name, [disk], arguments=["-S"])
    stack.callback(guest.kill)
    return guest


def _in_image(image: Path) -> list[str]:
    ran = subprocess.check_output(["qemu-img", "info", "-U", "--output=json", image], timeout=20)
    return [b["name"] for b in json.loads(ran)["format-specific"]["data"].get("bitmaps", [])]


def _incremental(incbak: Incbak, guest: Guest) -> str | None:
    incbak("incremental", f"qmp:{guest.monitor}", "--name", "vm")
    reason: str | None = incbak.list()[-1]["disks"][0]["reason"]
    return reason or None


@pytest.mark.parametrize("where", ["format", "protocol"])
def test_its_bitmaps_are_in_memory(stack: ExitStack, incbak: Incbak, image: Path, where: str) -> None:
    file = {"driver": "file", "filename": str(image), **UNSAFE}
    guest = _start(stack, image, UNSAFE if where == "format" else {"file": file}, "guest")
    (made,) = incbak("--json", "full", f"qmp:{guest.monitor}", "--name", "vm").objects()
    assert "disk vda-dev: its bitmap is lost when QEMU ends: QEMU does not flush its image" in "; ".join(made["notes"])
    device_write(guest.qmp, "vda-dev", (image, "qcow2"), 7, 65536, 4096)
    assert _incremental(incbak, guest) is None
    assert differing(incbak.restored(), content_of(image)) == []
    guest.quit()
    assert _in_image(image) == []


@pytest.mark.parametrize("killed", [False, True])
def test_a_bitmap_from_before_is_not_believed_and_does_not_stay(
    stack: ExitStack, incbak: Incbak, image: Path, killed: bool
) -> None:
    """Nor does it stay where the run does not come to its end."""
    guest = _start(stack, image, {}, "before")
    source = f"qmp:{guest.monitor}"
    (made,) = incbak("--json", "full", source, "--name", "vm").objects()
    assert "bitmap is lost" not in "; ".join(made["notes"])
    guest.quit()
    assert _in_image(image)
    guest = _start(stack, image, UNSAFE, "guest")
    source = f"qmp:{guest.monitor}"
    ran = incbak("incremental", source, "--name", "vm", "--dry-run")
    assert "[unflushed]" in ran.out + ran.err
    assert "[unflushed]" in (doctor := incbak.run("doctor", source)).out, doctor.err
    assert _in_image(image), "nothing of that changes anything"
    if killed:
        incbak.run("incremental", source, "--name", "vm", env={"INCBAK_CRASH_AT": "qemu.recording"})
        assert _in_image(image) == []
        return
    assert _incremental(incbak, guest) == "unflushed"
    assert _in_image(image) == []
    device_write(guest.qmp, "vda-dev", (image, "qcow2"), 7, 65536, 4096)
    assert _incremental(incbak, guest) is None
    assert differing(incbak.restored(), content_of(image)) == []

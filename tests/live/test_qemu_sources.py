"""A running QEMU whose disks have bytes in other files than their images. No guest is booted."""

from __future__ import annotations

import re
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.kit.cli import Incbak, differing
from tests.kit.devices import written
from tests.kit.guest import Guest, GuestDisk
from tests.kit.live import content_of, device_write, eventually

pytestmark = pytest.mark.kvm
SIZE = 4 << 20


def _image(path: Path, *options: str) -> Path:
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *options, path], check=True, timeout=20)
    return path


def _reason(incbak: Incbak, guest: Guest, kind: str = "incremental", *options: str) -> str | None:
    incbak(kind, f"qmp:{guest.monitor}", "--name", "vm", *options)
    (disk,) = incbak.list()[-1]["disks"]
    return disk["reason"] or None


def test_a_data_file(stack: ExitStack, tmp_path: Path, incbak: Incbak) -> None:
    """Under one QEMU it costs nothing; nothing shows who wrote while no QEMU had it open."""
    image = _image(tmp_path / "disk.qcow2", "-o", f"data_file={tmp_path}/data,data_file_raw=on,size={SIZE}")
    guest = Guest(tmp_path / "one", [GuestDisk("vda", image, format="qcow2")], arguments=["-S"])
    stack.callback(guest.kill)
    _reason(incbak, guest, "full")
    device_write(guest.qmp, "vda-dev", (tmp_path / "data", "raw"), 7, 65536, 4096)
    assert _reason(incbak, guest) is None
    assert _reason(incbak, guest) is None
    assert differing(incbak.restored(), content_of(image)) == []
    guest.quit()
    written(tmp_path / "data", 2 << 20)
    guest = Guest(tmp_path / "two", [GuestDisk("vda", image, format="qcow2")], arguments=["-S"])
    stack.callback(guest.kill)
    assert _reason(incbak, guest) == "bitmap-missing"
    assert differing(incbak.restored(), content_of(image)) == []


def test_a_bitmap_of_the_image_that_was_off(stack: ExitStack, tmp_path: Path, incbak: Incbak) -> None:
    """It is believed until somebody writes to the data file, and under a running QEMU that may be anybody."""
    image = _image(tmp_path / "disk.qcow2", "-o", f"data_file={tmp_path}/data,data_file_raw=on,size={SIZE}")
    incbak("full", image, "--name", "vm", "--disk", "vda-dev")
    guest = Guest(tmp_path / "guest", [GuestDisk("vda", image, format="qcow2")], arguments=["-S"])
    stack.callback(guest.kill)
    device_write(guest.qmp, "vda-dev", (tmp_path / "data", "raw"), 7, 65536, 4096)
    assert _reason(incbak, guest) == "disk-changed"
    assert _reason(incbak, guest) is None
    assert differing(incbak.restored(), content_of(image)) == []


def test_a_backing_file_with_a_relative_name(
    stack: ExitStack, tmp_path: Path, incbak: Incbak, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Relative to the directory in which QEMU was started, which is not ours."""
    base = tmp_path / "base"
    base.write_bytes(bytes(SIZE))
    image = _image(tmp_path / "disk.qcow2", "-b", base.name, "-F", "raw")
    for turn, expected in enumerate((None, "backing-changed")):
        with monkeypatch.context() as inside:
            inside.chdir(tmp_path)
            guest = Guest(
                tmp_path / f"vm{turn}", [GuestDisk("vda", Path(image.name), format="qcow2")], arguments=["-S"]
            )
        stack.callback(guest.kill)
        if expected is None:
            _reason(incbak, guest, "full")
            assert _reason(incbak, guest) is None
        else:
            assert _reason(incbak, guest) == expected
            assert differing(incbak.restored(), content_of(image)) == []
        guest.quit()
        written(base, 1 << 20)


def test_a_backing_file_of_which_nothing_is_known(stack: ExitStack, tmp_path: Path, incbak: Incbak) -> None:
    """An NBD export: each backup reads everything and says why, until the owner says that it never changes."""
    (tmp_path / "base").write_bytes(bytes(SIZE))
    command = ["qemu-nbd", "-r", "-f", "raw", "-k", tmp_path / "nbd", "-e", "5", "-t", tmp_path / "base"]
    server = stack.enter_context(subprocess.Popen(command))
    stack.callback(server.kill)
    eventually((tmp_path / "nbd").exists, 10, "qemu-nbd listens")
    name = f"nbd+unix://?socket={tmp_path}/nbd"
    image = _image(tmp_path / "disk.qcow2", "-b", name, "-F", "raw")
    guest = Guest(tmp_path / "guest", [GuestDisk("vda", image, format="qcow2")], arguments=["-S"])
    stack.callback(guest.kill)
    said = incbak("full", f"qmp:{guest.monitor}", "--name", "vm").err
    (known,) = re.findall(r"nothing is known of what is below it: (\S+);", said)
    assert _reason(incbak, guest) == "unproven"
    assert _reason(incbak, guest, "incremental", "--trust-backing", known) is None

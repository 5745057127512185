"""Backups of a running QEMU by the command line, and what must be true of the guest and of QEMU afterwards."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.kit import records
from tests.kit.cli import Content, Incbak, content, differing
from tests.kit.guest import Guest, Target
from tests.kit.qmp import Qmp


def qcow2_image(path: Path, size: int) -> Path:
    """A new qcow2 image, which can hold bitmaps."""
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", path, str(size)], check=True, timeout=20)
    return path


def content_of(image: Path) -> Content:
    """What a guest reads of a raw or qcow2 image, also while a VM that is stopped has it open."""
    if image.suffix != ".qcow2":
        return content(image)
    plain = image.with_suffix(".plain")
    convert = ["qemu-img", "convert", "-U", "-f", "qcow2", "-O", "raw", image, plain]
    subprocess.run(convert, check=True, timeout=60)
    return content(plain)


@dataclass
class Writes:
    """A writer in the guest. Each target is a disk of the guest, by its serial number."""

    name: str
    stream: int
    targets: Sequence[Target]
    slots: int
    pause: float = 0.004

    def start(self, guest: Guest, first: int = 0) -> None:
        """Write until the end, at least a few."""
        guest.start_writer(self.name, self.stream, self.targets, slots=self.slots, pause=self.pause, first=first)
        guest.wait_acked(self.name, first + 10)

    def check(self, directory: Path, acknowledged: int) -> int:
        """The restored disks in ``directory`` hold all records of one instant; the number of the newest."""
        images = [t.blocks(directory / f"{t.disk}-dev.raw", self.slots) for t in self.targets]
        newest: int = records.check(images, self.stream, self.slots, acknowledged)
        return newest


@dataclass
class Chain:
    """Backups of one VM in one repository; each remembers what was acknowledged before it began."""

    incbak: Incbak
    writes: Writes
    options: Sequence[str] = ()
    acknowledged: dict[str, int] = field(default_factory=dict)

    def back_up(self, guest: Guest, kind: str = "incremental", *options: str) -> dict[str, dict[str, Any]]:
        """A backup that succeeds; its disks by name."""
        before = guest.acked.get(self.writes.name, -1)
        made = self.incbak("--json", kind, f"qmp:{guest.monitor}", "--name", "vm", *self.options, *options)
        (record,) = made.objects()
        self.acknowledged[record["id"]] = before
        return {d["name"]: d for d in record["disks"]}

    def restore(self, ident: str = "latest") -> Path:
        """All disks, each as DISK.raw in the directory."""
        out = self.incbak.root / "out"
        out.mkdir(exist_ok=True)
        self.incbak("-q", "restore", ident, out, "--force")
        return out

    def check(self) -> None:
        """Every backup so far holds all that was acknowledged before it, and none is older than the one before."""
        found = [self.writes.check(self.restore(ident), n) for ident, n in self.acknowledged.items()]
        assert found == sorted(found)

    def differs(self, images: dict[str, Path], ident: str = "latest") -> dict[str, list[int]]:
        """Where a restored backup is not as the images are now."""
        out = self.restore(ident)
        found = {name: differing(content(out / f"{name}-dev.raw"), content_of(i)) for name, i in images.items()}
        return {name: places for name, places in found.items() if places}


def eventually(condition: Callable[[], Any], timeout: float, what: str) -> None:
    """Wait until it holds; fails with ``what``."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.02)


def device_write(qmp: Qmp, device: str, where: tuple[Path, str], fill: int, offset: int, length: int) -> None:
    """Write as the guest's device would, without a guest, into the image ``where``; fails if the write has failed."""
    unproven_write(qmp, device, fill, offset, length)
    assert_written(where, fill, offset, length)


def unproven_write(qmp: Qmp, device: str, fill: int, offset: int, length: int) -> None:
    """The same, to be followed by `assert_written`: QEMU's answer is empty either way.

    What ``qemu-io`` says of a failure goes to QEMU's stdout.
    """
    path = f"/machine/peripheral/{device}/virtio-backend"
    for command in (f"write -P {fill} {offset} {length}", "flush"):
        qmp("human-monitor-command", 20, command_line=f'qemu-io -d {path} "{command}"')


def assert_written(where: tuple[Path, str], fill: int, offset: int, length: int) -> None:
    """The image, a path and its format, has these bytes."""
    image, form = where
    look = ["qemu-io", "-U", "-r", "-f", form, "-c", f"read -P {fill} {offset} {length}", str(image)]
    seen = subprocess.run(look, capture_output=True, text=True, timeout=20, check=False)
    assert (seen.returncode, "failed" in seen.stdout) == (0, False), f"a write failed: {seen.stdout}{seen.stderr}"


def backup_jobs(qmp: Qmp) -> list[dict[str, Any]]:
    """The backup jobs of a QEMU; a mirror job of ours is there for a moment before, of nodes that are no disk's."""
    return [job for job in qmp("query-block-jobs") if job["type"] == "backup"]


def running(guest: Guest) -> bool:
    """Whether the VM is not stopped."""
    return bool(guest.qmp("query-status")["running"])


def unharmed(guest: Guest, writer: str, timeout: float = 20) -> None:
    """The guest has seen no error, is not stopped, and goes on writing."""
    assert guest.process.poll() is None, "QEMU is gone"
    try:
        eventually(lambda: running(guest), timeout, "the VM runs again")
    except AssertionError as e:
        raise AssertionError(f"{e}: it is {guest.qmp('query-status')}, {guest.qmp('query-jobs')}") from e
    guest.wait_more(writer, 10, timeout)
    assert guest.failures == []


def ours_in(guest: Guest) -> list[str]:
    """What of incbak's is in QEMU beside bitmaps: nodes, jobs, filters above a device, scratch files.

    Descriptors count only while the VM runs: QEMU keeps those that were removed until then.
    """
    found = [n["node-name"] for n in guest.qmp("query-named-block-nodes", flat=True)]
    found += [j["id"] for j in guest.qmp("query-jobs")]
    if running(guest):
        found += [fd.get("opaque", "") for s in guest.qmp("query-fdsets") for fd in s["fds"]]
    found += [d["inserted"]["node-name"] for d in guest.qmp("query-block") if "inserted" in d]
    return [x for x in found if x.startswith("incbak-")] + _scratch_files(guest)


def _scratch_files(guest: Guest) -> list[str]:
    """Files without a name that take space and that QEMU has open."""
    found = []
    for fd in Path(f"/proc/{guest.process.pid}/fd").iterdir():
        if int(fd.name) < 3:
            continue  # the test's own
        with suppress(OSError):
            if fd.readlink().name.endswith("(deleted)") and "/#" in str(fd.readlink()) and fd.stat().st_blocks:
                found.append(f"scratch file of {fd.stat().st_blocks * 512} bytes")
    return found


def bitmaps_of(guest: Guest, node: str) -> list[str]:
    """The names of a node's bitmaps, without the end mark that each of ours has beside it."""
    nodes = guest.qmp("query-named-block-nodes", flat=True)
    found = (b for n in nodes if n["node-name"] == node for b in n.get("dirty-bitmaps", []))
    names = {b["name"] for b in found if "name" in b}
    return sorted(name for name in names if not (name.endswith("-end") and name.removesuffix("-end") in names))

"""A VM under ``incbak watch`` over many starts and ends: as a guest that boots, or by its monitor alone.

Without a boot the VM runs, but what it is said to do, the test does: writes go through the device's backend in QEMU,
and a shutdown is a reset that QEMU was told to take for one.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.kit.cli import Incbak, differing
from tests.kit.guest import Guest, GuestDisk
from tests.kit.live import content_of, device_write, eventually
from tests.kit.qmp import Qmp
from tests.kit.serve import raw_image

CLUSTER = 65536


class Watch:
    """A running ``incbak watch``; what it says is in ``said``."""

    def __init__(self, incbak: Incbak, source: str, *options: str, env: dict[str, str] | None = None) -> None:
        self.process = incbak.popen("--json", "watch", source, "--name", "vm", *options, env=env)
        self.said: list[dict[str, Any]] = []
        self.errors = ""
        self._threads = [threading.Thread(target=t, daemon=True) for t in (self._read, self._read_errors)]
        for thread in self._threads:
            thread.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def _read_errors(self) -> None:
        assert self.process.stderr
        self.errors = self.process.stderr.read()

    def events(self) -> list[str]:
        """What has happened, in short."""
        return [each["event"] for each in self.said]

    def heard(self, event: str) -> list[dict[str, Any]]:
        """All that it said of one kind."""
        return [each for each in self.said if each["event"] == event]

    def wait(self, event: str, count: int = 1, timeout: float = 60) -> dict[str, Any]:
        """Wait until it has said so ``count`` times."""
        done = lambda: len(self.heard(event)) >= count or self.process.poll() is not None  # noqa: E731
        eventually(done, timeout, f"{event}: {self.said}")
        if len(self.heard(event)) < count:
            self.ended()
        assert len(self.heard(event)) >= count, (self.said, self.errors)
        return self.heard(event)[count - 1]

    def end(self, number: int = signal.SIGTERM, timeout: float = 60) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        return self.ended(timeout)

    def ended(self, timeout: float = 60) -> int:
        """The exit code, waited for."""
        code = self.process.wait(timeout)
        for thread in self._threads:
            thread.join(10)
        assert "Traceback" not in self.errors, self.errors
        return code

    def close(self) -> None:
        """End it in any case."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for thread in self._threads:
            thread.join(10)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()


class WatchedVm:
    """A VM with disks ``NAME-dev`` on ``images``, a monitor for watch beside the others, and its backups."""

    def __init__(self, root: Path, *names: str, size: int, iothread: bool = False) -> None:
        self.root, self.size, self.iothread = root, size, iothread
        self.images = {n: raw_image(root / f"{n}.raw", size, random.Random(n).randbytes(8 << 20)) for n in names}
        self.formats: dict[str, str] = {}
        self.backing: dict[str, Path] = {}
        """The file that a block device of ``images`` is on."""
        self.incbak = Incbak(root)
        self.incbak("init")
        self.run = Path(tempfile.mkdtemp(prefix="ibw"))
        self.socket, self.other = self.run / "watch", self.run / "other"
        self.watches: list[Watch] = []
        self.dice = random.Random(7)
        self._guest: Guest | None = None

    @property
    def guest(self) -> Guest:
        """The VM that was started last."""
        assert self._guest
        return self._guest

    @property
    def qmp(self) -> Qmp:
        """Its monitor that nobody else uses."""
        return self.guest.qmp

    # -- starts and ends ------------------------------------------------------------------------------------------

    def watch(self, *options: str, env: dict[str, str] | None = None, socket: Path | None = None) -> Watch:
        """Start a watch."""
        self.watches.append(Watch(self.incbak, f"qmp:{socket or self.socket}", *options, env=env))
        return self.watches[-1]

    def start(self, *arguments: str) -> Guest:
        """Start the VM: paused before its first instruction."""
        formats = self.formats
        disks = [GuestDisk(n, i, formats.get(n, "raw"), iothread=self.iothread) for n, i in self.images.items()]
        monitors = [x for path in (self.socket, self.other) for x in ("-qmp", f"unix:{path},server=on,wait=off")]
        if self._guest:
            self._guest.kill()
        self._guest = Guest(self.root / "guest", disks, arguments=["-S", *monitors, *arguments])
        return self._guest

    def begin(self, *options: str) -> Watch:
        """Start the VM with a watch that lets it go; nothing is waited for but that."""
        self.start()
        watch = self.watch("--start", "--once", *options)
        watch.wait("ready")
        return watch

    def boot(self, *options: str) -> Watch:
        """The same, and the guest has booted."""
        watch = self.begin(*options)
        self.guest.wait_ready()
        return watch

    def shut_down(self, watch: Watch) -> None:
        """A clean shutdown by the guest; watch has saved."""
        self.guest.send("poweroff")
        self.saved(watch)

    def fall(self) -> None:
        """A shutdown without a guest."""
        self.qmp("set-action", reboot="shutdown")
        self.qmp("system_reset")

    def fall_down(self, watch: Watch) -> None:
        """The same; watch has saved."""
        self.fall()
        self.saved(watch)

    def saved(self, watch: Watch) -> None:
        """Watch ended QEMU, and lost nothing."""
        assert watch.ended() == 0, (watch.said, watch.errors)
        assert self.guest.process.wait(30) == 0

    def close(self) -> None:
        """End everything."""
        for watch in self.watches:
            watch.close()
        if self._guest:
            self._guest.kill()
        shutil.rmtree(self.run, ignore_errors=True)

    # -- writes ---------------------------------------------------------------------------------------------------

    def write(self, disk: str, *clusters: int) -> None:
        """The guest writes a cluster each."""
        for cluster in clusters:
            self.guest("write", disk=disk, offset=cluster * CLUSTER, length=CLUSTER, fill=self.dice.randrange(1, 255))

    def poke(self, disk: str, *clusters: int) -> None:
        """Write them as the guest's device would, without a guest. QEMU has answered when it returns."""
        for cluster in clusters:
            fill = self.dice.randrange(1, 255)
            where = self.images[disk], self.formats.get(disk, "raw")
            device_write(self.qmp, f"{disk}-dev", where, fill, cluster * CLUSTER, CLUSTER)

    # -- backups --------------------------------------------------------------------------------------------------

    def back_up(self, kind: str = "incremental", source: str = "", *options: str) -> dict[str, dict[str, Any]]:
        """A backup; its disks by name."""
        (record,) = self.incbak(
            "--json", kind, source or f"qmp:{self.guest.monitor}", "--name", "vm", *options
        ).objects()
        return {d["name"].removesuffix("-dev"): d for d in record["disks"]}

    def next_reads(self, source: str = "", *options: str) -> dict[str, tuple[str | None, int]]:
        """An incremental that restores to what the images are now; reason and clusters read of each disk."""
        made = self.back_up("incremental", source, *options)
        self.restores(made)
        return {name: facts(disk) for name, disk in made.items()}

    def restores(self, names: Sequence[str] | dict[str, Any]) -> None:
        """The latest backup of these disks is what the images are now: nothing writes."""
        out = self.root / "out"
        out.mkdir(exist_ok=True)
        self.incbak("-q", "restore", "latest", out, "--force")
        for name in names:
            image = self.images[name]
            with image.open("rb") as f:
                os.fsync(f)
            restored = content_of(out / f"{name}-dev.raw")
            assert differing(restored, content_of(self.backing.get(name, image))) == [], name

    def files(self) -> dict[str, str]:
        """State of the bitmap files, the newest of each disk last."""
        found = self.incbak("--json", "bitmap", "list").objects()
        return {f["disk"].removesuffix("-dev"): f"{f['state']} {f['reason'] or ''}".strip() for f in found}


def facts(made: dict[str, Any]) -> tuple[str | None, int]:
    """Why it was read whole, and clusters read, of one disk of a backup."""
    return made["reason"], made["read"] // CLUSTER

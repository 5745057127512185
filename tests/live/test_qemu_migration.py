"""A live migration beside a backup: the guest runs somewhere, always, and no backup holds what came later."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kit.cli import Incbak, content, differing
from tests.kit.guest import accelerator, need_guest
from tests.kit.live import backup_jobs, eventually, ours_in
from tests.kit.qmp import Qmp
from tests.kit.serve import raw_image

pytestmark = pytest.mark.kvm
SIZE = 8 << 20


class Host:
    """One of two QEMUs on one raw image; no guest is booted, but its processors run."""

    def __init__(self, root: Path, name: str, image: Path, locking: str, *arguments: str) -> None:
        self.monitor, truth = root / f"{name}.qmp", root / f"{name}.truth"
        file = f"file.driver=file,file.filename={image},file.locking={locking}"
        command = ["qemu-system-x86_64", "-accel", accelerator(), "-m", "64", "-nodefaults", "-display", "none"]
        command += ["-blockdev", f"driver=raw,node-name=d,{file}", "-device", "virtio-blk-pci,drive=d,id=v"]
        for socket in (self.monitor, truth):
            command += ["-qmp", f"unix:{socket},server=on,wait=off"]
        self.process = subprocess.Popen([*command, *arguments], stdin=subprocess.DEVNULL)
        self.qmp = Qmp(truth)

    def status(self) -> str:
        """The run state; the destination of a migration that fails ends."""
        try:
            return str(self.qmp("query-status")["status"])
        except (ConnectionError, BrokenPipeError):
            return "gone"

    def migration(self) -> str:
        return str(self.qmp("query-migrate").get("status", ""))


class Pair:
    """The VM on its host, and where it may go."""

    def __init__(self, root: Path, locking: str) -> None:
        self.incbak, self.uri = Incbak(root), f"unix:{root}/migration"
        self.incbak("init")
        self.image = raw_image(root / "a.raw", SIZE, b"at the point in time" * 400_000)
        self.here = Host(root, "here", self.image, locking)
        self.there = Host(root, "there", self.image, locking, "-incoming", self.uri)

    def start(self, host: Host, *options: str) -> subprocess.Popen[str]:
        """Begin a full; return when its job copies."""
        process = self.incbak.popen("full", f"qmp:{host.monitor}", "--name", "vm", "--speed-limit", "2M", *options)
        eventually(lambda: backup_jobs(host.qmp), 20, "a job")
        return process

    def runs_somewhere(self) -> bool:
        return [host.status() for host in (self.here, self.there)].count("running") == 1


@pytest.fixture(params=["auto", "off"])
def pair(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Pair]:
    """With locks, and as on storage without them, where nothing keeps the destination out."""
    need_guest()
    made = Pair(tmp_path, request.param)
    yield made
    for host in (made.here, made.there):
        host.process.kill()
        host.process.wait()
        host.qmp.close()


def test_a_migration_that_is_quick_fails_or_the_backup_does(pair: Pair) -> None:
    """As beside a backup job of QEMU's own."""
    process = pair.start(pair.here)
    pair.here.qmp("migrate", 20, uri=pair.uri)
    eventually(lambda: pair.here.migration() in ("completed", "failed"), 30, "the end of the migration")
    eventually(pair.runs_somewhere, 5, "the guest runs on one host")
    _, err = process.communicate(timeout=60)
    assert process.returncode in (0, 6), err
    assert ours_in(pair.here) == []  # type: ignore[arg-type]
    if process.returncode == 0:
        assert differing(pair.incbak.restored(disk="v"), content(pair.image)) == []
    else:
        assert pair.incbak.list() == []
    if pair.here.status() == "running":
        pair.incbak("full", f"qmp:{pair.here.monitor}", "--name", "vm")


def test_a_migration_wins_and_the_vm_is_backed_up_only_where_it_runs(pair: Pair) -> None:
    refused = _full(pair, pair.there)
    assert (refused.code, "in state inmigrate" in refused.err) == (6, True), refused.err
    process = pair.start(pair.here, "--speed-limit", "64K")  # by itself it would take two minutes
    pair.here.qmp("migrate-set-parameters", 20, max_bandwidth=20_000)
    pair.here.qmp("migrate", 20, uri=pair.uri)
    try:
        _, err = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 6, err
    assert "Traceback" not in err
    assert pair.incbak.list() == []
    assert pair.here.migration() == "active"
    assert ours_in(pair.here) == []  # type: ignore[arg-type]
    refused = _full(pair, pair.here)
    assert (refused.code, "while it is being migrated (active)" in refused.err) == (6, True), refused.err
    pair.here.qmp("migrate-set-parameters", 20, max_bandwidth=1 << 30)
    eventually(lambda: pair.there.status() == "running", 30, "the guest runs at its new host")
    refused = _full(pair, pair.here)
    assert (refused.code, "it has moved away" in refused.err) == (6, True), refused.err
    pair.incbak("full", f"qmp:{pair.there.monitor}", "--name", "vm")
    assert differing(pair.incbak.restored(disk="v"), content(pair.image)) == []
    assert (pair.here.status(), ours_in(pair.there)) == ("postmigrate", [])  # type: ignore[arg-type]


def _full(pair: Pair, host: Host) -> Any:
    return pair.incbak.run("full", f"qmp:{host.monitor}", "--name", "vm")

"""A backup of an image that is off never damages the image: what real QEMU leaves behind, and what it makes of it."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import select
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from incbak.backup.runner import Options, run
from incbak.disk import users
from incbak.engine import end_mark
from incbak.engine.base import DiskPlan
from incbak.engine.detect import Source, open_engine
from incbak.engine.image import ImageEngine
from incbak.engine.offline import OfflineEngine
from incbak.errors import DiskError, ImageInUseError
from incbak.reasons import Reason
from incbak.repo.repository import Repository
from tests.interop.test_storage_daemon import bitmaps, content, make, write
from tests.kit.cli import Incbak
from tests.kit.guest_targets import chain_of
from tests.kit.need import need

pytestmark = pytest.mark.qemu


@pytest.fixture(autouse=True)
def _tools() -> None:
    need("qemu-storage-daemon", "qemu-img", "qemu-io")


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def set_bits(path: Path, bits: int) -> None:
    """Set bits of the incompatible features."""
    with path.open("r+b") as f:
        f.seek(79)
        old = f.read(1)[0]
        f.seek(79)
        f.write(bytes([old | bits]))


def killed(path: Path, *commands: str) -> None:
    """Write with lazy refcounts, and die."""
    run = ["qemu-io", "-f", "qcow2", *(x for c in (*commands, "flush", "abort") for x in ("-c", c)), str(path)]
    assert subprocess.run(run, check=False, timeout=20, capture_output=True).returncode != 0


def test_an_image_whose_refcounts_are_stale_is_read_and_not_written(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "qcow2", "-o", "lazy_refcounts=on")
    killed(image, "write -P 1 0 1M", "write -P 2 4M 64k")
    before = digest(image)
    chain = chain_of(str(image), tmp_path)
    first = chain.full()
    assert digest(image) == before
    assert first.images["disk0"][: 1 << 20] == b"\1" * (1 << 20)
    assert first.images["disk0"] == content(image)
    (note,) = first.description.notes
    assert "dirty bit" in note
    assert f"qemu-img check -r all {image}" in note
    assert chain.incremental().reasons == {"disk0": Reason.BITMAP_MISSING}
    assert digest(image) == before


def test_a_dirty_image_with_bitmaps_is_not_cleaned_up_either(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    chain = chain_of(str(image), tmp_path)
    chain.full()
    stray = chain.name("deadbeef")
    subprocess.run(["qemu-img", "bitmap", "--add", str(image), stray], check=True, timeout=20)
    set_bits(image, 1)
    before = digest(image)
    chain.incremental()
    assert digest(image) == before


def test_a_repaired_image_has_bitmaps_again(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2", "qcow2", "-o", "lazy_refcounts=on")
    killed(image, "write -P 1 0 1M")
    chain = chain_of(str(image), tmp_path)
    chain.full()
    subprocess.run(["qemu-img", "check", "-q", "-r", "all", str(image)], check=True, timeout=20)
    chain.incremental()
    assert chain.incremental().copied == {"disk0": 0}


def test_a_corrupt_image_is_refused_unread(tmp_path: Path) -> None:
    image = make(tmp_path / "disk.qcow2")
    set_bits(image, 2)
    before = digest(image)
    with pytest.raises(DiskError, match="corrupt bit") as caught:
        chain_of(str(image), tmp_path).full()
    assert f"qemu-img check -r all {image}" in caught.value.hint
    assert digest(image) == before


def test_a_backing_file_that_is_corrupt_is_refused_unread(tmp_path: Path) -> None:
    base = make(tmp_path / "base.qcow2")
    image = make(tmp_path / "disk.qcow2", "qcow2", "-b", str(base), "-F", "qcow2")
    set_bits(base, 2)
    with pytest.raises(DiskError, match=f"{base} is damaged"):
        chain_of(str(image), tmp_path, allow_backing=[base]).full()


def before_commit(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Do ``act`` when the copy is complete."""
    commit = OfflineEngine.commit

    async def acting(self: OfflineEngine, plans: Sequence[DiskPlan]) -> None:
        act()
        await commit(self, plans)

    monkeypatch.setattr(OfflineEngine, "commit", acting)


def test_an_image_that_became_dirty_during_the_copy_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    image = make(tmp_path / "disk.qcow2")
    before_commit(monkeypatch, lambda: set_bits(image, 1))
    with pytest.raises(DiskError, match=r"nothing is written to image .*dirty bit"):
        chain_of(str(image), tmp_path).full()
    assert b"incbak-" not in image.read_bytes()


def test_an_image_that_was_shrunk_and_has_its_size_again(tmp_path: Path) -> None:
    """qemu-img cuts the bitmaps, and marks nothing of what comes back, which is zero."""
    image = make(tmp_path / "disk.qcow2", size=4 << 20)
    write(image, "write -P 1 0 4M")
    incbak = Incbak(tmp_path)
    incbak("init")
    incbak("full", image)
    for size in ("2M", "4M"):
        subprocess.run(["qemu-img", "resize", "-q", "--shrink", image, size], check=True, timeout=20)
    for reason in ("resized", None):
        incbak("incremental", image)
        assert incbak.list()[-1]["disks"][0]["reason"] == reason
        incbak("restore", "latest", tmp_path / "out.raw", "--force")
        assert (tmp_path / "out.raw").read_bytes() == content(image)


def test_an_end_mark_that_cannot_be_made_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its bit it would say each time that the disk was cut."""

    async def writes_nothing(*_: object) -> None: ...

    monkeypatch.setattr(end_mark, "_mirror", writes_nothing)
    image = make(tmp_path / "disk.qcow2")
    chain = chain_of(str(image), tmp_path)
    chain.full()
    info = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, timeout=20, capture_output=True)
    stored = json.loads(info.stdout)["format-specific"]["data"]["bitmaps"]
    assert [b["name"] for b in stored] == list(bitmaps(image))


def test_an_image_that_was_written_during_the_copy_is_not_written(tmp_path: Path, monkeypatch: Any) -> None:
    image = make(tmp_path / "disk.qcow2")
    before_commit(monkeypatch, lambda: os.utime(image))
    with pytest.raises(DiskError, match="another process has changed it"):
        chain_of(str(image), tmp_path).full()
    assert bitmaps(image) == {}


@pytest.mark.parametrize("which", ["d.raw", "base.raw", "base-d.raw"])
def test_what_belongs_to_an_image_and_was_written_during_the_copy(tmp_path: Path, monkeypatch: Any, which: str) -> None:
    """Data file, backing file and its data file."""
    subprocess.run(["truncate", "-s", "8M", tmp_path / "base.raw"], check=True)
    base = make(
        tmp_path / "base.qcow2", "qcow2", "-o", f"data_file={tmp_path}/base-d.raw,backing_file=base.raw,backing_fmt=raw"
    )
    options = f"data_file={tmp_path}/d.raw,backing_file={base.name},backing_fmt=qcow2"
    image = make(tmp_path / "disk.qcow2", "qcow2", "-o", options)
    before_commit(monkeypatch, lambda: os.utime(tmp_path / which))
    with pytest.raises(DiskError, match="another process has changed it"):
        chain_of(str(image), tmp_path).full()
    assert bitmaps(image) == {}


def test_a_bitmap_beside_an_external_data_file(tmp_path: Path) -> None:
    options = f"data_file={tmp_path}/d.raw,data_file_raw=on"
    image = make(tmp_path / "disk.qcow2", "qcow2", "-o", options)
    write(image, "write -P 1 0 1M")
    chain = chain_of(str(image), tmp_path)
    chain.full()
    write(image, "write -P 2 1M 64k")
    second = chain.incremental()
    assert second.copied == {"disk0": 65536}
    assert second.images["disk0"] == content(image)
    assert set(bitmaps(image)) == {chain.name("00000002")}


@contextmanager
def unlocked(image: Path, form: str = "qcow2", *, read_only: bool = False) -> Iterator[int]:
    """A QEMU that has the image open and takes no locks, as Proxmox VE's; its process id."""
    file = {"driver": "file", "filename": str(image), "locking": "off"}
    node = {"driver": form, "node-name": "web", "read-only": read_only, "file": file}
    pid_file = image.with_suffix(".pid")
    command = ["qemu-storage-daemon", "--blockdev", json.dumps(node), "--daemonize", "--pidfile", str(pid_file)]
    subprocess.run(command, check=True, timeout=20)
    pid = int(pid_file.read_text())
    try:
        yield pid
    finally:
        end = os.pidfd_open(pid)
        os.kill(pid, signal.SIGTERM)
        select.select([end], [], [], 20)
        os.close(end)


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_an_image_that_a_qemu_without_locks_writes_is_refused(tmp_path: Path, form: str) -> None:
    image = make(tmp_path / f"disk.{form}", form)
    before = digest(image)
    with unlocked(image, form) as pid, pytest.raises(ImageInUseError, match=f"process {pid} .qemu-storage") as caught:
        chain_of(str(image), tmp_path).full()
    assert "monitor (qmp:PATH)" in caught.value.hint
    assert digest(image) == before


def test_an_image_that_is_read_elsewhere_is_copied_and_not_written(tmp_path: Path) -> None:
    image = make(tmp_path / "template.qcow2")
    chain = chain_of(str(image), tmp_path)
    with unlocked(image, read_only=True) as pid:
        before = digest(image)
        (note,) = chain.full().description.notes
        assert f"no bitmap is stored in image {image}: it is open elsewhere: process {pid}" in note
        assert digest(image) == before
    chain.incremental()
    assert chain.incremental().copied == {"disk0": 0}


def test_a_reader_that_comes_during_the_copy_keeps_bitmaps_out(tmp_path: Path, monkeypatch: Any) -> None:
    image = make(tmp_path / "disk.qcow2")
    with ExitStack() as stack:
        before_commit(monkeypatch, lambda: stack.enter_context(unlocked(image, read_only=True)))
        with pytest.raises(DiskError, match=r"nothing is written to image .* it is open elsewhere"):
            chain_of(str(image), tmp_path).full()
        assert bitmaps(image) == {}


def test_where_not_all_processes_are_seen_nothing_is_written(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(users, "_sees_all_namespaces", lambda: False)
    image = make(tmp_path / "disk.qcow2")
    (note,) = chain_of(str(image), tmp_path).full().description.notes
    assert "not all processes" in note
    assert bitmaps(image) == {}


@pytest.mark.parametrize("form", ["qcow2", "raw"])
def test_a_writer_that_comes_during_the_copy_fails_the_backup(tmp_path: Path, monkeypatch: Any, form: str) -> None:
    """Before the record is committed: what was read is not the disk at one instant."""
    image, incbak = make(tmp_path / f"disk.{form}", form), Incbak(tmp_path)
    incbak("init")
    engine = OfflineEngine if form == "qcow2" else ImageEngine
    confirm = engine.confirm

    async def back_up() -> None:
        opened = await open_engine(Source(str(image), tmp_path / "state"))
        try:
            with pytest.raises(ImageInUseError, match="is in use: process"):
                await run(Repository.open(incbak.repo), opened, Options(incremental=False))
        finally:
            await opened.close()

    async def late(self: Any) -> None:
        with unlocked(image, form):
            await confirm(self)

    monkeypatch.setattr(engine, "confirm", late)
    asyncio.run(back_up())
    assert incbak.list() == []

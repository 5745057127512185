"""What tells the state of an image, and the order in which a VM is let go."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from incbak.bitmap.continuity import changed
from incbak.bitmap.store import BitmapStore
from incbak.disk.file import open_disk
from incbak.engine.base import EngineDisk
from incbak.engine.qemu_graph import Graph
from incbak.engine.qemu_storing import UNFLUSHED
from incbak.engine.session import Address
from incbak.errors import DiskError, LockedError
from incbak.reasons import Reason
from incbak.watch import disks, vm
from incbak.watch.claim import Claim
from incbak.watch.disks import Holder, Watched
from incbak.watch.loading import Outcome
from incbak.watch.vm import WatchOptions
from tests.unit.watch.fake import CLUSTER, FakeQemu, a_disk


@pytest.fixture
def disk(tmp_path: Path) -> Watched:
    return a_disk(tmp_path)


async def _locks(disk: Watched) -> None:
    await disks.lock_store(disk)


def test_an_image_is_watched_once_whatever_the_vm_is_called(
    disk: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INCBAK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(disks, "LOCK_SECONDS", 0)
    (tmp_path / "link").symlink_to(disk.image)
    store = BitmapStore(tmp_path / "elsewhere", "another", "sda")
    other = replace(disk, image=tmp_path / "link", store=store, claim=Claim())
    disk.store.unlock()
    asyncio.run(_locks(disk))
    with pytest.raises(LockedError, match="is watched by another"):
        asyncio.run(_locks(other))
    disks.unlock_stores([disk])
    asyncio.run(_locks(other))
    disks.unlock_stores([other])


def test_bitmaps_that_are_in_use_leave_the_image_to_others(
    disk: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INCBAK_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setattr(disks, "LOCK_SECONDS", 0)
    store = BitmapStore(disk.store.directory.parent.parent, disk.store.vm, disk.store.disk)
    with pytest.raises(LockedError, match="are in use"):
        asyncio.run(_locks(replace(disk, store=store)))
    other = Claim()
    other.take(disk.image)
    other.leave()


def test_any_later_write_shows(disk: Watched) -> None:
    """Also one that changes nothing that is sampled, right after: time stamps come from a clock that ticks."""
    for _ in range(20):
        with disk.image.open("r+b") as f:
            f.write(b"x")
        before = disk.settled()
        with disk.image.open("r+b") as f:
            f.write(b"x")
        assert disk.fingerprint() != before


@pytest.mark.parametrize(("ns", "grain"), [(0, 2 * 10**9), (123_456_789, 10**7)])
def test_a_clock_that_ticks(disk: Watched, monkeypatch: pytest.MonkeyPatch, ns: int, grain: int) -> None:
    """A write within the same tick has the same time: of whole seconds, perhaps two; else of some milliseconds."""
    disk = replace(disk, ignore_ctime=True)  # nobody can set it
    written = 1_700_000_000 * 10**9 + ns
    os.utime(disk.image, ns=(written, written))
    times = iter([written, written + grain - 1, written + 2 * grain + 1])
    monkeypatch.setattr(disks.time, "time_ns", lambda: next(times))
    assert disk.settled().mtime_ns == written
    assert list(times) == []


def test_an_image_that_is_written_all_the_time_is_given_up(disk: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "_SETTLE_SECONDS", 0.05)
    disk = replace(disk, ignore_ctime=True)
    monkeypatch.setattr(disks.time, "time_ns", lambda: disk.image.stat().st_mtime_ns)
    with pytest.raises(DiskError, match="keeps writing"):
        disk.settled()


def test_a_clock_that_was_set_back_is_not_waited_for(disk: Watched) -> None:
    future = 4_000_000_000 * 10**9 + 1
    os.utime(disk.image, ns=(future, future))
    assert disk.settled().mtime_ns == future


def test_an_image_of_another_format_has_the_size_of_its_disk(tmp_path: Path) -> None:
    """Its own size is in the sample: so it shows when it changes."""
    disk = a_disk(tmp_path, raw=False)
    before = disk.fingerprint()
    with disk.image.open("r+b") as f:
        f.truncate(disk.size + 512)
    os.utime(disk.image, ns=(1, before.mtime_ns))
    after = disk.fingerprint()
    assert (before.size, after.size, before.sample == after.sample) == (disk.size, disk.size, False)


def _written(image: Path) -> None:
    with image.open("r+b") as f:
        f.seek(CLUSTER + 5000)  # no block of the sample
        f.write(b"x")


def test_an_image_that_was_dated_back_shows(disk: Watched) -> None:
    """Also when its owner or mode was changed with it; what only its manager did does not tell itself apart."""
    before, times = disk.settled(), disk.image.stat()
    _written(disk.image)
    os.utime(disk.image, ns=(times.st_atime_ns, times.st_mtime_ns))
    disk.image.chmod(0o600)
    assert changed(before, disk.seen()) is Reason.UNPROVEN


def test_an_image_whose_ctime_its_manager_moves(disk: Watched) -> None:
    """Its owner has said so: a new mode or owner costs nothing, a write still shows."""
    disk = replace(disk, ignore_ctime=True)
    before = disk.settled()
    os.chown(disk.image, os.getuid(), os.getgid())
    disk.image.chmod(0o600)
    assert (changed(before, disk.seen()), before == disk.fingerprint()) == (None, True)
    _written(disk.image)
    assert changed(before, disk.seen()) is Reason.DISK_CHANGED


def test_who_has_the_image_open(disk: Watched) -> None:
    """Its process tells; else its locks do; else nobody."""
    assert "nothing tells" in Holder(None, [disk]).why_not_told()
    assert "nothing tells" in Holder(1 << 22, [disk]).why_not_told()
    with disk.image.open("rb"):
        ours = Holder(os.getpid(), [disk])
        assert (ours.pid, ours.why_not_told()) == (os.getpid(), "")
        assert asyncio.run(ours.gone([disk], 0.05)) is False
    assert asyncio.run(ours.gone([disk], 0.05)) is True
    writer = open_disk(disk.image)
    theirs = Holder(None, [disk])
    assert theirs.why_not_told() == ""
    assert asyncio.run(theirs.gone([disk], 0.05)) is False
    writer.close()
    assert asyncio.run(theirs.gone([disk], 0.05)) is True


def test_the_vm_is_let_go_last(disk: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bitmaps are there, and a shutdown would pause it."""
    qemu, told = FakeQemu(), []
    options = WatchOptions(Address(path="/x"), "vm", Path("/x"), lambda e, *_: told.append(e), start=True)
    attached = vm._Attached(qemu.session, options, asyncio.Event())
    attached._disks = {"vda": disk}

    async def load(*_: Any) -> list[Outcome]:
        qemu.done.append("load")
        return [Outcome("vda")]

    monkeypatch.setattr(vm, "load", load)
    asyncio.run(attached._attach())
    assert qemu.done[-3:] == ["load", "set-action", "cont"]
    assert told == ["ready"]


@pytest.mark.parametrize(
    ("status", "announced", "keep", "down"),
    [
        ("running", True, False, False),
        ("shutdown", False, True, True),
        ("guest-panicked", True, False, True),
        ("guest-panicked", True, True, False),
        ("guest-panicked", False, False, False),
    ],
)
def test_when_a_vm_has_ended(status: str, announced: bool, keep: bool, down: bool) -> None:
    """A panic that was before us is somebody's who wants to look at it."""
    options = WatchOptions(Address(path="/x"), "vm", Path("/x"), lambda *_: None, keep_panicked=keep)
    attached = vm._Attached(FakeQemu().session, options, asyncio.Event())
    attached._announced = announced
    assert attached._is_down(status) is down


@pytest.mark.parametrize("edges", [{"a": "a"}, {"a": "b", "b": "a"}, {"a": "gone"}])
def test_a_graph_without_an_end_has_no_image(edges: dict[str, str]) -> None:
    nodes = {name: {"node-name": name, "drv": "throttle"} for name in "ab"}
    graph = Graph(nodes, {(parent, "file"): child for parent, child in edges.items()})
    assert "not one file or block device" in str(disks._image_of(EngineDisk("vda", 1, "a"), graph))


def test_an_image_that_could_store_its_bitmaps_is_not_watched() -> None:
    graph = Graph({"a": {"drv": "qcow2"}, "f": {"drv": "file", "file": "/srv/a"}}, {("a", "file"): "f"})
    assert disks._image_of(EngineDisk("vda", 1, "a"), graph) == Path("/srv/a")
    assert "stores its bitmaps" in str(disks._image_of(EngineDisk("vda", 1, "a", can_persist=True), graph))
    assert "cache=unsafe" in str(disks._image_of(EngineDisk("vda", 1, "a", extra={UNFLUSHED: True}), graph))

"""Loading: whatever the guest does meanwhile, QEMU's bitmap lacks no bit, or is not there."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any, cast

import pytest

from incbak.bitmap.file import Bitmap
from incbak.bitmap.saved import write_clean
from incbak.engine.session import Session
from incbak.fingerprint import Beat
from incbak.reasons import Reason
from incbak.watch import loading
from incbak.watch.disks import Watched
from incbak.watch.loading import distrust, load, why_written
from tests.unit.watch.fake import CLUSTER, NAME, SIZE, FakeQemu, a_disk, bits_of

SAVED = {3, 40}


@pytest.fixture
def disk(tmp_path: Path) -> Watched:
    made = a_disk(tmp_path)
    write_clean(made.store, NAME, CLUSTER, bits_of(SAVED), made.fingerprint())
    return made


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    made = FakeQemu()
    monkeypatch.setattr(loading, "private_server", made.server)
    return made


def test_what_was_saved_is_in_qemu(qemu: FakeQemu, disk: Watched) -> None:
    (outcome,) = asyncio.run(load(qemu.session, [disk]))
    assert (outcome.kept, outcome.lost, outcome.detail) == ([NAME], {}, "")
    assert qemu.bitmaps == {NAME: SAVED}
    assert disk.store.open(NAME, disk.fingerprint()) is Reason.UNSAVED


def test_a_write_at_any_moment_is_in_the_bitmap_or_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody gives ``cont`` while the bitmaps are loaded."""
    moment, kept, lost = 0, 0, 0
    while True:
        (tmp_path / str(moment)).mkdir()
        disk, qemu = a_disk(tmp_path / str(moment)), FakeQemu()
        write_clean(disk.store, NAME, CLUSTER, bits_of(SAVED), disk.fingerprint())
        monkeypatch.setattr(loading, "private_server", qemu.server)
        qemu.at[moment] = lambda qemu=qemu: qemu.write(7)  # type: ignore[misc]
        (outcome,) = asyncio.run(load(qemu.session, [disk]))
        assert isinstance(disk.store.open(NAME, disk.fingerprint()), Reason)
        if qemu.at:
            break
        if outcome.kept:
            assert qemu.bitmaps == {NAME: SAVED | {7}}, moment
        else:
            assert outcome.lost == {NAME: Reason.UNSAVED}
            assert qemu.bitmaps == {}, moment
        kept, lost, moment = kept + bool(outcome.kept), lost + bool(outcome.lost), moment + 1
    assert min(kept, lost) > 1


def test_no_file_is_believed_once_it_was_read(qemu: FakeQemu, disk: Watched) -> None:
    """Durably so, before the first command to QEMU that follows."""
    seen: list[Any] = []
    qemu.at[0] = lambda: seen.append(disk.store.open(NAME, disk.fingerprint()))
    asyncio.run(load(qemu.session, [disk]))
    assert seen == [Reason.UNSAVED]


def test_a_sound_file_of_another_kind_is_not_loaded(qemu: FakeQemu, disk: Watched) -> None:
    """A bitmap that was off, and one that is none of a backup: none counts when the guest has run."""
    disk.store.remove(NAME)
    for name, enabled in {NAME: False, "theirs": True}.items():
        disk.store.create(name, SIZE, CLUSTER, disk.fingerprint(), enabled=enabled).close(disk.fingerprint())
    (outcome,) = asyncio.run(load(qemu.session, [disk]))
    assert outcome.lost == {NAME: Reason.BITMAP_DISABLED, "theirs": Reason.UNSAVED}
    assert qemu.bitmaps == {}


def marked(disk: Watched) -> Bitmap:
    """One whose owner marked a cluster and died."""
    disk.store.remove(NAME)
    bitmap = disk.store.create(NAME, SIZE, CLUSTER, disk.fingerprint())
    bitmap.mark(5 * CLUSTER, 1)
    bitmap.heartbeat(Beat(time.time_ns()))
    bitmap.close(None)
    return bitmap


def test_what_a_killed_serve_has_left_is_loaded(qemu: FakeQemu, disk: Watched) -> None:
    marked(disk)
    asyncio.run(load(qemu.session, [disk]))
    assert qemu.bitmaps == {NAME: {5}}


def test_what_a_power_cut_has_left_is_not(
    qemu: FakeQemu, disk: Watched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marked(disk)
    (tmp_path / "boot").write_text("00000000-0000-0000-0000-000000000001\n")
    monkeypatch.setenv("INCBAK_BOOT_ID_FILE", str(tmp_path / "boot"))
    (outcome,) = asyncio.run(load(qemu.session, [disk]))
    assert (qemu.bitmaps, outcome.lost) == ({}, {NAME: Reason.UNCLEAN_SHUTDOWN})


def test_what_qemu_has_already_is_not_lost(qemu: FakeQemu, disk: Watched) -> None:
    """A dead watch has loaded it, or a backup has made it; one that does not record is of no use."""
    qemu.have(NAME, {1})
    (outcome,) = [asyncio.run(distrust(qemu.session, disk, Reason.UNWATCHED))]
    assert (outcome.kept, outcome.lost) == ([NAME], {})
    qemu.have(NAME, {1}, recording=False)
    outcome = asyncio.run(distrust(qemu.session, disk, Reason.UNWATCHED))
    assert (outcome.kept, outcome.lost) == ([], {NAME: Reason.UNWATCHED})


class Stats(FakeQemu):
    """With the figures that are given."""

    def __init__(self, device: dict[str, int], node: dict[str, int] | None, status: str = "prelaunch") -> None:
        super().__init__(status)
        self.device, self.node = device, node

    def _query_blockstats(self, query_nodes: bool = False) -> list[dict[str, Any]]:
        if not query_nodes:
            return [{"stats": self.device}]
        return [{"node-name": "vda", "stats": self.node}] if self.node is not None else []


@pytest.mark.parametrize(
    ("qemu", "said"),
    [
        (Stats({}, {"wr_highest_offset": 0}), ""),
        (Stats({}, {"wr_highest_offset": 4096}), "vda has been written"),
        (Stats({}, None), "vda has been written"),
        (Stats({"wr_operations": 1}, {}), "it has written, and was reset"),
        (Stats({"unmap_operations": 1}, {}), "it has written, and was reset"),
        (Stats({}, {}, "inmigrate"), "it is inmigrate"),
        (Stats({}, {}, "paused"), "it is paused"),
    ],
)
def test_what_shows_that_a_disk_was_written(qemu: Stats, said: str, disk: Watched) -> None:
    why = asyncio.run(why_written(cast(Session, qemu), [disk]))
    assert said in why
    assert bool(said) == bool(why)

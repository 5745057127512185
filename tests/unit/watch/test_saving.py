"""Saving: a file has its flag only if it has every bit, and the image is the one that the guest has left."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from incbak.bitmap.file import Bitmap
from incbak.bitmap.saved import write_clean
from incbak.disk.file import open_disk
from incbak.reasons import Reason
from incbak.watch import saving
from incbak.watch.disks import Watched
from incbak.watch.loading import Outcome
from incbak.watch.saving import RanAgainError, save_and_quit
from tests.unit.watch.fake import CLUSTER, NAME, FakeQemu, a_disk, clusters_in

DIRTY = {3, 40}


@pytest.fixture
def disk(tmp_path: Path) -> Watched:
    return a_disk(tmp_path)


@pytest.fixture
def qemu(monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    return shut_down(monkeypatch)


def shut_down(monkeypatch: pytest.MonkeyPatch) -> FakeQemu:
    made = FakeQemu("shutdown")
    made.have(NAME, DIRTY)
    monkeypatch.setattr(saving, "private_server", made.server)
    monkeypatch.setattr(saving.Holder, "why_not_told", lambda self: "")
    monkeypatch.setattr(saving, "_LETTING_GO_SECONDS", 0.2)
    return made


def save(qemu: FakeQemu, disk: Watched) -> Outcome:
    (outcome,) = asyncio.run(save_and_quit(qemu.session, [disk], qemu.listener))
    return outcome


def found(disk: Watched) -> set[int] | Reason | None:
    """What the file has that may be believed, or why not."""
    if not disk.store.path(NAME).exists():
        return None
    bitmap = disk.store.open(NAME, disk.fingerprint())
    if isinstance(bitmap, Bitmap):
        dirty = clusters_in(bitmap.snapshot())
        bitmap.close(None)
        return dirty
    return bitmap


def touch(disk: Watched) -> None:
    """Somebody writes to the image."""
    with disk.image.open("r+b") as f:
        f.write(b"x")


def test_what_qemu_has_is_in_the_file(qemu: FakeQemu, disk: Watched) -> None:
    disk.store.create("incbak-00000001-00000001", disk.size, CLUSTER, disk.fingerprint()).close(None)
    outcome = save(qemu, disk)
    assert (outcome.kept, outcome.detail, found(disk)) == ([NAME], "", DIRTY)
    assert disk.store.names() == [NAME]
    assert qemu.done[-1] == "quit"


def test_it_is_not_ended_when_it_runs_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reset and resumed at any moment before the last look, the VM goes on; nothing is saved without what it writes."""

    def again(qemu: FakeQemu) -> None:
        qemu.ran.append("RESUME")
        qemu.write(7)

    moment, went_on = 0, 0
    while True:
        (tmp_path / str(moment)).mkdir()
        disk, qemu = a_disk(tmp_path / str(moment)), shut_down(monkeypatch)
        qemu.at[moment] = lambda qemu=qemu: again(qemu)  # type: ignore[misc]
        try:
            outcome = save(qemu, disk)
        except RanAgainError:
            assert "quit" not in qemu.done
            went_on += 1
        else:
            if qemu.at:
                break
            assert outcome.detail == "the VM was resumed while it was ended"
            assert qemu.done[moment] == "quit"
        assert found(disk) is None
        moment += 1
    assert went_on == moment - 1 > 4


def test_a_short_shutdown_in_between_is_seen(qemu: FakeQemu, disk: Watched) -> None:
    """It ran, and is down again when it is looked at: the events tell."""
    qemu.at[3] = lambda: qemu.ran.append("RESET")
    with pytest.raises(RanAgainError):
        save(qemu, disk)
    assert "quit" not in qemu.done


def test_bits_that_did_not_come_are_missed(qemu: FakeQemu, disk: Watched) -> None:
    """QEMU counts more than was read."""
    qemu.short = True
    assert save(qemu, disk).detail == "the bitmaps changed while they were read"
    assert found(disk) is None
    assert qemu.done[-1] == "quit"


def test_a_backup_that_ends_meanwhile_is_waited_for(qemu: FakeQemu, disk: Watched) -> None:
    newer = "incbak-00000001-00000003"

    def end() -> None:
        qemu.have(newer, {9})
        qemu._block_dirty_bitmap_remove("vda", NAME)

    qemu.at[2] = end
    assert save(qemu, disk).kept == [newer]


@pytest.mark.parametrize("info", [{"recording": False}, {"busy": True}, {"inconsistent": True}])
def test_what_an_incremental_would_not_believe_is_not_saved(
    qemu: FakeQemu, disk: Watched, info: dict[str, bool]
) -> None:
    qemu.have(NAME, DIRTY, **info)
    qemu.have("theirs", DIRTY)
    assert save(qemu, disk).kept == []
    assert disk.store.names() == []


def test_nothing_is_saved_while_the_image_is_open(qemu: FakeQemu, disk: Watched) -> None:
    """The monitor has gone, but the process still has the image."""
    holds = "import sys, time; f = open(sys.argv[1]); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", holds, disk.image], stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        qemu.pid = process.pid
        outcome = save(qemu, disk)
        process.kill()
    assert outcome.detail == "QEMU has not let go of the images"
    assert found(disk) is None


def test_an_image_that_nothing_tells_of_is_not_saved(
    qemu: FakeQemu, disk: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(saving, "private_server", qemu.server)
    assert "nothing tells when QEMU has closed vda" in save(qemu, disk).detail
    assert found(disk) is None


def test_somebody_writes_while_it_is_ended(qemu: FakeQemu, disk: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """A raw image must be as it was while QEMU was paused."""
    original = saving._quit

    async def quit_(session: object) -> str:
        touch(disk)
        return await original(qemu.session)

    monkeypatch.setattr(saving, "_quit", quit_)
    assert "somebody else has written to" in save(qemu, disk).detail
    assert found(disk) is None


@pytest.mark.parametrize("raw", [True, False])
def test_another_image_has_taken_the_place_of_the_one_that_was_watched(
    tmp_path: Path, qemu: FakeQemu, raw: bool
) -> None:
    """And the node has it (``blockdev-reopen``) since before the guest shut down."""
    disk = a_disk(tmp_path, raw=raw)
    other = disk.image.with_name("other")
    other.write_bytes(disk.image.read_bytes())
    other.rename(disk.image)
    outcome = save(qemu, disk)
    assert (outcome.detail, outcome.reason) == (
        f"{disk.image} is not the image that was watched",
        Reason.DISK_CHANGED,
    )
    assert found(disk) is None


def test_a_backup_that_still_runs_is_cancelled_first(
    qemu: FakeQemu, disk: Watched, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """QEMU 7.2 may hang when it is told to quit meanwhile. The jobs of others are theirs."""
    qemu.jobs = {"incbak-00000001-00000002-0": "running", "mirror": "running"}
    original, left = saving._quit, []

    async def quit_(session: object) -> str:
        left.extend(qemu.jobs)
        return await original(qemu.session)

    monkeypatch.setattr(saving, "_quit", quit_)
    assert save(qemu, disk).kept == [NAME]
    assert left == ["mirror"]
    assert "job incbak-00000001-00000002-0 of a backup was cancelled" in caplog.text


def test_somebody_writes_while_the_files_are(qemu: FakeQemu, disk: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files are made invalid, though the image alone would tell; that of a block device would not."""

    def written(*arguments: object) -> None:
        write_clean(*arguments)  # type: ignore[arg-type]
        touch(disk)

    monkeypatch.setattr(saving, "write_clean", written)
    assert "too early" in save(qemu, disk).detail
    slot = disk.store.open(NAME, disk.fingerprint())
    assert slot is Reason.DISK_CHANGED
    assert b"disk-changed" in disk.store.path(NAME).read_bytes()[:1024]


@pytest.mark.parametrize("raw", [True, False])
def test_the_vm_is_started_again_at_once(
    tmp_path: Path, qemu: FakeQemu, monkeypatch: pytest.MonkeyPatch, raw: bool
) -> None:
    """A raw file shows whether the next QEMU has written; the close of another format hides it."""
    disk = a_disk(tmp_path, raw=raw)
    code = "import sys; from pathlib import Path; from incbak.disk.file import open_disk\n"
    code += "disk = open_disk(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    pipes = {"stdout": subprocess.PIPE, "stdin": subprocess.PIPE}

    async def gone(self: object, *_: object) -> bool:
        return True

    monkeypatch.setattr(saving.Holder, "gone", gone)
    with subprocess.Popen([sys.executable, "-c", code, disk.image], **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        outcome = save(qemu, disk)
        process.stdin.close()
    assert found(disk) == (DIRTY if raw else None)
    assert outcome.detail == ("" if raw else f"somebody else has {disk.image} open for writing")


def test_the_image_is_on_its_storage_before_a_file_says_so(
    qemu: FakeQemu, disk: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    monkeypatch.setattr(Watched, "sync", lambda self: done.append("sync"))
    monkeypatch.setattr(saving, "write_clean", lambda *_: done.append("file"))
    save(qemu, disk)
    assert done == ["sync", "file"]


def test_a_disk_that_cannot_be_synced_is_not_saved(
    qemu: FakeQemu, disk: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: Watched) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Watched, "sync", fail)
    assert "Input/output error" in save(qemu, disk).detail
    assert found(disk) is None


def test_the_lock_of_a_reader_is_no_writer(qemu: FakeQemu, disk: Watched) -> None:
    reader = open_disk(disk.image, read_only=True)
    try:
        assert save(qemu, disk).kept == [NAME]
    finally:
        reader.close()

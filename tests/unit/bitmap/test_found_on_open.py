"""The table of the package docstring, row by row: what is found on open, what it means, what is done."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from blake3 import blake3

from incbak import durable
from incbak.bitmap import format as fmt
from incbak.bitmap.disown import disown
from incbak.bitmap.file import Bitmap, Found, State
from incbak.bitmap.format import REGION, Flag, Slot
from incbak.bitmap.store import BitmapStore, get_dirty_blocks, invalidate, view, views
from incbak.errors import BitmapError, LockedError, UsageError
from incbak.extents import Extent
from incbak.fingerprint import Fingerprint
from incbak.reasons import Reason
from tests.unit.bitmap.scene import CLUSTER, NAME, SIZE, Scene, clusters, dirty, regions

BEFORE = ((4096, 4096), (REGION - 2048, 4096))
"""Written in the first session, which ends well: the regions 0 and 1."""
WRITES = ((2 * REGION + 5000, 70_000), (20 * CLUSTER, 8))
"""Written in the second: region 2, and 0 again."""

KILLED = {
    "bitmap.clear-first-slot": (Found.RECOVERED, ()),
    "bitmap.clear-second-slot": (Found.RECOVERED, ()),
    "bitmap.region-set": (Found.RECOVERED, (2,)),
    "bitmap.region-synced": (Found.RECOVERED, (2,)),
    "bitmap.close-bits": (Found.RECOVERED, (2,)),
    "bitmap.close-first-slot": (Found.CLEAN, (2,)),
    "bitmap.close-second-slot": (Found.CLEAN, (2,)),
}
"""Where the second session is killed: what is found in the same boot, and which further regions count as touched."""


def test_every_crash_point_of_the_bitmap_is_tried() -> None:
    """One that is added needs a row here."""
    names = {name for name in durable.POINTS if name.startswith("bitmap.")}
    assert names == set(KILLED)


def test_clean_shutdown(scene: Scene) -> None:
    """Flag set, digest and fingerprint match: used as it is."""
    scene.clean(*BEFORE, (SIZE - 4, 4))
    bitmap = scene.opened()
    assert (bitmap.found, bitmap.state) == (Found.CLEAN, State.CLEAN)
    assert dirty(bitmap) == clusters(*BEFORE, (SIZE - 4, 4))
    assert bitmap.count() == 3 * CLUSTER + SIZE % CLUSTER
    bitmap.close(scene.fingerprint())


@pytest.mark.parametrize("point", KILLED)
def test_killed_in_the_same_boot(scene: Scene, point: str) -> None:
    """faults rows 1, 2, 7: no write is lost, none is made up, and the disk need not be read."""
    scene.clean(*BEFORE)
    wrote = scene.session(WRITES, point)
    bitmap = scene.opened()
    assert bitmap.found is KILLED[point][0]
    assert dirty(bitmap) == clusters(*BEFORE, *wrote)
    bitmap.close(scene.fingerprint())
    again = scene.opened()
    assert again.found is Found.CLEAN
    assert dirty(again) == clusters(*BEFORE, *wrote)
    again.close(None)


@pytest.mark.parametrize("point", KILLED)
def test_host_lost(scene: Scene, point: str) -> None:
    """faults rows 17, 18: the fine bits are gone; all of each touched region is dirty, and nothing else."""
    scene.clean(*BEFORE)
    wrote = scene.session(WRITES, point)
    scene.reboot()
    if KILLED[point][0] is Found.CLEAN:
        bitmap = scene.opened()
        assert dirty(bitmap) == clusters(*BEFORE, *wrote)
    else:
        scene.poke(fmt.HEADER, bytes(SIZE // CLUSTER // 8))
        bitmap = scene.opened()
        assert bitmap.found is Found.COARSE
        assert dirty(bitmap) == regions(0, 1, *KILLED[point][1])
        assert clusters(*BEFORE, *wrote) <= dirty(bitmap)
    bitmap.close(None)


def test_a_session_that_ended_well_after_a_power_cut_is_clean(scene: Scene) -> None:
    """What the coarse map marked stays marked."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    bitmap.close(None)
    scene.reboot()
    scene.opened().close(scene.fingerprint())
    again = scene.opened()
    assert again.found is Found.CLEAN
    assert dirty(again) == regions(0, 1)
    again.close(None)


def test_a_power_cut_right_after_recovery_is_still_a_power_cut(scene: Scene) -> None:
    """The new owner's boot is in the header as soon as it has adopted the file, and not before the bits are there."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    bitmap.close(None)
    scene.reboot()
    scene.opened().close(None)
    assert scene.opened().found is Found.RECOVERED
    scene.reboot()
    bitmap = scene.opened()
    assert bitmap.found is Found.COARSE
    assert dirty(bitmap) == regions(0, 1)
    bitmap.close(None)


def test_a_bad_coarse_map_is_not_believed(scene: Scene) -> None:
    """Each byte is one of two values that differ in every bit; rot cannot turn one into the other unseen."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    bitmap.close(None)
    _start, coarse, _end = fmt.layout(bitmap.slot)
    scene.poke(coarse + 3, b"\0")
    assert scene.open() is Reason.COARSE_MAP
    scene.reboot()
    assert scene.open() is Reason.COARSE_MAP


@pytest.mark.parametrize("part", ["bits", "padding", "coarse map", "end"])
def test_rot_in_the_body_is_noticed(scene: Scene, part: str) -> None:
    """faults row 23: a bit that became 0, anywhere in the body."""
    scene.clean(*BEFORE)
    slot, _both = fmt.newest(scene.path.read_bytes())
    assert isinstance(slot, Slot)
    start, coarse, end = fmt.layout(slot)
    offset = {"bits": start, "padding": coarse - 1, "coarse map": coarse, "end": end - 1}[part]
    scene.poke(offset, bytes([scene.path.read_bytes()[offset] ^ 1]))
    assert scene.open() is Reason.DIGEST


def _newer(slot: Slot) -> bytes:
    raw = bytearray(fmt.encode(slot))
    raw[8] = fmt.VERSION + 1
    raw[-16:] = blake3(bytes(raw[:-16])).digest(length=16)
    return bytes(raw)


def test_a_newer_version_is_left_alone(scene: Scene) -> None:
    """faults row 83: refused, and not rewritten."""
    scene.clean(*BEFORE)
    slot, _both = fmt.newest(scene.path.read_bytes())
    assert isinstance(slot, Slot)
    scene.poke(0, _newer(slot) * 2)
    before = scene.path.read_bytes()
    assert scene.open() is Reason.FORMAT
    assert scene.path.read_bytes() == before


@pytest.mark.parametrize("which", [0, 1])
def test_clean_with_one_torn_slot_is_not_believed(scene: Scene, which: int) -> None:
    """faults row 20: at a clean end both slots are durable; one that is torn means rot, and the other may be older."""
    scene.clean(*BEFORE)
    scene.poke(which * fmt.SECTOR + 200, b"\xff\0\xff")
    assert scene.open() is Reason.HEADER


def test_unclean_with_a_torn_slot_is_recovered(scene: Scene) -> None:
    """faults row 20: the slot that was being written is torn, the older one says unclean as well."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    newest = bitmap.slot.sequence % 2
    bitmap.close(None)
    scene.poke(newest * fmt.SECTOR + 200, b"\xff\0\xff")
    found = scene.opened()
    assert found.found is Found.RECOVERED
    assert dirty(found) == clusters(*BEFORE)
    found.close(None)


def test_both_slots_torn(scene: Scene) -> None:
    scene.clean(*BEFORE)
    scene.poke(200, b"\xff\0\xff")
    scene.poke(712, b"\xff\0\xff")
    assert scene.open() is Reason.HEADER


@pytest.mark.parametrize("size", [0, 100, 4096, -1, 1])
def test_a_file_of_another_length(scene: Scene, size: int) -> None:
    """Cut, or grown, whatever the header says."""
    scene.clean(*BEFORE)
    length = scene.path.stat().st_size
    os.truncate(scene.path, size if size > 1 or size == 0 else length + size)
    assert scene.open() in (Reason.HEADER, Reason.FORMAT)


def _touch_image(scene: Scene) -> None:
    with scene.image.open("r+b") as f:
        f.seek(3 * REGION)
        f.write(b"x")
    later = scene.image.stat().st_mtime_ns + 10**9
    os.utime(scene.image, ns=(later, later))


def _replace_image(scene: Scene) -> None:
    copy = scene.image.with_name("copy")
    subprocess.run(["cp", "--sparse=always", "--preserve=timestamps", scene.image, copy], check=True)
    os.rename(copy, scene.image)


def _grow_image(scene: Scene) -> None:
    os.truncate(scene.image, SIZE + 4096)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_touch_image, Reason.DISK_CHANGED),
        (_replace_image, Reason.DISK_CHANGED),
        (_grow_image, Reason.RESIZED),
    ],
)
def test_the_disk_changed_while_nobody_tracked_it(scene: Scene, change: object, reason: Reason) -> None:
    """faults rows 8, 35, 39, 40: written, replaced by an equal one, or resized, after a clean end."""
    scene.clean(*BEFORE)
    change(scene)  # type: ignore[operator]
    assert scene.open() is reason


def test_a_disk_of_equal_size_with_other_content(scene: Scene) -> None:
    """faults row 39: a block device has no time and no inode; the sampled blocks tell."""
    scene.clean()
    size, sample = scene.fingerprint().size, scene.fingerprint().sample
    bitmap = scene.opened()
    bitmap.close(Fingerprint(size, 0, 0, sample))
    other = Fingerprint(size, 0, 0, bytes(16))
    assert scene.store.open(NAME, other) is Reason.DISK_CHANGED


@pytest.mark.parametrize("boot", ["same", "other"])
def test_the_image_was_replaced_after_a_kill(scene: Scene, boot: str) -> None:
    """faults row 39: another inode; the bits are of a file that is gone."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    bitmap.close(None)
    _replace_image(scene)
    if boot == "other":
        scene.reboot()
    assert scene.open() is (Reason.DISK_CHANGED if boot == "same" else Reason.UNCLEAN_SHUTDOWN)


@pytest.mark.parametrize(("boot", "late"), [("same", 1), ("same", 2 * 10**9), ("other", 130 * 10**9)])
def test_the_image_was_written_after_a_kill(scene: Scene, boot: str, late: int) -> None:
    """faults row 8: its time is later than the dead owner's last sign of life, and no write was noted."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    beat = bitmap.last_heartbeat()
    assert beat
    bitmap.close(None)
    if boot == "other":
        scene.reboot()
    late += beat.clock_ns
    os.utime(scene.image, ns=(late, late))
    assert scene.open() is Reason.DISK_CHANGED


def test_the_image_was_put_back_after_a_power_cut(scene: Scene) -> None:
    """A snapshot from before the bitmap: its regions tell of what was written later, not of what is gone."""
    snapshot = scene.image.stat().st_mtime_ns
    time.sleep(0.02)
    scene.image.touch()
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE)
    bitmap.close(None)
    scene.reboot()
    os.utime(scene.image, ns=(snapshot, snapshot))
    assert scene.open() is Reason.DISK_CHANGED


def test_a_bitmap_killed_before_its_first_mark_is_not_of_a_changed_disk(scene: Scene) -> None:
    """The creator's sign of life is in the file from the start: the image may be younger than its fingerprint."""
    fingerprint = scene.fingerprint()
    bitmap = scene.store.create(NAME, SIZE, CLUSTER, fingerprint._replace(mtime_ns=fingerprint.mtime_ns - 10**10))
    bitmap.close(None)
    assert scene.opened().found is Found.RECOVERED


def test_of_another_disk(scene: Scene, tmp_path: Path) -> None:
    """faults row 43: copied to another disk of the same VM."""
    scene.clean(*BEFORE)
    other = BitmapStore(scene.state, "vm", "other")
    other.lock()
    shutil.copy(scene.path, other.path(NAME))
    assert other.open(NAME, scene.fingerprint()) is Reason.WRONG_DISK
    other.unlock()


def test_under_another_name(scene: Scene) -> None:
    """A bitmap is named after its backup; one that was renamed stands for nothing."""
    scene.clean(*BEFORE)
    scene.path.rename(scene.store.path("incbak-00000001-00000003"))
    assert scene.store.open("incbak-00000001-00000003", scene.fingerprint()) is Reason.WRONG_DISK


def test_invalidated_by_hand(scene: Scene) -> None:
    """Refused while an owner has it; afterwards the reason stays."""
    scene.clean(*BEFORE)
    with pytest.raises(LockedError):
        invalidate(scene.state, "vm", "disk", NAME)
    scene.store.unlock()
    invalidate(scene.state, "vm", "disk", NAME)
    scene.store.lock()
    assert scene.open() is Reason.INVALIDATED
    with pytest.raises(BitmapError, match="no bitmap"):
        invalidate(scene.state, "vm", "disk", "nothing")


def test_a_buried_bitmap_is_known_to_be_lost(scene: Scene) -> None:
    """Its header could not be written, so its name says that it is invalid; a new one of that name may come."""
    scene.clean(*BEFORE)
    scene.path.rename(scene.path.with_name(scene.path.name + ".invalid"))
    good, bad = scene.store.open_all(scene.fingerprint())
    assert (good, bad) == ([], {NAME: Reason.TRACKING_FAILED})
    assert view(scene.state, "vm", "disk", NAME).reason is Reason.TRACKING_FAILED
    scene.create().close(None)
    assert scene.opened().found is Found.RECOVERED


@pytest.mark.parametrize(("content", "reason"), [(b"INCBAKBM" + bytes(5000), Reason.HEADER), (b"hello", Reason.FORMAT)])
def test_a_damaged_file_that_was_put_aside_keeps_its_reason(scene: Scene, content: bytes, reason: Reason) -> None:
    """A served disk puts aside what it cannot mark as invalid: the next look still says what was wrong."""
    scene.clean(*BEFORE)
    scene.path.write_bytes(content)
    assert scene.open() is reason
    scene.store.give_up(NAME, reason)
    assert not scene.path.exists()
    assert (scene.open(), view(scene.state, "vm", "disk", NAME).reason) == (reason, reason)


def test_a_reason_of_a_newer_version_is_not_said_to_be_by_hand(scene: Scene) -> None:
    scene.clean(*BEFORE)
    bitmap = scene.opened()
    bitmap.slot = replace(bitmap.slot, reason="unheard-of").with_flags(bitmap.slot.flags | Flag.INVALID)
    bitmap._write_slots(bitmap.slot, "bitmap.clear-first-slot", "bitmap.clear-second-slot")
    bitmap.close(None)
    assert scene.open() is Reason.FORMAT


def test_a_clear_that_was_killed_is_not_said_to_be_by_hand(scene: Scene) -> None:
    scene.clean(*BEFORE)
    bitmap = scene.opened()
    bitmap.begin_clear()
    bitmap.close(None)
    assert scene.open() is Reason.BITMAP_INCONSISTENT


def test_open_all_tells_good_from_bad(scene: Scene) -> None:
    scene.clean(*BEFORE)
    scene.store.path("rotten").write_bytes(b"INCBAKBM" + bytes(5000))
    scene.store.path("foreign").write_bytes(b"hello")
    scene.store.path("link").symlink_to(scene.path)
    good, bad = scene.store.open_all(scene.fingerprint())
    assert [b.name for b in good] == [NAME]
    assert bad == {"rotten": Reason.HEADER, "foreign": Reason.FORMAT, "link": Reason.HEADER}
    good[0].close(None)


def test_one_owner_at_a_time(scene: Scene) -> None:
    """faults row 47: the lock is held in the kernel, so it goes with its holder."""
    second = BitmapStore(scene.state, "vm", "disk")
    with pytest.raises(LockedError, match="in use"):
        second.lock()
    scene.store.unlock()
    second.lock()
    assert second.uuid == scene.store.uuid
    second.unlock()
    scene.store.lock()


@pytest.mark.parametrize("name", ["../../etc/shadow", ".hidden", "a/b", "ü\n\x1b", "%2e%2e"])
def test_names_are_keys_never_paths(scene: Scene, name: str) -> None:
    """faults row 71."""
    scene.store.create(name, SIZE, CLUSTER, scene.fingerprint()).close(None)
    assert scene.store.names() == [name]
    assert scene.store.path(name).parent == scene.store.directory
    found = scene.store.open(name, scene.fingerprint())
    assert isinstance(found, Bitmap)
    found.close(None)
    scene.store.remove(name)
    assert scene.store.names() == []


@pytest.mark.parametrize("name", ["", "x" * 129, "ü" * 65])
def test_what_is_no_name(scene: Scene, name: str) -> None:
    with pytest.raises(UsageError):
        scene.store.path(name)


def test_looking_on_needs_no_lock_and_changes_nothing(scene: Scene) -> None:
    """The bits of a live owner can be read; ``getDirtyBlocks`` gives byte ranges cut at the disk's end."""
    bitmap = scene.create()
    scene.write(bitmap, *BEFORE, (SIZE - 8, 8))
    before = scene.path.read_bytes()
    seen = view(scene.state, "vm", "disk", NAME)
    assert seen.in_use
    assert seen.reason is None
    assert get_dirty_blocks(scene.state, "vm", "disk", NAME) == bitmap.extents()
    assert bitmap.extents()[-1] == Extent(SIZE // CLUSTER * CLUSTER, SIZE % CLUSTER)
    assert scene.path.read_bytes() == before
    bitmap.close(scene.fingerprint())
    scene.store.unlock()
    assert [(v.vm, v.disk, v.name, v.in_use) for v in views(scene.state)] == [("vm", "disk", NAME, False)]
    scene.store.lock()


def test_an_old_clean_slot_does_not_come_back(scene: Scene) -> None:
    """The flag was cleared, then the newer slot rotted: the older one must not say clean."""
    scene.clean(*BEFORE)
    bitmap = scene.opened()
    bitmap.mark(3 * REGION, 1)
    newest = bitmap.slot
    bitmap.close(None)
    other, _both = fmt.newest(scene.path.read_bytes())
    assert isinstance(other, Slot)
    for position in (0, 1):
        slot = fmt.decode(scene.path.read_bytes()[position * fmt.SECTOR : (position + 1) * fmt.SECTOR])
        assert isinstance(slot, Slot)
        assert not slot.flags & Flag.CLEAN
        assert replace(slot, sequence=newest.sequence) == newest


def test_an_image_that_is_overwritten_disowns_its_bitmaps(scene: Scene, tmp_path: Path) -> None:
    """faults rows 8, 82: a block device has no time that would tell so later; found by any name of the image."""
    scene.store.note_image(scene.image)
    scene.clean(*BEFORE)
    link = tmp_path / "link"
    link.symlink_to(scene.image)
    with pytest.raises(LockedError):
        disown(scene.state, link)
    scene.store.unlock()
    assert disown(scene.state, tmp_path / "other") == []
    assert disown(scene.state, link) == [NAME]
    assert disown(scene.state, link) == []
    scene.store.lock()
    assert scene.open() is Reason.DISK_CHANGED


def test_a_device_is_found_by_the_link_that_it_was_served_by(scene: Scene, tmp_path: Path) -> None:
    """``/dev/vg/web1`` is the same volume after each boot; the node that it leads to is not."""
    link, other = tmp_path / "web1", tmp_path / "dm-7"
    other.write_bytes(b"")
    link.symlink_to(scene.image)
    scene.store.note_image(link)
    scene.clean(*BEFORE)
    scene.store.unlock()
    link.unlink()
    link.symlink_to(other)
    assert disown(scene.state, scene.image) == []
    assert disown(scene.state, other) == [NAME]


def test_who_the_disk_is_stays_when_its_image_moves(scene: Scene) -> None:
    """The identity is the VM's disk, not a path; noting the same image again writes nothing."""
    scene.clean(*BEFORE)
    before = scene.store.uuid
    scene.store.note_image(scene.image)
    path = scene.store.directory / "disk.json"
    written = path.stat().st_mtime_ns, path.stat().st_ino
    scene.store.note_image(scene.image)
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == written
    scene.store.unlock()
    scene.store.lock()
    assert scene.store.uuid == before
    scene.opened().close(None)


@pytest.mark.parametrize("content", [b"", b"{", b'{"uuid": 5}', b'{"uuid": "x"}'])
def test_a_disk_that_has_forgotten_who_it_is_has_no_bitmaps(scene: Scene, content: bytes) -> None:
    scene.clean(*BEFORE)
    (scene.store.directory / "disk.json").write_bytes(content)
    scene.store.unlock()
    scene.store.lock()
    assert scene.open() is Reason.WRONG_DISK


def test_looking_on_tells_why_a_bitmap_is_not_believed(scene: Scene) -> None:
    scene.clean(*BEFORE)
    scene.store.unlock()
    invalidate(scene.state, "vm", "disk", NAME)
    scene.store.lock()
    assert view(scene.state, "vm", "disk", NAME).reason is Reason.INVALIDATED
    scene.poke(100, b"\xff\0\xff")
    scene.poke(612, b"\xff\0\xff")
    seen = view(scene.state, "vm", "disk", NAME)
    assert seen.reason is Reason.HEADER
    with pytest.raises(BitmapError, match="cannot be read"):
        seen.extents()
    os.truncate(scene.path, 0)
    assert view(scene.state, "vm", "disk", NAME).reason is Reason.FORMAT
    with pytest.raises(BitmapError, match="no bitmap"):
        view(scene.state, "vm", "disk", "nothing")

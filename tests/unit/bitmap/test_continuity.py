"""What shows that nobody else wrote to an image: the rules of `incbak.bitmap.continuity`, and real files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from incbak.bitmap.continuity import bypassed, bypassed_in_a_power_cut, changed, may_repeat
from incbak.bitmap.file import Found
from incbak.fingerprint import Beat, Fingerprint, without_ctime
from incbak.reasons import Reason
from tests.unit.bitmap.scene import Scene

S = 1_000_000_000
T = 1_700_000_000 * S + 7
CLOSED = Fingerprint(1 << 20, 5, T, b"s" * 16, T, b"a" * 8)


@pytest.mark.parametrize(
    ("now", "reason"),
    [
        (CLOSED, None),
        (CLOSED._replace(size=1), Reason.RESIZED),
        (CLOSED._replace(mtime_ns=T + 1), Reason.DISK_CHANGED),
        (CLOSED._replace(mtime_ns=T - S), Reason.DISK_CHANGED),
        (CLOSED._replace(inode=6), Reason.DISK_CHANGED),
        (CLOSED._replace(ctime_ns=T + S), Reason.DISK_CHANGED),
        (CLOSED._replace(ctime_ns=T + S, attributes=b"b" * 8), Reason.UNPROVEN),
        (CLOSED._replace(ctime_ns=T + S, mtime_ns=T + S, attributes=b"b" * 8), Reason.DISK_CHANGED),
        (CLOSED._replace(ctime_ns=0), Reason.DISK_CHANGED),
    ],
)
def test_after_a_clean_end(now: Fingerprint, reason: Reason | None) -> None:
    """Another owner or link does not show that nothing else moved the ctime."""
    assert changed(CLOSED, now) is reason


def test_a_ctime_that_was_not_recorded_is_not_compared() -> None:
    """The owner has said that other programs move it; the rest is compared all the same."""
    assert changed(without_ctime(CLOSED), CLOSED._replace(ctime_ns=T + S, attributes=b"b" * 8)) is None
    assert changed(without_ctime(CLOSED), CLOSED._replace(ctime_ns=T + S, mtime_ns=T + 1)) is Reason.DISK_CHANGED


SEEN = Beat(T, T - 9 * S, T - 9 * S)
WROTE = SEEN._replace(until_ns=T + S)


@pytest.mark.parametrize(
    ("beat", "mtime_ns", "ctime_ns", "now_ns", "reason"),
    [
        (SEEN, T - 9 * S, T - 9 * S, T + S, None),
        (SEEN, T + 1, T + 1, T + S, Reason.DISK_CHANGED),
        (SEEN, T - S // 100, T - S // 100, T + S, None),
        (WROTE, T + S // 2, T + S // 2, T + 9 * S, None),
        (WROTE, T + S, T + S, T + 9 * S, None),
        (WROTE, T + S + 1, T + S + 1, T + 9 * S, Reason.DISK_CHANGED),
        (WROTE, T - 9 * S, T + S + 1, T + 9 * S, Reason.DISK_CHANGED),
        (WROTE, T - 9 * S, T - 9 * S, T - S // 2, Reason.UNPROVEN),
        (Beat(T, until_ns=T - 60 * S), T - S, T - S, T + S, None),
        (SEEN, T + 2 * S, T + 2 * S, T + 9 * S, Reason.DISK_CHANGED),
        (SEEN, T - 20 * S, T + 3 * S, T + 9 * S, Reason.DISK_CHANGED),
        (SEEN, T - 9 * S, T + 3 * S, T + 9 * S, Reason.DISK_CHANGED),
        (SEEN, T - 20 * S, T - 20 * S, T + 9 * S, Reason.DISK_CHANGED),
        (SEEN, T - 5 * S, T - 5 * S, T + 9 * S, Reason.DISK_CHANGED),
        (SEEN, T - 9 * S, T - 9 * S, T - 60 * S, Reason.UNPROVEN),
        (Beat(T), T - 20 * S, T - 20 * S, T + S, None),
        (Beat(T), T - 20 * S, T + 3 * S, T + 9 * S, Reason.DISK_CHANGED),
        (Beat(T), T - 20 * S, T - 20 * S, T - 60 * S, Reason.UNPROVEN),
    ],
)
def test_after_a_kill(beat: Beat, mtime_ns: int, ctime_ns: int, now_ns: int, reason: Reason | None) -> None:
    """As it was seen, or from its own later writes. Older: put back, or written under a clock that was set back."""
    disk = CLOSED._replace(mtime_ns=mtime_ns, ctime_ns=ctime_ns)
    assert bypassed(beat, disk, now_ns) is reason


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "booted_ns", "reason"),
    [
        (T - 40 * S, T - 40 * S, T + 40 * S, None),
        (T + 30 * S, T + 30 * S, T + 40 * S, None),
        (T + 41 * S, T + 41 * S, T + 40 * S, Reason.DISK_CHANGED),
        (T - 40 * S, T + 41 * S, T + 40 * S, Reason.DISK_CHANGED),
        (T + 130 * S, T + 130 * S, T + 400 * S, Reason.DISK_CHANGED),
        (T - 40 * S, T + 130 * S, T + 400 * S, Reason.DISK_CHANGED),
        (T - 40 * S - 1, T - 40 * S, T + 40 * S, Reason.DISK_CHANGED),
        (T - 40 * S, T - 40 * S - 1, T + 40 * S, Reason.DISK_CHANGED),
        (T - 9 * S, T - 9 * S, T + 40 * S, None),
        (T - 8 * S, T - 9 * S, T + 40 * S, Reason.DISK_CHANGED),
        (T - 9 * S, T - 8 * S, T + 40 * S, Reason.DISK_CHANGED),
    ],
)
def test_after_a_power_cut(mtime_ns: int, ctime_ns: int, booted_ns: int, reason: Reason | None) -> None:
    """The file's times may be lost with the power, so they may be old, but not older than the bitmap: then it was put
    back. What is of this boot is of another program."""
    disk = CLOSED._replace(mtime_ns=mtime_ns, ctime_ns=ctime_ns)
    began = CLOSED._replace(mtime_ns=T - 40 * S, ctime_ns=T - 40 * S)
    assert bypassed_in_a_power_cut(SEEN, began, disk, booted_ns, T + 500 * S) is reason


@pytest.mark.parametrize(
    ("mtime_ns", "ctime_ns", "reason"),
    [
        (T - 10 * S, T - 10 * S, None),
        (T - 10 * S - 1, T - 10 * S, Reason.DISK_CHANGED),
        (T - 10 * S, T - 10 * S - 1, Reason.DISK_CHANGED),
    ],
)
def test_after_a_power_cut_no_time_is_older_than_what_was_durable(
    mtime_ns: int, ctime_ns: int, reason: Reason | None
) -> None:
    """A rescue system whose clock is behind wrote to it, or it was put back."""
    beat = SEEN._replace(durable_ns=(T - 10 * S, T - 10 * S))
    began = CLOSED._replace(mtime_ns=T - 40 * S, ctime_ns=T - 40 * S)
    disk = CLOSED._replace(mtime_ns=mtime_ns, ctime_ns=ctime_ns)
    assert bypassed_in_a_power_cut(beat, began, disk, T + 40 * S, T + 500 * S) is reason


def test_a_clock_behind_the_last_sign_of_life_shows_nothing_after_a_power_cut() -> None:
    disk = CLOSED._replace(mtime_ns=T - S)
    assert bypassed_in_a_power_cut(SEEN, disk, disk, T - 2 * S, T - S) is Reason.UNPROVEN


def test_a_time_that_may_come_again() -> None:
    """The coarser of the two decides."""
    assert may_repeat(CLOSED, T + S // 100)
    assert not may_repeat(CLOSED, T + S // 10)
    assert may_repeat(CLOSED._replace(mtime_ns=T // S * S), T + S)


def _overwrite(image: Path) -> None:
    before = image.stat()
    with image.open("r+b") as f:
        f.seek(70_000)  # no block of the sample
        f.write(b"another program")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def _older(image: Path) -> None:
    with image.open("r+b") as f:
        f.write(b"an older copy")
    os.utime(image, ns=(1, 1_600_000_000 * S))


def _mode(image: Path) -> None:
    image.chmod(0o640)


def _link(image: Path) -> None:
    image.with_name("link").hardlink_to(image)


def _renamed_and_back(image: Path) -> None:
    image.rename(image.with_name("away")).rename(image)


def _overwrite_and_mode(image: Path) -> None:
    _overwrite(image)
    _mode(image)


def _mode_and_back(image: Path) -> None:
    before = image.stat().st_mode
    image.chmod(0o640)
    image.chmod(before)


@pytest.mark.parametrize(
    ("change", "clean"),
    [
        (_overwrite, Reason.DISK_CHANGED),
        (_older, Reason.DISK_CHANGED),
        (_mode, Reason.UNPROVEN),
        (_link, Reason.UNPROVEN),
        (_overwrite_and_mode, Reason.UNPROVEN),
        (_mode_and_back, Reason.DISK_CHANGED),
        (_renamed_and_back, Reason.DISK_CHANGED),
    ],
)
@pytest.mark.parametrize("end", ["clean", "killed"])
def test_a_real_file(scene: Scene, change: Callable[[Path], None], clean: Reason, end: str) -> None:
    """Written and dated back; put back by ``cp -p``; a mode or a link hides that, so it proves nothing."""
    _aged(scene, end)
    change(scene.image)
    assert scene.open() is (clean if end == "clean" else Reason.DISK_CHANGED)


def _aged(scene: Scene, end: str) -> None:
    """A session that ended long ago by the clock of its last sign of life."""
    bitmap = scene.create()
    scene.write(bitmap, (0, 4096))
    if end == "clean":
        while may_repeat(scene.fingerprint(), time.time_ns()):
            time.sleep(0.002)
        bitmap.close(scene.fingerprint())
        return
    beat = scene.beat()
    long_ago = {"clock_ns": beat.clock_ns - 2 * S, "mtime_ns": beat.mtime_ns - 2 * S, "ctime_ns": beat.ctime_ns - 2 * S}
    bitmap.heartbeat(beat._replace(**long_ago))
    bitmap.close(None)


def test_a_killed_owner_that_had_just_been_alive(scene: Scene) -> None:
    """Its last writes are its own."""
    bitmap = scene.create()
    scene.write(bitmap, (0, 4096))
    bitmap.close(None)
    assert scene.opened().found is Found.RECOVERED

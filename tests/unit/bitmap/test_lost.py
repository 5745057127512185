"""Why a bitmap is not there: what a watch has noted, and what the file says that the bitmap was loaded from."""

from __future__ import annotations

import math
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from incbak.bitmap.lost import Lost, lost_bitmaps, note_end, note_left, note_saved, note_watched
from incbak.bitmap.store import BitmapStore
from incbak.reasons import Reason
from tests.unit.bitmap.scene import NAME, Scene

OTHER = "incbak-00000001-00000009"


def at(seconds: float) -> str:
    """A record's time, from now."""
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


@pytest.fixture
def store(tmp_path: Path) -> BitmapStore:
    """Of a disk that a watch has."""
    made = BitmapStore(tmp_path, "vm", "vda")
    made.lock()
    return made


def look(store: BitmapStore, *, in_qemu: bool = True) -> Lost:
    """What the next backup finds."""
    return lost_bitmaps(store.directory.parents[1], "vm", ["vda"], in_qemu=in_qemu)["vda"]


def test_what_was_made_before_the_end_is_lost_by_it_and_what_is_newer_is_not(store: BitmapStore) -> None:
    note_watched(store.directory)
    assert look(store).why(OTHER, at(-1), here=True) is None, "the VM is watched, so nothing is lost"
    note_end(store.directory, Reason.UNSAVED)
    note_watched(store.directory)
    lost = look(store)
    assert lost.why(OTHER, at(-1), here=True) is Reason.UNSAVED
    assert lost.why(OTHER, at(-1), here=False) is None, "another host knows nothing of the end here"
    assert lost.why(OTHER, at(9), here=True) is None
    assert lost.why(OTHER, "", here=True) is None
    note_saved(store.directory)
    assert look(store).why(OTHER, at(-1), here=True) is Reason.UNSAVED, "what was saved is in its file"


@pytest.mark.parametrize("again", [False, True])
def test_a_watch_that_died_has_left_the_vm_alone(store: BitmapStore, again: bool) -> None:
    """Whether the next one has come meanwhile or not."""
    note_watched(store.directory)
    store.unlock()
    if again:
        store.lock()
        note_watched(store.directory)
    assert look(store).why(OTHER, at(-1), here=True) is Reason.UNWATCHED
    assert look(store, in_qemu=False).why(OTHER, at(-1), here=True) is Reason.UNWATCHED


@pytest.mark.parametrize(
    ("note", "reason"),
    [(lambda d: None, Reason.UNCLEAN_SHUTDOWN), (note_left, Reason.UNWATCHED), (note_saved, None)],
)
def test_a_host_that_went_down(
    store: BitmapStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    note: Callable[[Path], None],
    reason: Reason | None,
) -> None:
    """A watch that was told to leave before has not seen the end of the VM."""
    boot = tmp_path / "boot"
    monkeypatch.setenv("INCBAK_BOOT_ID_FILE", str(boot))
    boot.write_text(str(uuid.uuid4()))
    note_watched(store.directory)
    note(store.directory)
    store.unlock()
    boot.write_text(str(uuid.uuid4()))
    assert look(store).why(OTHER, at(-1), here=True) is reason


def test_the_file_that_a_bitmap_was_loaded_from_says_why(scene: Scene) -> None:
    """One that nobody loaded means a VM without a watch, whatever the note says of other bitmaps."""
    scene.clean((0, 4096))
    note_end(scene.store.directory, Reason.UNSAVED)
    found = lambda: lost_bitmaps(scene.state, "vm", ["disk"], in_qemu=True)["disk"]  # noqa: E731
    assert found().why(NAME, at(-9), here=True) is Reason.UNWATCHED
    assert lost_bitmaps(scene.state, "vm", ["disk"], in_qemu=False)["disk"].files == {}
    scene.store.give_up(NAME, Reason.DIGEST)
    assert found().why(NAME, at(-9), here=False) is Reason.DIGEST
    scene.path.write_bytes(b"hello")
    assert found().why(NAME, at(-9), here=True) is Reason.FORMAT
    scene.store.give_up(NAME, Reason.FORMAT)
    assert found().why(NAME, at(-9), here=True) is Reason.FORMAT


@pytest.mark.parametrize("content", [b"", b"[" * 100_000, b'{"state":5}', b'{"reason":"none"}', b"\xff", b" " * 9000])
def test_a_note_that_cannot_be_read_explains_nothing(store: BitmapStore, content: bytes) -> None:
    (store.directory / "watch.json").write_bytes(content)
    assert look(store) == Lost()
    note_end(store.directory, Reason.UNSAVED)
    assert look(store).ended_ns <= time.time_ns() < math.inf


def test_without_a_state_directory_or_with_a_name_that_is_none(tmp_path: Path) -> None:
    assert lost_bitmaps(None, "vm", ["vda"], in_qemu=True) == {}
    assert lost_bitmaps(tmp_path, "vm", ["x" * 2000, "vda"], in_qemu=True) == {"vda": Lost()}
    assert list(tmp_path.iterdir()) == []


def test_a_note_that_cannot_be_written_stops_no_watch(tmp_path: Path) -> None:
    note_watched(tmp_path / "nowhere")
    note_end(tmp_path / "nowhere", Reason.UNSAVED)

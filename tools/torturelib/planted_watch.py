"""Faults of ``incbak watch``: what it loads into QEMU, what it saves, and when a file may be believed."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_SAVED, _LOADING, _SAVING, _DISKS, _VM, _TRANSFER = (
    "incbak/bitmap/saved.py",
    *(f"incbak/watch/{name}.py" for name in ("loading", "saving", "disks", "vm", "transfer")),
)


def _saved(*tests: str) -> tuple[str, ...]:
    return unit("bitmap/test_saved", *tests)


def _loading(*tests: str) -> tuple[str, ...]:
    return unit("watch/test_loading", *tests)


def _saving(*tests: str) -> tuple[str, ...]:
    return unit("watch/test_saving", *tests)


def _disks(*tests: str) -> tuple[str, ...]:
    return unit("watch/test_disks", *tests)


def _live(*tests: str) -> tuple[str, ...]:
    return tuple(f"tests/live/test_qemu_watch_steps.py::{test}" for test in tests)


_FILES = (
    Fault(
        "saved-flag-without-bits",
        _SAVED,
        "            bitmap.fill(bits)\n",
        "",
        _saved("test_what_was_saved_is_found"),
    ),
    Fault(
        "saved-coarse-map-not-filled",
        "incbak/bitmap/file.py",
        "            self._stored.touch(first << self._shift >> REGION_SHIFT, (last >> REGION_SHIFT) + 1)\n",
        "            pass\n",
        _saved("test_after_a_power_cut_all_touched_regions_are_dirty"),
    ),
    Fault(
        "saved-under-its-name-at-once",
        _SAVED,
        '    temporary = store.directory / f".{component(name)}.saved.tmp"\n',
        "    temporary = store.path(name)\n",
        _saved("test_what_cannot_be_saved_changes_nothing"),
    ),
    Fault(
        "saved-name-not-durable",
        _SAVED,
        "        durable.commit(temporary, store.path(name), replace=True)\n",
        "        temporary.rename(store.path(name))\n",
        _saved("test_it_has_its_name_when_it_is_durable"),
    ),
    Fault(
        "saved-failure-leaves-a-file",
        _SAVED,
        "    finally:\n        temporary.unlink(missing_ok=True)\n",
        "    finally:\n        pass\n",
        _saved("test_what_cannot_be_saved_changes_nothing"),
    ),
)

_TO_QEMU = (
    Fault(
        "watch-file-still-believed-after-load",
        _LOADING,
        "        disk.store.give_up(name, reason or Reason.UNSAVED)\n",
        "",
        _loading("test_no_file_is_believed_once_it_was_read"),
    ),
    Fault(
        "watch-file-believed-after-an-unwatched-run",
        _LOADING,
        "    disk.store.give_up(name, found)\n",
        "",
        _live("test_an_incoming_migration"),
    ),
    Fault(
        "watch-looks-before-it-records",
        _LOADING,
        '    await session.execute("block-dirty-bitmap-add", since | {"granularity": granularity})\n    try:\n'
        '        crash_point("watch.recording")\n        if why := await why_written(session, [disk]):\n'
        "            raise EngineError(why)\n",
        "    if why := await why_written(session, [disk]):\n        raise EngineError(why)\n"
        '    await session.execute("block-dirty-bitmap-add", since | {"granularity": granularity})\n    try:\n'
        '        crash_point("watch.recording")\n',
        _loading("test_a_write_at_any_moment_is_in_the_bitmap_or_there_is_none"),
    ),
    Fault(
        "watch-writes-during-the-load-forgotten",
        _LOADING,
        '        sources = [{"node": disk.node, "name": PREFIX}, source]\n',
        "        sources = [source]\n",
        _loading("test_a_write_at_any_moment_is_in_the_bitmap_or_there_is_none"),
    ),
    Fault(
        "watch-no-look-whether-it-was-written",
        _LOADING,
        "        if why := await why_written(session, [disk]):\n            raise EngineError(why)\n",
        "",
        _loading("test_a_write_at_any_moment_is_in_the_bitmap_or_there_is_none"),
    ),
    Fault(
        "watch-status-not-looked-at",
        _LOADING,
        "    if status != _FRESH:\n",
        "    if False:\n",
        _loading("test_what_shows_that_a_disk_was_written"),
    ),
    Fault(
        "watch-devices-not-looked-at",
        _LOADING,
        '    if any(_writes(e["stats"]) for e in await session.execute("query-blockstats")):\n',
        "    if False:\n",
        _loading("test_what_shows_that_a_disk_was_written"),
    ),
    Fault(
        "watch-nodes-not-looked-at",
        _LOADING,
        "        if not nodes or any(_writes(stats) for stats in nodes):\n",
        "        if False:\n",
        _loading("test_what_shows_that_a_disk_was_written"),
    ),
    Fault(
        "watch-loads-what-was-off",
        _LOADING,
        "    if not bitmap.enabled:\n",
        "    if False:\n",
        _loading("test_a_sound_file_of_another_kind_is_not_loaded"),
    ),
    Fault(
        "watch-loads-after-a-power-cut",
        _LOADING,
        "    if bitmap.found is Found.COARSE:\n",
        "    if False:\n",
        _loading("test_what_a_power_cut_has_left_is_not"),
    ),
    Fault(
        "watch-count-not-compared",
        _TRANSFER,
        '            if found["count"] != kernels.count(bits) * place.granularity:\n',
        "            if False:\n",
        unit("watch/test_transfer", "test_bits_that_did_not_come_to_qemu_are_missed"),
    ),
    Fault(
        "watch-lets-go-before-it-would-pause",
        _VM,
        "        await self._pause_at_shutdown()\n        if not why and self._options.start:\n"
        '            await self._session.execute("cont")\n',
        "        if not why and self._options.start:\n"
        '            await self._session.execute("cont")\n        await self._pause_at_shutdown()\n',
        _disks("test_the_vm_is_let_go_last"),
    ),
    Fault(
        "watch-leftovers-stay",
        _VM,
        "            await remove_leftovers(self._session)\n",
        "",
        _live("test_watch_is_killed_while_it_loads[watch.filled]"),
    ),
    Fault(
        "watch-files-not-locked",
        _VM,
        "        await lock_store(disk)\n",
        "        disk.store.uuid = disk.store._identity()\n",
        _live("test_a_second_watch_is_refused"),
    ),
    Fault(
        "watch-plugged-disk-not-seen",
        _VM,
        "            await self._look_for_new()\n\n    async def _stops(",
        "            pass\n\n    async def _stops(",
        _live("test_disks_that_come_and_go"),
    ),
    Fault(
        "watch-leaves-a-guest-that-panicked",
        _VM,
        "        return status == SHUT_DOWN or panicked\n",
        "        return status == SHUT_DOWN\n",
        _disks("test_when_a_vm_has_ended"),
    ),
    Fault(
        "watch-leaves-a-vm-that-would-stay-paused",
        _VM,
        '            await self._session.execute("set-action", {"shutdown": "poweroff"})\n',
        "            pass\n",
        _live("test_sigterm"),
    ),
)

_TO_FILES = (
    Fault(
        "watch-quits-a-vm-that-runs-again",
        _SAVING,
        '    await still.check()\n    crash_point("watch.quitting")\n',
        '    crash_point("watch.quitting")\n',
        _saving("test_it_is_not_ended_when_it_runs_again"),
    ),
    Fault(
        "watch-quits-in-the-middle-of-a-backup",
        _SAVING,
        'in await cancel_jobs(session, f"{PREFIX}-"):\n',
        "in ():\n",
        _saving("test_a_backup_that_still_runs_is_cancelled_first"),
    ),
    Fault(
        "watch-events-not-heard",
        _SAVING,
        "        if status != self.status or not self.ran.empty():\n",
        "        if status != self.status:\n",
        _saving("test_a_short_shutdown_in_between_is_seen"),
    ),
    Fault(
        "watch-ran-while-it-was-ended",
        _SAVING,
        "    if not ran.empty():\n",
        "    if False:\n",
        _saving("test_it_is_not_ended_when_it_runs_again"),
    ),
    Fault(
        "watch-bits-not-counted",
        _SAVING,
        '    return counts == [int(found[place.name]["count"]) for place in each.places]\n',
        "    return bool(counts) or True\n",
        _saving("test_bits_that_did_not_come_are_missed"),
    ),
    Fault(
        "watch-bitmaps-changed-meanwhile",
        _SAVING,
        "    if _places(each.disk, found) != each.places:\n        return False\n",
        "    if _places(each.disk, found) != each.places:\n        return True\n",
        _saving("test_a_backup_that_ends_meanwhile_is_waited_for"),
    ),
    Fault(
        "watch-saves-what-does-not-record",
        _SAVING,
        'is_bitmap_name(name) and info["recording"] and not info["busy"]',
        'is_bitmap_name(name) and not info["busy"]',
        _saving("test_what_an_incremental_would_not_believe_is_not_saved"),
    ),
    Fault(
        "watch-saves-what-is-inconsistent",
        _SAVING,
        ' and not info.get("inconsistent")',
        "",
        _saving("test_what_an_incremental_would_not_believe_is_not_saved"),
    ),
    Fault(
        "watch-does-not-wait-for-the-images",
        _SAVING,
        "    if not trouble and not await holder.gone(disks, _LETTING_GO_SECONDS):\n",
        "    if False:\n",
        _saving("test_nothing_is_saved_while_the_image_is_open"),
    ),
    Fault(
        "watch-saves-what-nothing-tells-of",
        _SAVING,
        "    trouble = trouble or holder.why_not_told()\n",
        "",
        _saving("test_an_image_that_nothing_tells_of_is_not_saved"),
    ),
    Fault(
        "watch-image-not-synced",
        _SAVING,
        "        disk.sync()\n",
        "",
        _saving("test_the_image_is_on_its_storage_before_a_file_says_so"),
    ),
    Fault(
        "watch-image-not-compared",
        _SAVING,
        "    if now != before if disk.raw else",
        "    if False if disk.raw else",
        _saving("test_somebody_writes_while_it_is_ended"),
    ),
    Fault(
        "watch-other-writer-not-seen",
        _SAVING,
        "    return not (disk.raw and now.mtime_ns) and writer_present(str(disk.image))\n",
        "    return False\n",
        _saving("test_the_vm_is_started_again_at_once"),
    ),
    Fault(
        "watch-image-written-while-its-files-are",
        _SAVING,
        "        if disk.fingerprint() != fingerprint or _opened(disk, fingerprint):\n",
        "        if False:\n",
        _saving("test_somebody_writes_while_the_files_are"),
    ),
    Fault(
        "watch-clock-not-waited-for",
        "incbak/bitmap/settle.py",
        "    while may_repeat(found := disk.fingerprint(), time.time_ns()):\n",
        "    while not (found := disk.fingerprint()):\n",
        _disks("test_any_later_write_shows", "test_a_clock_that_ticks"),
    ),
    Fault(
        "watch-image-that-qemu-does-not-have",
        _DISKS,
        "    if not (pid and _has_open(pid, disk.image)) and not _locked(disk):\n",
        "    if False:\n",
        _live("test_an_image_that_is_not_the_one_that_qemu_has"),
    ),
)

FAULTS = (*_FILES, *_TO_QEMU, *_TO_FILES)

"""Faults of what shows that a disk is unchanged: continuity, identity, names, the newest record."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_CONTINUITY, _IMAGE = "incbak/bitmap/continuity.py", "incbak/engine/image.py"


def _continuity(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_continuity", test)


def _device(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_device_writes", test)


def _look(test: str) -> tuple[str, ...]:
    return unit("bitmap/test_look", test)


def _sources(test: str) -> tuple[str, ...]:
    return unit("backup/test_sources", test)


def _image(test: str) -> tuple[str, ...]:
    return unit("backup/test_image", test)


FAULTS = (
    Fault(
        "continuity-inode-time-not-compared",
        _CONTINUITY,
        "    if before.ctime_ns and now.ctime_ns != before.ctime_ns:\n",
        "    if False:\n",
        _continuity("test_after_a_clean_end"),
    ),
    Fault(
        "continuity-put-back-after-a-kill",
        _CONTINUITY,
        "((disk.mtime_ns, beat.mtime_ns), (disk.ctime_ns, beat.ctime_ns))",
        "((disk.mtime_ns, beat.mtime_ns),)",
        _continuity("test_after_a_kill"),
    ),
    Fault(
        "continuity-older-than-the-last-sign-of-life",
        _CONTINUITY,
        "        if seen_ns and time_ns and time_ns < beat.clock_ns - grain(time_ns):\n"
        "            return Reason.DISK_CHANGED\n",
        "",
        _continuity("test_after_a_kill"),
    ),
    Fault(
        "continuity-clock-set-back-believed",
        _CONTINUITY,
        "    if max(beat.clock_ns, beat.until_ns) > now_ns + CLOCK_SLACK_NS:\n        return Reason.UNPROVEN\n",
        "",
        _continuity("test_after_a_kill"),
    ),
    Fault(
        "continuity-reaches-into-this-boot",
        _CONTINUITY,
        "latest = min(beat.clock_ns + POWER_CUT_SLACK_NS, booted_ns)",
        "latest = beat.clock_ns + POWER_CUT_SLACK_NS",
        _continuity("test_after_a_power_cut"),
    ),
    Fault(
        "device-set-up-not-compared",
        _CONTINUITY,
        "    if now.writes[:16] != before.writes[:16]:\n        return Reason.UNPROVEN\n",
        "",
        _device("test_writes_since_the_clean_end"),
    ),
    Fault(
        "device-count-not-compared",
        _CONTINUITY,
        "    if now[:4] != before[:4] or now.writes != before.writes:\n",
        "    if now[:4] != before[:4]:\n",
        _device("test_writes_since_the_clean_end"),
    ),
    Fault(
        "device-killed-owner-believed",
        _CONTINUITY,
        "    if disk.writes != beat.writes:\n        return Reason.UNPROVEN\n",
        "",
        _device("test_writes_since_the_owner_was_killed"),
    ),
    Fault(
        "device-page-cache-not-flushed",
        "incbak/disk/file.py",
        "            self.flush()  # what another program has only written to the page cache is not counted yet\n",
        "            pass\n",
        _device("test_a_write_that_is_only_in_the_page_cache_shows"),
    ),
    Fault(
        "image-written-while-it-is-read",
        _IMAGE,
        "        if reason := changed(self._kept, self._disk.fingerprint()):\n",
        "        if reason := None:\n",
        _image("test_another_program_writes_while_the_image_is_read"),
    ),
    Fault(
        "image-closed-as-it-is-now",
        _IMAGE,
        "            bitmap.close(None if provisional else self._kept)",
        "            bitmap.close(None if provisional else self._disk.fingerprint())",
        _image("test_what_was_written_meanwhile_is_not_taken_for_seen"),
    ),
    Fault(
        "look-second-opinion",
        "incbak/bitmap/look.py",
        "    found = judge(header, name, uuid.UUID(identity.uuid).bytes, image, sampling=sampling)\n",
        "    found = said_invalid(header.slot) or Found.RECOVERED\n",
        _look("test_the_look_is_what_the_next_owner_finds"),
    ),
    Fault(
        "look-fine-bits-after-a-power-cut",
        "incbak/bitmap/look.py",
        "            if self.found is Found.COARSE:\n                return _with",
        "            if False:\n                return _with",
        _look("test_the_look_is_what_the_next_owner_finds"),
    ),
    Fault(
        "look-mask-of-fine-bits-after-a-power-cut",
        "incbak/bitmap/look.py",
        "        if self.found is Found.COARSE:\n            bits =",
        "        if False:\n            bits =",
        _look("test_the_look_is_what_the_next_owner_finds"),
    ),
    Fault(
        "look-extents-of-what-is-invalid",
        "incbak/bitmap/look.py",
        "        if self.slot is None or self.reason:\n",
        "        if self.slot is None:\n",
        _look("test_there_are_no_extents_of_what_is_not_believed"),
    ),
    Fault(
        "status-owns-bitmaps",
        _IMAGE,
        "            if not look:\n",
        "            if True:\n",
        _look("test_an_engine_that_looks_changes_nothing"),
    ),
    Fault(
        "runner-dry-run-locks",
        "incbak/backup/runner.py",
        "nullcontext() if options.dry_run else locked(",
        "locked(",
        unit("backup/test_runner", "test_a_dry_run_needs_no_lock"),
    ),
    Fault(
        "plan-older-base-behind-a-newer-backup",
        "incbak/backup/plan.py",
        "or (missing and not copied):",
        "or False:",
        _sources("test_the_newest_backup_decides"),
    ),
    Fault(
        "plan-backing-files-not-compared",
        "incbak/backup/sources.py",
        "    if not are_same(before, below, now.trusted):\n",
        "    if False:\n",
        _sources("test_a_backing_file_that_was_changed"),
    ),
    Fault(
        "plan-two-disks-of-one-name",
        "incbak/backup/plan.py",
        "    check_names(description)\n",
        "",
        _sources("test_two_disks_of_one_name"),
    ),
    Fault(
        "sources-two-images-of-one-name",
        "incbak/backup/sources.py",
        "        return not os.path.samestat(before.stat(), now.stat())\n",
        "        return False\n",
        _sources("test_two_images_of_one_name"),
    ),
    Fault(
        "runner-strict-forgotten",
        "incbak/backup/runner.py",
        "            if self._options.strict:\n",
        "            if False:\n",
        _sources("test_such_a_name_is_a_note_or_refused"),
    ),
    Fault(
        "sources-name-not-asked-about",
        "incbak/backup/sources.py",
        '    if name and name != vm and name != last.get("name"):\n',
        "    if False:\n",
        _sources("test_a_name_that_the_source_contradicts"),
    ),
    Fault(
        "sources-files-not-compared",
        "incbak/backup/sources.py",
        "            return before != after\n",
        "            return False\n",
        _sources("test_what_tells_a_change"),
    ),
    Fault(
        "config-two-vms-one-source",
        "incbak/fleet/config.py",
        "    yield from _one_source(config)\n",
        "",
        _sources("test_two_vms_with_one_source"),
    ),
    Fault(
        "runner-does-not-look-again",
        "incbak/backup/runner.py",
        "            await self._engine.confirm()\n",
        "",
        unit("backup/test_runner", "test_the_engine_looks_again_before_the_commit"),
    ),
)

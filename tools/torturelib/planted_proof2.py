"""Faults of what is believed of a disk that nobody tracked: its ctime, its identity, samples of it."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_CONTINUITY, _TRACKER = "incbak/bitmap/continuity.py", "incbak/serve/tracker.py"
_SAMPLE = "incbak/backup/sample.py"


def _sample(test: str) -> tuple[str, ...]:
    return unit("backup/test_sample", test)


def _boot(test: str) -> tuple[str, ...]:
    return (f"tests/story/test_trust_after_boot.py::{test}",)


_NOTES = unit("serve/test_tracker", "test_the_file_says_until_when_writes_may_come")

FAULTS = (
    Fault(
        "killed-owner-bounds-from-its-heartbeat",
        _CONTINUITY,
        "    latest = max(beat.clock_ns, beat.until_ns)\n",
        "    latest = beat.clock_ns + 1_000_000_000\n",
        unit("bitmap/test_continuity", "test_after_a_kill"),
    ),
    Fault(
        "clock-set-back-after-a-note",
        _CONTINUITY,
        "    if max(beat.clock_ns, beat.until_ns) > now_ns + CLOCK_SLACK_NS:\n",
        "    if beat.clock_ns > now_ns + CLOCK_SLACK_NS:\n",
        unit("bitmap/test_continuity", "test_after_a_kill"),
    ),
    Fault(
        "put-back-after-a-power-cut-believed",
        _CONTINUITY,
        "        if not oldest_ns <= time_ns <= latest:\n",
        "        if time_ns > latest:\n",
        unit("bitmap/test_found_on_open", "test_the_image_was_put_back_after_a_power_cut"),
    ),
    Fault(
        "older-than-durable-believed",
        _CONTINUITY,
        "max(began.mtime_ns, beat.durable_ns[0])",
        "began.mtime_ns",
        unit("bitmap/test_continuity", "test_after_a_power_cut_no_time_is_older_than_what_was_durable"),
    ),
    Fault(
        "between-seen-and-the-clock-believed",
        _CONTINUITY,
        "        if seen_ns and seen_ns < time_ns < beat.clock_ns - grain(time_ns):\n",
        "        if False:\n",
        unit("bitmap/test_continuity", "test_after_a_power_cut"),
    ),
    Fault(
        "times-not-made-durable-meanwhile",
        "incbak/serve/opening.py",
        "                        tracked.disk.flush_times()\n",
        "                        pass\n",
        unit("serve/test_daemon", "test_when_an_image_was_written_is_made_durable_from_time_to_time"),
    ),
    Fault(
        "times-called-durable-before-they-are",
        "incbak/disk/file.py",
        "durable_ns=self._durable_ns)\n",
        "durable_ns=(info.st_mtime_ns, info.st_ctime_ns))\n",
        ("tests/contract/test_disk_contract.py::test_when_it_was_written_is_durable",),
    ),
    Fault(
        "writes-not-noted-before",
        _TRACKER,
        "                self._note(now + NOTED_NS | BUSY)\n",
        "",
        _NOTES,
    ),
    Fault(
        "writes-noted-for-ever-by-a-clock-set-back",
        _TRACKER,
        "        if not 0 < self._until_ns - now <= NOTED_NS:\n",
        "        if self._until_ns <= now:\n",
        unit("serve/test_tracker", "test_a_write_beside_another_prolongs_the_note"),
    ),
    Fault(
        "writes-noted-as-done-while-some-are-in-flight",
        "incbak/serve/gate.py",
        "            if self._draining or self._inside:\n"
        "                return\n"
        "            for slot in self._slots:\n",
        "            for slot in ():\n",
        unit("serve/test_tracker", "test_a_write_beside_another_prolongs_the_note"),
    ),
    Fault(
        "end-of-writes-not-noted",
        _TRACKER,
        "        self._note(time.time_ns() & ~BUSY)\n",
        "",
        _NOTES,
    ),
    Fault(
        "rest-not-told-before-the-answers",
        "incbak/nbd/connection.py",
        "        length, self._out_len = self._out_len, 0\n        self._rest(self._waiting)\n",
        "        length, self._out_len = self._out_len, 0\n",
        unit("nbd/test_transmission", "test_a_device_is_told_that_writes_are_done_before_their_answers_go"),
    ),
    Fault(
        "rest-not-told-before-a-workers-answer",
        "incbak/nbd/connection.py",
        "    def _send(self, data: bytes | bytearray) -> None:\n        self._rest()\n",
        "    def _send(self, data: bytes | bytearray) -> None:\n",
        unit("nbd/test_transmission", "test_a_device_is_told_that_writes_are_done_before_their_answers_go"),
    ),
    Fault(
        "writes-not-noted-in-a-new-bitmap",
        _TRACKER,
        "        self._until_ns = 0\n        return old\n",
        "        return old\n",
        unit("serve/test_tracker", "test_a_bitmap_that_comes_between_two_notes_has_one_before_its_first_write"),
    ),
    Fault(
        "times-not-durable-at-the-end",
        "incbak/serve/opening.py",
        "            tracked.disk.flush_times()\n        found",
        "            tracked.disk.flush()\n        found",
        unit("serve/test_daemon", "test_the_disk_is_flushed_before_the_flag_is_set"),
    ),
    Fault(
        "ctime-explained-by-attributes",
        "incbak/bitmap/continuity.py",
        "        return Reason.DISK_CHANGED if now.attributes == before.attributes else Reason.UNPROVEN\n",
        "        return Reason.DISK_CHANGED if now.attributes == before.attributes else None\n",
        unit("bitmap/test_continuity", "test_a_real_file"),
    ),
    Fault(
        "watch-compares-no-ctime",
        "incbak/watch/disks.py",
        "        return without_ctime(self.seen()) if self.ignore_ctime else self.seen()\n",
        "        return without_ctime(self.seen())\n",
        unit("watch/test_disks", "test_an_image_that_was_dated_back_shows"),
    ),
    Fault(
        "sample-through-the-page-cache",
        _SAMPLE,
        "os.O_RDONLY | os.O_DIRECT",
        "os.O_RDONLY",
        unit("backup/test_sample", "test_clusters_are_read_past_the_page_cache"),
    ),
    Fault(
        "sample-that-differs-forgotten",
        "incbak/backup/runner.py",
        "                if wrong:\n",
        "                if False:\n",
        _boot("test_a_sample_that_differs_is_final"),
    ),
    Fault(
        "sample-not-compared",
        _SAMPLE,
        "                if (found != tree.digests(number, 1)).any() and clean(number, 1)[0]:\n",
        "                if False:\n",
        _boot("test_a_sample_that_differs_is_final"),
    ),
    Fault(
        "sample-of-marked-clusters",
        _SAMPLE,
        "    wanted = data[rows] & np.asarray(clean(first, count)[rows])\n",
        "    wanted = data[rows]\n",
        _sample("test_only_clean_clusters_with_data_are_chosen"),
    ),
    Fault(
        "sample-of-too-few",
        _SAMPLE,
        "    return sorted(chosen), False\n",
        "    return sorted(chosen), True\n",
        _sample("test_too_few_of_a_large_disk_show_nothing"),
    ),
    Fault(
        "sample-of-none",
        "incbak/backup/closer.py",
        "    if not found.enough:\n",
        "    if False:\n",
        _boot("test_a_device_with_nothing_to_compare_is_read_whole"),
    ),
    Fault(
        "sample-that-can-be-foreseen",
        _SAMPLE,
        "_DICE = secrets.SystemRandom()\n",
        "import random\n\n_DICE = random.Random(1)\n",
        _sample("test_nobody_knows_beforehand_what_is_looked_at"),
    ),
    Fault(
        "provisional-without-a-sample",
        "incbak/engine/base.py",
        "        if self.provisional and not sampling:\n",
        "        if False:\n",
        unit("backup/test_plan", "test_a_provisional_bitmap_is_for_a_run_that_samples"),
    ),
    Fault(
        "provisional-closed-as-clean",
        "incbak/engine/image.py",
        "            bitmap.close(None if provisional else self._kept)",
        "            bitmap.close(self._kept)",
        _boot("test_an_engine_that_only_had_it_open_has_proven_nothing"),
    ),
    Fault(
        "provisional-for-who-does-not-sample",
        "incbak/bitmap/judge.py",
        "        if sampling and set_up_anew(slot.fingerprint, disk):\n",
        "        if set_up_anew(slot.fingerprint, disk):\n",
        unit("bitmap/test_device_writes", "test_writes_since_the_clean_end"),
    ),
)

"""Faults of what is believed of a disk that nobody tracked: its ctime, its identity, samples of it."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_CONTINUITY, _TRACKER = "incbak/bitmap/continuity.py", "incbak/serve/tracker.py"
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
        "    if disk.mtime_ns < began.mtime_ns or disk.ctime_ns < began.ctime_ns:\n",
        "    if False:\n",
        unit("bitmap/test_found_on_open", "test_the_image_was_put_back_after_a_power_cut"),
    ),
    Fault(
        "writes-not-noted-before",
        _TRACKER,
        "            self._note(now + NOTED_NS | BUSY)\n",
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
        " and not self._inside and not any(slot.locked() for slot in self._slots):\n",
        ":\n",
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
        "        length, self._out_len = self._out_len, 0\n        self._rest()\n",
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
        "            tracked.disk.flush_times()\n",
        "            tracked.disk.flush()\n",
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
)

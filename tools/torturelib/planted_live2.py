"""Planted faults: the reason in the record is the true one, and what is left in a QEMU can be seen and removed."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_AUDIT = "tests/story/test_audit.py::"

FAULTS = [
    Fault(
        "reason: a bitmap that is found wrong is forgotten with its reason",
        "incbak/backup/verify.py",
        "await engine.invalidate(planned.plan.disk, name, Reason.AUDIT)",
        "await engine.commit([])",
        (f"{_AUDIT}test_verify_finds_it_too_and_the_bitmap_stays_invalid",),
    ),
    Fault(
        "reason: serve says that a bitmap is invalid and goes on believing it",
        "incbak/serve/commands/bitmaps.py",
        '    bitmap.invalidate(Reason(args["reason"]))\n',
        '    bitmap.reason = Reason(args["reason"])\n',
        unit("serve/test_transaction", "test_a_bitmap_that_is_found_wrong_stays_with_the_reason"),
    ),
    Fault(
        "reason: an image that is off forgets the reason when it is closed",
        "incbak/engine/image.py",
        "            bitmap.invalidate(reason)\n            bitmap.close(None)\n",
        "            bitmap.close(self._found)\n",
        (f"{_AUDIT}test_verify_finds_it_too_and_the_bitmap_stays_invalid",),
    ),
    Fault(
        "reason: a damaged file that was put aside is a failed mark",
        "incbak/bitmap/judge.py",
        "    found = read_header(path)\n    if isinstance(found, Reason):\n        return found\n    if found.length",
        "    found = read_header(path)\n    if isinstance(found, Reason):\n        return Reason.TRACKING_FAILED\n"
        "    if found.length",
        unit("bitmap/test_found_on_open", "test_a_damaged_file_that_was_put_aside_keeps_its_reason"),
    ),
    Fault(
        "reason: a clear that was killed is by hand",
        "incbak/bitmap/file.py",
        "reason=Reason.BITMAP_INCONSISTENT.value",
        "reason=Reason.INVALIDATED.value",
        unit("bitmap/test_found_on_open", "test_a_clear_that_was_killed_is_not_said_to_be_by_hand"),
    ),
    Fault(
        "reason: a QEMU that was killed under watch leaves no word",
        "incbak/watch/vm.py",
        "                note_end(disk.store.directory, Reason.UNSAVED)\n            raise\n",
        "                note_saved(disk.store.directory)\n            raise\n",
        ("tests/live/test_qemu_watch_steps.py::test_qemu_is_killed",),
    ),
    Fault(
        "reason: a dead watch is taken for one that watches",
        "incbak/bitmap/lost.py",
        "(note.state == _WATCHED and not alive)",
        "(note.state == _WATCHED and not note.boot)",
        unit("bitmap/test_lost", "test_a_watch_that_died_has_left_the_vm_alone"),
    ),
    Fault(
        "reason: a watch that comes again forgets what the last one has not told",
        "incbak/bitmap/lost.py",
        "        if before.state:\n",
        "        if False:\n",
        unit("bitmap/test_lost", "test_a_watch_that_died_has_left_the_vm_alone"),
    ),
    Fault(
        "reason: an end here explains backups of other hosts",
        "incbak/backup/plan.py",
        "record.origin is None and record.host == known.host\n    return",
        "True\n    return",
        unit("backup/test_plan", "test_only_a_backup_of_this_host_is_lost_with_its_vm"),
    ),
    Fault(
        "reason: a bitmap that was never loaded says nothing",
        "incbak/bitmap/lost.py",
        "said_invalid(header.slot) or Reason.UNWATCHED",
        "said_invalid(header.slot) or Reason.UNSAVED",
        unit("bitmap/test_lost", "test_the_file_that_a_bitmap_was_loaded_from_says_why"),
    ),
]

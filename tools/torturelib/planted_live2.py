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
        "    bitmap.invalidate(Reason(args[\"reason\"]))\n",
        "    bitmap.reason = Reason(args[\"reason\"])\n",
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
]

"""Faults that would let a backup of an image that is off damage the image, its guest or another's data."""

from __future__ import annotations

from torturelib.planted import Fault, unit

_DAEMON, _OFFLINE, _QCOW2 = "incbak/engine/private_daemon.py", "incbak/engine/offline.py", "incbak/disk/qcow2.py"


def _off(*tests: str) -> tuple[str, ...]:
    return tuple(f"tests/interop/test_offline_harm.py::{test}" for test in tests)


FAULTS = (
    Fault(
        "off-dirty-image-has-bitmaps",
        _OFFLINE,
        "if why := self._image.unwritable():",
        'if why := "":',
        _off("test_an_image_whose_refcounts_are_stale_is_read_and_not_written"),
    ),
    Fault(
        "off-dirty-image-is-cleaned-up",
        _OFFLINE,
        "if not disk.can_persist or not any(",
        "if not any(",
        _off("test_a_dirty_image_with_bitmaps_is_not_cleaned_up_either"),
    ),
    Fault(
        "off-corrupt-image-is-read",
        _OFFLINE,
        "        image.check()\n",
        "",
        _off("test_a_corrupt_image_is_refused_unread"),
    ),
    Fault(
        "off-header-not-looked-at-again",
        _DAEMON,
        "if why := self._image.unwritable():",
        'if why := "":',
        _off("test_an_image_that_became_dirty_during_the_copy_is_not_written"),
    ),
    Fault(
        "off-changed-image-is-written",
        _DAEMON,
        "if self._image.changed():",
        "if False:",
        _off("test_an_image_that_was_written_during_the_copy_is_not_written"),
    ),
    Fault(
        "qcow2-dirty-bit-ignored",
        _QCOW2,
        "if self.features & Feature.DIRTY:",
        "if False:",
        unit("disk/test_qcow2", "test_an_image_with_a_dirty_or_corrupt_bit_is_not_written"),
    ),
    Fault(
        "qcow2-name-outside-of-the-header",
        _QCOW2,
        "if not 0 < length <= MAX_NAME or at + length > len(cluster):",
        "if False:",
        unit("disk/test_qcow2", "test_a_header_outside_of_its_limits_is_refused"),
    ),
)

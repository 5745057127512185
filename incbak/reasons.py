"""Reason codes: why a bitmap is invalid, or why a disk was read whole. Printed, and stored in backup records."""

from __future__ import annotations

from enum import StrEnum


class Reason(StrEnum):
    """One cause each; the text is what a user reads."""

    REQUESTED = "requested"
    NO_BASE = "no-base"
    BASE_MISSING = "base-missing"
    BASE_DAMAGED = "base-damaged"
    BITMAP_MISSING = "bitmap-missing"
    BITMAP_INCONSISTENT = "bitmap-inconsistent"
    BITMAP_BUSY = "bitmap-busy"
    BITMAP_DISABLED = "bitmap-disabled"
    GRANULARITY = "granularity"
    SUPERSEDED = "superseded"
    BACKING_CHANGED = "backing-changed"
    RESIZED = "resized"
    NEW_DISK = "new-disk"
    HEADER = "header"
    FORMAT = "format"
    DIGEST = "digest"
    COARSE_MAP = "coarse-map"
    DISK_CHANGED = "disk-changed"
    UNPROVEN = "unproven"
    WRONG_DISK = "wrong-disk"
    UNCLEAN_SHUTDOWN = "unclean-shutdown"
    INVALIDATED = "invalidated"
    TRACKING_FAILED = "tracking-failed"
    UNSAVED = "unsaved"
    UNWATCHED = "unwatched"
    UNFLUSHED = "unflushed"
    AUDIT = "audit"

    @property
    def text(self) -> str:
        """A phrase that completes "read everything: ..."."""
        return _TEXT[self]


_TEXT = {
    Reason.REQUESTED: "a full backup was asked for",
    Reason.NO_BASE: "there is no earlier backup of this disk in the repository",
    Reason.BASE_MISSING: "the backup that the bitmap belongs to is not in the repository",
    Reason.BASE_DAMAGED: "the base is damaged in the repository",
    Reason.BITMAP_MISSING: "the disk has no bitmap of a backup in this repository",
    Reason.BITMAP_INCONSISTENT: "the engine did not save the bitmap at its last end",
    Reason.BITMAP_BUSY: "another job uses the bitmap",
    Reason.BITMAP_DISABLED: "the bitmap was not recording",
    Reason.GRANULARITY: "the bitmap's granularity is not the repository's cluster size",
    Reason.SUPERSEDED: "the bitmap of the newest backup of the disk is not here, only an older one",
    Reason.BACKING_CHANGED: "a backing file of the disk was changed since the base",
    Reason.RESIZED: "the disk has another size than in the base",
    Reason.NEW_DISK: "the base does not have this disk",
    Reason.HEADER: "the bitmap's header does not verify",
    Reason.FORMAT: "the bitmap file is not one, or of another version",
    Reason.DIGEST: "the bitmap's bits do not match their digest",
    Reason.COARSE_MAP: "the bitmap's coarse map does not verify",
    Reason.DISK_CHANGED: "the disk was changed while nobody tracked it",
    Reason.UNPROVEN: "nothing shows that no other program changed the disk meanwhile",
    Reason.WRONG_DISK: "the bitmap belongs to another disk",
    Reason.UNCLEAN_SHUTDOWN: "the host went down without a clean shutdown",
    Reason.INVALIDATED: "the bitmap was invalidated by hand",
    Reason.TRACKING_FAILED: "a write could not be recorded in the bitmap",
    Reason.UNSAVED: "incbak watch could not save the bitmap when QEMU ended, or load it at the next start",
    Reason.UNWATCHED: "the VM ran without incbak watch",
    Reason.UNFLUSHED: "QEMU does not flush the image (cache=unsafe), so after a power cut its bitmap may lack writes",
    Reason.AUDIT: "a cluster that the bitmap calls clean was found changed",
}

"""One bitmap file, open: the mapping, the marks, and the flag protocol that the package docstring tells."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from enum import StrEnum
from pathlib import Path

import numpy as np

from incbak import durable, host
from incbak.bitmap import bits as kernels
from incbak.bitmap import format as fmt
from incbak.bitmap.body import digest_of, open_body
from incbak.bitmap.format import REGION, REGION_SHIFT, TOUCHED, UNTOUCHED, Flag, Slot
from incbak.bitmap.judge import Found
from incbak.bitmap.page_cache import page_cache_id
from incbak.errors import BitmapError, DurabilityError
from incbak.extents import Extent
from incbak.fingerprint import Beat, Fingerprint, beat_of
from incbak.reasons import Reason

__all__ = ["EMPTY", "Bitmap", "Found", "State"]

durable.declare(
    "bitmap.clear-first-slot",
    "bitmap.clear-second-slot",
    "bitmap.region-set",
    "bitmap.region-synced",
    "bitmap.close-bits",
    "bitmap.close-first-slot",
    "bitmap.close-second-slot",
)

EMPTY = Fingerprint(0, 0, 0, bytes(16))


class State(StrEnum):
    """``CLEAN``: the flag is set on disk. ``DIRTY``: it is cleared there. ``INVALID``: tracks no more. ``CLOSED``."""

    CLEAN = "clean"
    DIRTY = "dirty"
    INVALID = "invalid"
    CLOSED = "closed"


class Bitmap:
    """The clusters of a disk written since one backup. Safe for many threads; one owner (`BitmapStore.lock`).

    ``known[region]`` is not 0 once the flag is cleared *and* the coarse byte of that region is durable in this session:
    a writer may look at it without a lock and skip `touch`. It is never set on what is only in memory.
    """

    persistent = True

    def __init__(self, path: Path, slot: Slot, found: Found, state: State) -> None:
        self.path, self.slot, self.found, self.state = path, slot, found, state
        self.name, self.size, self.granularity = slot.name, slot.size, slot.granularity
        self.reason: Reason | None = None
        self.enabled = bool(slot.flags & Flag.ENABLED)
        self.known = bytearray(slot.regions)
        self._shift = slot.granularity.bit_length() - 1
        self._fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            self._stored = open_body(self._fd, path, slot)
        except BaseException:
            os.close(self._fd)
            raise
        self._bits, self._coarse = self._stored.bits, self._stored.coarse
        self._body = self._stored.array[fmt.HEADER :]
        self._view = memoryview(self._bits)  # type: ignore[arg-type]
        self._lock = threading.Lock()
        self._sync_lock = threading.Lock()
        self._started = self._done = 0
        self._durable = bytearray(slot.regions)
        self._failed = False
        """Something could not be made durable, and the bitmap not yet invalid: no call may succeed before it is."""

    @contextmanager
    def _syncing(self) -> Iterator[None]:
        """Hold the sync lock. A failure within is final: the bitmap is durably invalid before the lock is let go.

        Were it let go earlier, the next thread's sync would succeed, since the kernel reports a failure once only.
        """
        with self._sync_lock:
            if self._failed:
                self._invalidate(Reason.TRACKING_FAILED)
            if self.state is State.INVALID:
                raise BitmapError(f"bitmap {self.name} is invalid", reason=self.reason)
            try:
                yield
            except (OSError, DurabilityError) as e:
                self._failed = True
                self._invalidate(Reason.TRACKING_FAILED)
                why = f"cannot record writes in bitmap {self.name}: {e}"
                raise BitmapError(why, reason=Reason.TRACKING_FAILED) from e

    # -- marking --------------------------------------------------------------------------------------------------

    def mark(self, offset: int, length: int) -> None:
        """Record a write of ``length`` bytes at ``offset``, before it is issued.

        Raises `BitmapError` (`Reason.TRACKING_FAILED`) when the record cannot be made good; then the bitmap has been
        invalidated durably, or the error says that even this failed and the write must not go out.
        """
        if length <= 0:
            return
        self.touch(offset, length)
        self.set_bits(offset, length)

    def set_bits(self, offset: int, length: int) -> None:
        """Set the bits of every cluster that the range touches; ``length`` > 0. `touch` must have gone before."""
        first, last = offset >> self._shift, (offset + length - 1) >> self._shift
        if first == last:
            bit = 1 << (first & 7)
            if not self._view[first >> 3] & bit:
                with self._storing():
                    self._stored.set_bit(first >> 3, bit)
            return
        with self._storing():
            self._stored.set_range(first, last)

    @contextmanager
    def _storing(self) -> Iterator[None]:
        """Hold the lock on the content. A store that fails is as final as a sync that fails: see `_syncing`."""
        try:
            with self._lock:
                yield
        except OSError as e:
            with self._syncing():
                raise OSError(e.errno, f"cannot store: {e.strerror}") from e

    def touch(self, offset: int, length: int) -> None:
        """Make it durable that the regions of the range may be written. One sync per region and bitmap."""
        first, last = offset >> REGION_SHIFT, (offset + length - 1) >> REGION_SHIFT
        if self.known.find(0, first, last + 1) < 0:
            return
        self._begin()
        with self._storing():
            self._stored.touch(first, last + 1)
            wanted = self._started + 1
        with self._syncing():
            durable.crash_point("bitmap.region-set")
            if self._durable.find(0, first, last + 1) >= 0 and self._done < wanted:
                self._sync_regions()
            durable.crash_point("bitmap.region-synced")
            self._durable[first : last + 1] = self.known[first : last + 1] = b"\1" * (last + 1 - first)

    def _sync_regions(self) -> None:
        """One sync for all coarse bytes that were set before it began: who set one waits for it, none skips it."""
        with self._lock:
            self._started += 1
            mine = self._started
        durable.sync_file(self._fd, f"bitmap {self.path}")
        self._done = mine

    def _begin(self) -> None:
        """The flag is off on disk when this returns. Nothing else changes before: the digest is of what is there."""
        if self.state is State.CLEAN:
            with self._syncing():
                if self.state is State.CLEAN:
                    self._clear_flag(self.slot.fingerprint)

    def _clear_flag(self, seen: Fingerprint) -> None:
        """The flag is off on disk when this returns: both slots, each synced. Nothing was written since ``seen``."""
        cache, pid = page_cache_id(self._fd), os.getpid()
        slot = replace(self.slot, cache_id=cache, owner_pid=pid, owner_start=host.start_time(pid) or 0)
        slot = slot.with_flags(self._flags() & ~Flag.CLEAN)
        self._write_slots(slot, "bitmap.clear-first-slot", "bitmap.clear-second-slot")
        self.state = State.DIRTY
        self.heartbeat(seen)

    def _flags(self) -> Flag:
        return Flag.ENABLED if self.enabled else Flag(0)

    def _write_slots(self, slot: Slot, *points: str) -> None:
        """Write ``slot`` over the older copy, sync, then over the other, sync: never both torn."""
        for number, point in enumerate(points):
            step = replace(slot, sequence=slot.sequence + number)
            where = (step.sequence % 2) * fmt.SECTOR
            if os.pwrite(self._fd, fmt.encode(step), where) != fmt.SECTOR:
                raise OSError(f"short write of the header of {self.path}")
            durable.sync_file(self._fd, f"bitmap {self.path}")
            self.slot = step
            durable.crash_point(point)

    def trust_coarse_map(self) -> None:
        """Make the coarse map of an earlier session durable: rewritten, since a failed sync leaves pages clean."""
        self._stored.put_coarse(np.array(self._coarse))
        durable.sync_file(self._fd, f"bitmap {self.path}")
        self._durable[:] = (self._coarse == TOUCHED).astype(np.uint8).tobytes()

    def adopt(self, disk: Fingerprint) -> None:
        """This process owns the file from now on, in this page cache: a later look must not see the former owner."""
        with self._syncing():
            self._clear_flag(disk)

    def last_heartbeat(self) -> Beat | None:
        """The owner's last sign of life; ``None`` if it never gave one."""
        return fmt.decode_beat(self._stored.array[fmt.HEARTBEAT : fmt.HEARTBEAT + fmt.BEAT_SIZE].tobytes())

    def mark_touched_regions(self) -> None:
        """Mark every cluster of the touched regions: what a power cut leaves of the bits is less than was written."""
        per_region = max(1, REGION >> self._shift)
        for region in np.flatnonzero(self._coarse == TOUCHED).tolist():
            first = (region << REGION_SHIFT) >> self._shift
            self._stored.set_range(first, min(first + per_region, self.slot.clusters) - 1)

    # -- reading --------------------------------------------------------------------------------------------------

    def is_dirty(self, offset: int, length: int) -> bool:
        """Whether any cluster of the range is marked."""
        return kernels.any_in_range(self._bits, offset >> self._shift, (offset + length - 1) >> self._shift)

    def runs(self) -> kernels.Runs:
        """The dirty clusters as (first, count)."""
        return kernels.runs(self._bits, self.slot.clusters)

    def extents(self) -> list[Extent]:
        """The dirty bytes, sorted, cut at the disk's size."""
        return kernels.extents_of(self.runs(), self.granularity, self.size)

    def count(self) -> int:
        """How many bytes are dirty; a last partial cluster counts as what it has."""
        whole = kernels.count(self._bits) * self.granularity
        rest = self.size % self.granularity
        if rest and self.is_dirty(self.size - 1, 1):
            whole -= self.granularity - rest
        return whole

    def packed(self, first: int, end: int) -> kernels.Bits:
        """A private copy of some bytes of the packed bits."""
        with self._lock:
            return np.array(self._bits[first:end])

    def snapshot(self) -> kernels.Bits:
        """A private copy of the bits."""
        with self._lock:
            return np.array(self._bits)

    # -- changing -------------------------------------------------------------------------------------------------

    def merge_bits(self, other: kernels.Bits) -> None:
        """Set all bits that ``other`` (packed, of the same granularity and size) has; durable as marks are."""
        found = kernels.runs(other, self.slot.clusters)
        starts = found[:, 0] << self._shift
        lasts = np.minimum(found.sum(axis=1) << self._shift, self.size) - 1
        within = lasts - starts < REGION
        for region in np.unique(np.concatenate([starts[within], lasts[within]]) >> REGION_SHIFT).tolist():
            self.touch(region << REGION_SHIFT, 1)
        for start, last in zip(starts[~within].tolist(), lasts[~within].tolist(), strict=True):
            self.touch(start, last + 1 - start)
        with self._storing():
            self._stored.put_bits(self._bits | other)

    def fill(self, other: kernels.Bits) -> None:
        """As `merge_bits`, in a file that nobody else can know yet: nothing is durable before `close`."""
        for first, count in kernels.runs(other, self.slot.clusters).tolist():
            last = min((first + count) << self._shift, self.size) - 1
            self._stored.touch(first << self._shift >> REGION_SHIFT, (last >> REGION_SHIFT) + 1)
        self._stored.put_bits(self._bits | other)

    def keep_bits(self, other: kernels.Bits) -> None:
        """Clear all bits that ``other`` (packed, of the same granularity and size) does not have.

        The caller has stopped writers. At every moment the bits are a superset of the outcome, so that a kill within
        loses none; the coarse map stays as it is.
        """
        self._begin()
        with self._storing():
            self._stored.put_bits(self._bits & other)

    def clear(self) -> None:
        """Forget all marks. The caller has stopped writers. Interrupted, the bitmap is invalid, never half cleared."""
        self.begin_clear()
        self.end_clear()

    def begin_clear(self) -> None:
        """The first half of `clear`, with writers stopped: on disk the bitmap is invalid until `end_clear`.

        Between them marks count, and `merge_bits` can bring the old ones back.
        """
        self._begin()
        with self._syncing():
            hurt = replace(self.slot, reason=Reason.BITMAP_INCONSISTENT.value).with_flags(self._flags() | Flag.INVALID)
            self._write_slots(hurt, "bitmap.clear-first-slot", "bitmap.clear-second-slot")
            self._stored.put_bits(np.zeros_like(self._bits))
            self._stored.put_coarse(np.full_like(self._coarse, UNTOUCHED))
            self.known[:] = self._durable[:] = bytes(len(self.known))

    def end_clear(self) -> None:
        """The second half: the bitmap may be believed again, with what was marked since."""
        with self._syncing():
            durable.sync_file(self._fd, f"bitmap {self.path}")
            slot = replace(self.slot, reason="").with_flags(self._flags())
            self._write_slots(slot, "bitmap.clear-first-slot", "bitmap.clear-second-slot")

    def set_enabled(self, enabled: bool) -> None:
        """Record writes, or not. The caller has stopped writers."""
        if enabled == self.enabled:
            return
        with self._syncing():
            self.enabled = enabled
            slot = self.slot.with_flags(self.slot.flags & ~Flag.ENABLED | self._flags())
            self._write_slots(slot, "bitmap.clear-first-slot", "bitmap.clear-second-slot")

    def invalidate(self, reason: Reason) -> None:
        """Make it durable that the bitmap is not to be believed; idempotent.

        If the header cannot be written the file is renamed to ``*.invalid``. Raises `BitmapError` if that fails too.
        """
        with self._sync_lock:
            self._invalidate(reason)

    def _invalidate(self, reason: Reason) -> None:
        """``state`` says invalid only when the disk does: whoever reads it lets writes go out untracked."""
        if self.state is State.INVALID:
            return
        try:
            slot = replace(self.slot, reason=reason.value).with_flags(self._flags() | Flag.INVALID)
            self._write_slots(slot, "bitmap.clear-first-slot", "bitmap.clear-second-slot")
        except (OSError, DurabilityError):
            self._bury(reason)
        self.reason, self.state, self.found = reason, State.INVALID, Found.INVALID

    def _bury(self, reason: Reason) -> None:
        grave = self.path.with_name(f"{self.path.name}.invalid")
        try:
            self._put_aside(grave)
            durable.sync_dir(self.path.parent)
        except (OSError, DurabilityError) as e:
            hint = "The disk must not be written until the state directory can be."
            raise BitmapError(f"cannot invalidate bitmap {self.name}: {e}", reason=reason, hint=hint) from e
        self.path = grave

    def _put_aside(self, grave: Path) -> None:
        """Rename the file, or remove it where a full file system refuses that: a missing file is not believed either.

        btrfs keeps a reserve for removals, not for renames.
        """
        try:
            os.rename(self.path, grave)
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            os.unlink(self.path)

    def heartbeat(self, seen: Beat | Fingerprint) -> None:
        """Note that the owner is alive. Never synced; where it cannot be stored, less is believed later."""
        beat = fmt.encode_beat(seen if isinstance(seen, Beat) else beat_of(seen))
        with suppress(OSError), self._lock:
            self._stored.put(fmt.HEARTBEAT, np.frombuffer(beat, dtype=np.uint8))

    def note_writes(self, note: int) -> None:
        """Store until when the owner writes: see `format`. Never synced: it is for a kill, not for a power cut.

        So after a kill its last writes are told from later ones of others.
        """
        try:
            self._stored.note(note)
        except OSError:  # less is believed later
            pass

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self, fingerprint: Fingerprint | None) -> None:
        """Let go. With the ``fingerprint`` of the flushed disk: a clean shutdown, the flag is set last.

        The order: bits and coarse map synced; digest and fingerprint in one slot with the flag, synced; the other slot.
        Raises `BitmapError` when that fails; then the bitmap is durably invalid, or stays unclean. Closed in any case.
        """
        if self.state is State.CLOSED:
            return
        try:
            if fingerprint is not None and self.state is not State.INVALID and self._must_write(fingerprint):
                with self._syncing():
                    self._set_flag(fingerprint)
        finally:
            self.state = State.CLOSED
            os.close(self._fd)
            self._view.release()
            self._release()

    def _set_flag(self, fingerprint: Fingerprint) -> None:
        durable.sync_file(self._fd, f"bitmap {self.path}")
        durable.crash_point("bitmap.close-bits")
        clean = replace(self.slot, digest=digest_of(self._body), fingerprint=fingerprint)
        flags = self._flags() | Flag.CLEAN
        self._write_slots(clean.with_flags(flags), "bitmap.close-first-slot", "bitmap.close-second-slot")

    def _must_write(self, fingerprint: Fingerprint) -> bool:
        return self.state is State.DIRTY or fingerprint != self.slot.fingerprint

    def _release(self) -> None:
        del self._bits, self._coarse, self._body, self._stored

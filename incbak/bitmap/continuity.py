"""Whether nobody but the owner of a bitmap wrote to its disk, from the owner's last sign of life until now.

The rule: a bitmap is believed where that is shown, and what is unknown shows nothing. Pure; `now` is a parameter.

- After a clean end: the file has the inode, the time of change and the ``ctime`` that it had then, to the nanosecond. A
  program that puts ``mtime`` back (``touch -r``, ``cp -p``) cannot put back ``ctime``. An owner, mode or number of
  links that is another now moves ``ctime`` too, and does not show that nothing else did: a ctime that moved proves
  nothing, whatever else moved. So ``chown``, ``chmod``, ``ln``, ``mv`` and new labels cost one reading of the whole
  disk. Where a manager of VMs does that at each start and end, only the owner of the images can know that nothing else
  moves it: told so (``--ignore-ctime``), who records the fingerprint leaves the ctime out of it (`without_ctime`), for
  all that judge.
- After a kill: both times are those that the owner saw at its last sign of life, or are of its own later writes. The
  owner notes before a write until when it may write, and after the last of those in flight that it is done
  (`Beat.until_ns`). So own writes are no later than that; where some were in flight, no later than that and the time
  that a thread may need from there into the kernel (`OWN_WRITE_NS`). Later times mean another program; older ones mean
  that the file was put back or the clock was set back. A clock that is behind the last sign of life proves nothing. Not
  told apart: what another program writes within the tick of the last own write, or within `OWN_WRITE_NS` where writes
  were in flight when the owner was killed.
- After a power cut: the last sign of life on the disk may be old by as long as the kernel keeps dirty pages, and so may
  the times of the file. Both times lie before that, and before this boot began; and they are no older than those that
  the owner knew to be durable: when the bitmap began or was last closed, and once a minute (`Beat.durable_ns`). Nor are
  they between what was seen at the last sign of life and its clock. Others mean that the file was put back, or written
  by a system with another clock.
- After a kill, where the page cache was lost within the boot (`incbak.bitmap.page_cache`): as after a power cut, since
  no time after the boot began is known at which it still was there. So an image that was written in this boot is not
  believed. A block device is, if its count is that of the last sign of life that is left: nothing was written since.
- A block device: `incbak.device` tells the same as then, in the same boot and the same set-up of the device. After a
  kill this holds only where all was on the device at the last sign of life. After a clean end, in another boot or
  set-up, nothing counts; its owner may ask for a sample instead (`set_up_anew`, `incbak.backup.sample`).
- A file whose times show nothing (`incbak.times`): nothing counts, once its owner has let go of it.
"""

from __future__ import annotations

from incbak.device import grain, may_come_again
from incbak.fingerprint import NO_WRITES, Beat, Fingerprint
from incbak.reasons import Reason

CLOCK_SLACK_NS = 1_000_000_000
"""By how much a clock that is only kept right may go back."""
OWN_WRITE_NS = 100_000_000
"""How much later than it noted before an owner may have written: its threads wait for one another and for the CPU."""
POWER_CUT_SLACK_NS = 120_000_000_000
"""The same after a power cut: the kernel writes dirty pages back after some 35 s."""


def changed(before: Fingerprint, now: Fingerprint) -> Reason | None:
    """Why a disk that nobody should have written to is not what it was, or ``None``."""
    if now.size != before.size:
        return Reason.RESIZED
    if now.writes[:16] != before.writes[:16]:
        return Reason.UNPROVEN
    if now[:4] != before[:4] or now.writes != before.writes:
        return Reason.DISK_CHANGED
    if before.ctime_ns and now.ctime_ns != before.ctime_ns:
        return Reason.DISK_CHANGED if now.attributes == before.attributes else Reason.UNPROVEN
    return None


def set_up_anew(before: Fingerprint, now: Fingerprint) -> bool:
    """Return whether a block device was let go of cleanly, and only its count, begun anew, shows nothing."""
    device = before.writes != NO_WRITES and now.writes != NO_WRITES and not now.inode
    return device and now[:4] == before[:4] and now.writes[:16] != before.writes[:16]


def bypassed(beat: Beat, disk: Fingerprint, now_ns: int) -> Reason | None:
    """Why another program may have written since ``beat``, the last of an owner that was killed in this boot."""
    if disk.writes != beat.writes:
        return Reason.UNPROVEN
    if not disk.mtime_ns:
        return None
    if max(beat.clock_ns, beat.until_ns) > now_ns + CLOCK_SLACK_NS:
        return Reason.UNPROVEN
    latest = max(beat.clock_ns, beat.until_ns)
    for time_ns, seen_ns in ((disk.mtime_ns, beat.mtime_ns), (disk.ctime_ns, beat.ctime_ns)):
        if seen_ns and time_ns == seen_ns:
            continue
        if time_ns > latest:
            return Reason.DISK_CHANGED
        if seen_ns and time_ns and time_ns < beat.clock_ns - grain(time_ns):
            return Reason.DISK_CHANGED
    return None


def bypassed_in_a_power_cut(
    beat: Beat, began: Fingerprint, disk: Fingerprint, booted_ns: int, now_ns: int
) -> Reason | None:
    """The same, of an owner that went down with its host, or whose page cache was lost; boot began at ``booted_ns``.

    ``began``: what the disk was when the bitmap began to record or was last closed.
    """
    if disk.writes != beat.writes:
        return Reason.UNCLEAN_SHUTDOWN
    if not disk.mtime_ns:
        return None
    if beat.clock_ns > now_ns:
        return Reason.UNPROVEN
    latest = min(beat.clock_ns + POWER_CUT_SLACK_NS, booted_ns)
    mtimes = (disk.mtime_ns, beat.mtime_ns, max(began.mtime_ns, beat.durable_ns[0]))
    ctimes = (disk.ctime_ns, beat.ctime_ns, max(began.ctime_ns, beat.durable_ns[1]))
    for time_ns, seen_ns, oldest_ns in (mtimes, ctimes):
        if not oldest_ns <= time_ns <= latest:
            return Reason.DISK_CHANGED
        if seen_ns and seen_ns < time_ns < beat.clock_ns - grain(time_ns):
            return Reason.DISK_CHANGED
    return None


def may_repeat(fingerprint: Fingerprint, now_ns: int) -> bool:
    """Whether a write after ``now_ns`` could leave the file's times as they are. A clock set back is no reason."""
    return any(may_come_again(each, now_ns) for each in (fingerprint.mtime_ns, fingerprint.ctime_ns) if each)

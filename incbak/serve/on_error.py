"""``on-source-error``, ``on-target-error``: what a job does when it cannot read the one or write to the other.

==========  ================================================================================
``report``  the job fails
``ignore``  the same is tried again, a little later, until it works or the job is cancelled
``stop``    the job rests until it is told to resume, and then tries the same again
``enospc``  as ``stop`` where storage is full, else as ``report``
``auto``    as ``enospc``
==========  ================================================================================

So whatever the policy, a job that is done has copied everything. What is tried again is the reading of old content, or
the writing of what was read: the guest may have overwritten it since. Flushes are not tried again; the first failure of
one is final, since it may have dropped what it was to keep.
"""

from __future__ import annotations

import errno
from enum import StrEnum

RETRY = 0.1
"""Seconds until something is tried again that is to be ignored."""


class Action(StrEnum):
    """QEMU's BlockErrorAction."""

    REPORT = "report"
    IGNORE = "ignore"
    STOP = "stop"


class OnError(StrEnum):
    """QEMU's BlockdevOnError."""

    REPORT = "report"
    IGNORE = "ignore"
    ENOSPC = "enospc"
    STOP = "stop"
    AUTO = "auto"

    def action(self, code: int) -> Action:
        """What is done about an error of this errno."""
        if self in (OnError.ENOSPC, OnError.AUTO):
            return Action.STOP if code == errno.ENOSPC else Action.REPORT
        return Action(str(self))

"""The torture campaign: seeded, replayable, with an oracle.

A *world* is a disk image, a state directory and a repository. A *model* knows every write that was issued and which of
them were acknowledged. A *round* does work in forked children of this process (so that a start costs milliseconds),
hurts one of them, recovers by the ordinary commands, and then restores and compares:

- the image holds every acknowledged write; only the one write in flight may be there or not (or in part);
- the next incremental restores to exactly the image;
- a backup that was made while the guest wrote equals the disk after some prefix of the writes, one that contains all
  writes acknowledged before the backup began: a point in time;
- every backup ever made still restores to what it held.

Outcomes: ``correct``, ``correct-after-full-read`` (with the reason), ``refused`` (a clear error, nothing made), and
``lost``: silent loss, which must be 0.

``--planted`` is about the tests instead of the tool: `planted`.
"""

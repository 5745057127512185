"""``incbak serve``: a small engine that exports raw images over NBD, tracks writes, copies points in time, takes QMP.

::

    NBD connections (threads) --> export --> tracker --> gate, bitmaps, copy-before-write --> disk
    QMP clients (asyncio, main thread) --> monitor --> commands (one worker thread) --> vm --> transaction, jobs
    jobs (a thread each) --> disk | scratch --> NBD target | raw file | qemu-nbd --> qcow2 file | another disk

**A write**, in this order; each step is there for one of the invariants:

1. the *gate* is entered: a transaction that drains the disk waits for this write, or this write for the transaction;
2. every recording bitmap: the region is made durable (flag cleared, coarse map) unless known, then the bits are set;
3. every copy-before-write: clusters still to be copied are saved first;
4. the write goes to the disk. If it fails, the bits stay: too many are safe.

A write to a cluster in which 2 and 3 have nothing left to do finds that out in one look at the *settled map* of the
disk (`tracker`), whatever the number of bitmaps and jobs. The map is replaced, empty, whenever a bitmap or a job
comes, goes or is cleared, which happens only while the disk is drained.

**Which operation beside which**

=====================  =======================================================================================
write, zero, trim      beside each other and beside reads and flushes; never beside a commit of a transaction
read, flush            beside everything (a flush covers the writes that have been answered)
transaction            alone among commands; prepares beside the guest, applies with the guest drained
resize                 alone among commands, never beside a job of that disk; changes the size with it drained
job loop               beside the guest; a write to the very run that the job is reading waits for that read
monitor command        one at a time, in the order of arrival, whatever the number of clients
=====================  =======================================================================================

**Locks, outermost first**: the gate, a copy-before-write's lock, a bitmap's own lock. A job takes the gate only
to drain (when it ends), holding nothing else.

**Bounds**

* A guest write never waits for a target. It waits at most for the job's read of one run (1 MiB), and for its own old
  content to be read and written to scratch, at most `cbw.TIMEOUT` (10 s); then the backup breaks and the write goes on
  (``break-snapshot``), or the write fails (``break-guest-write``).
* A transaction drains for the slowest write in flight plus the swap of pointers and the copying of bits. A trim or a
  write of zeroes over terabytes is made in pieces of 256 MiB, between which transactions get in, with one sync for all
  the regions that it touches; holes of the disk are old content that need not be read. The 10 s are for all its pieces.
* What one request is told of a bitmap (4096 stretches), or has prefetched (1 GiB), is bounded whatever its length.
* Scratch: `Budget.limit` bytes for all jobs and points in time together; default half of what is free in its directory.
* SIGTERM: connections get 10 s to end their requests, then disks are flushed and bitmaps closed clean. A second one:
  the process is gone within 5 s, at the price of recovery (not of bits) at the next start.
* A monitor message is at most 1 MiB and 64 levels deep; a client that does not read its replies is dropped at 8 MiB.
"""

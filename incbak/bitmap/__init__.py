"""Bitmaps that outlive their owner: which clusters of a disk were written since one backup, or that nobody knows.

Layers, upper ones first: `store` (the state directory, its lock, what is found on open), `file` (one open bitmap: the
marks, the flag), `body` (its content in memory and in the file), `format` (the header, pure), `bits` (kernels on packed
bits, pure).

The promise (I2): the durable dirty set has every cluster that differs from the base, or the bitmap is invalid, with a
`Reason`. Nothing is repaired by guessing. The flag is Stefan Hajnoczi's idea (drive-backup thread, 2013); the coarse
map and the rules for failures come on top.

The flag protocol
-----------------
The header has two slots of a sector each; the newest that verifies decides. A change of the header goes over the older
slot and is synced, then over the other and is synced: a torn write never meets the newest slot. In a session:

1. The first change clears the flag in both slots, and writes the id of this page cache, and this process, into them.
   Nothing else in the file changes before, since the digest is of what is there.
2. The first mark in a 64 MiB region sets its byte in the coarse map and syncs the file. Only what a *finished* sync is
   known to cover is skipped later; a byte that another thread has set and still syncs is waited for (L1). Threads that
   wait share the next sync, for it begins after they have set their bytes.
3. The bits are stored, under a lock, by ``pwrite`` (see `body`), so that the page cache has them. They are not synced:
   the page cache keeps them when the process dies, and the coarse map stands for them when the host does, or when the
   file system is mounted again (`page_cache`).
4. Only then does the write go out. Whatever becomes of it, the bits stay.

And at a clean end, when the writers are gone and the disk is flushed:

5. Bits and coarse map are synced.
6. The digest of both, the fingerprint of the disk and the flag go into one slot, synced, then into the other, synced.

Why that is enough. A flag that is set on disk was set after 5, so it has every bit; no write of the session before it
can come later, and none of the session after it comes before 1 is durable. With the flag clear, a process that dies
leaves 3, which comes before 4. A host that dies leaves 2, which is durable before 4: each written cluster lies in a
touched region. `clear` keeps the bitmap marked invalid on disk while it is between two states; `merge_bits` touches
before it sets; `keep_bits` only takes away what its caller no longer needs, and leaves the coarse map as it is.

It counts from the instant at which the bitmap began to record. What the guest had written before and not flushed is in
the backup, and a power cut may take it from the disk in regions that nobody has touched since. So a backup counts only
when the disk was flushed after its instant: `incbak.serve.backup_job` and `incbak.engine.image` see to it.

When a sync, a store or a header write fails, that is final: the bitmap is made invalid on disk while the sync lock is
still held, because the kernel reports a lost page once and the next thread's sync would succeed. If the header cannot
be written, the file is renamed to ``*.invalid``, or removed where a full file system refuses that. If that fails too,
the mark fails, `State` does not say invalid, and the write must not go out. So ``State.INVALID`` always means: invalid
on disk, writes may go on untracked.

Found on open
-------------
From top to bottom; the first row that fits decides.

===================================================  =======================================  ==========================
found                                                means                                    what is done
===================================================  =======================================  ==========================
no file, or only ``NAME.bitmap.invalid``             marking failed, nor could the header     invalid: tracking-failed
                                                     be written
only ``NAME.bitmap.invalid``, its header damaged     the header was damaged, or of another    invalid: header, format
                                                     version, when its disk was opened
neither slot has our magic and version               another kind of file, a newer incbak     invalid: format, untouched
neither slot verifies; the file cannot be read       rot                                      invalid: header
the newest slot says invalid                         made invalid earlier                     invalid: the reason in it
another disk uuid, or another name                   copied or renamed                        invalid: wrong-disk
another disk size                                    resized                                  invalid: resized
a file size that is not what the header asks for     cut, or grown                            invalid: header
flag set, but only one slot verifies                 rot: both were durable at the end        invalid: header
flag set, another fingerprint (time, inode, sample,  written, replaced or rolled back         invalid: disk-changed
ctime)
flag set, another ctime, and another owner, mode or  nobody knows                             invalid: unproven
number of links
flag set, a block device to which the kernel has     written by another program               invalid: disk-changed
counted writes since
flag set, a block device in another boot, set up     nobody knows                             invalid: unproven; or,
anew, or not counted                                                                          for a caller that samples,
                                                                                              ``PROVISIONAL``
flag set, another digest                             rot; an older copy of a part             invalid: digest
flag set, all of these match                         a clean end                              used: ``CLEAN``
flag clear, another inode, same boot                 replaced                                 invalid: disk-changed
flag clear, another inode, other boot                replaced, or a file system that renames  invalid: unclean-shutdown
                                                     them
flag clear, same page cache, a time of the image     written or put back by another program   invalid: disk-changed
that the owner did not see, and that is not of the
0.1 s after its last writes
flag clear, other boot, a time of this boot, of more written by another program, or put back  invalid: disk-changed
than 120 s after the last sign of life, or from      to before the bitmap
before the bitmap began
flag clear, a clock behind the last sign of life     the clock was set back                   invalid: unproven
flag clear, same page cache, a block device whose    the owner's last writes, or others       invalid: unproven
count is not what the owner saw
flag clear, same boot, another page cache, what      the bits may be lost with the page       invalid: unproven
would make it invalid in another boot                cache, and nobody knows
flag clear, other boot, a block device               nobody knows                             invalid:
                                                                                              unclean-shutdown
flag clear, a coarse byte that is neither value      rot                                      invalid: coarse-map
flag clear, same page cache                          the owner was killed                     used: ``RECOVERED``
flag clear, another page cache                       the host went down, or the state         used: ``COARSE``, all of
                                                     directory was mounted again              each touched region dirty
===================================================  =======================================  ==========================

How the times and counts are compared, and why: `incbak.bitmap.continuity`.

The lock on the directory is held before anything is opened, so no owner is alive then. What is used is made this
owner's before it is handed out: the coarse map is rewritten and synced (a byte may have been set and never synced),
after a power cut together with the bits that it added; then the header gets this page cache. A power cut in between
finds the former one, and does the same again.

What is not used is made invalid on disk by `incbak serve` before its guest can write (`BitmapStore.give_up`): the next
look might find nothing wrong any more, and would believe a bitmap in which nobody had recorded.

Held by tests
-------------
``tests/unit/bitmap/test_protocol.py``: 1 by test_the_flag_is_cleared_and_synced_before_the_first_mark_returns and
test_threads_wait_until_the_flag_is_cleared; 2 by test_the_coarse_byte_is_synced_after_it_was_set,
test_no_thread_skips_a_sync_that_another_has_only_begun and test_a_region_set_after_a_sync_began_waits_for_the_next;
3 by test_threads_lose_no_bit; 5 and 6 by test_the_flag_is_set_last and test_the_older_slot_is_overwritten_first;
`clear` by test_clearing_is_invalid_until_it_is_whole; failures by
test_a_failed_sync_is_final_for_the_threads_behind_it, test_where_the_header_cannot_be_written_the_file_is_renamed and
test_where_even_that_fails_no_write_may_go_out.
``tests/unit/bitmap/test_found_on_open.py``: the table, with a child process killed at each crash point.
``tests/property/test_bitmap_model.py``: test_a_bitmap_is_a_set_of_clusters loses the power at every sync, and any
subset of the sectors that were not synced; ``tools/torture --target power`` does so with the image as witness.
"""

"""``incbak watch``: the bitmaps in a running QEMU's memory, kept over clean shutdowns in our own bitmap files.

QEMU stores dirty bitmaps in qcow2 images of version 3 only. For all other images they are gone when it ends. So watch
has the VM pause when the guest shuts it down, saves the bitmaps, and ends QEMU itself; and at the next start, with the
VM still paused, it puts them back.

While the VM runs nobody marks anything in a file, so no file may be believed: unlike those of ``incbak serve``, which
an owner that was killed leaves usable, they are marked *invalid*. The life of a bitmap's file:

1. **Load** (`loading`), of a VM in state ``prelaunch``: the file's flag is set and its fingerprint is the image's. The
   bits are read, then the file is made invalid, durably.
2. A bitmap begins to record on the disk, *then* it is looked whether anything has been written since QEMU opened the
   image. What is written later is in that bitmap, so nothing depends on the VM staying paused.
3. The bits go to a node of their own. One transaction makes the disk's bitmap of them and of the one that has recorded,
   so at no time does QEMU have a bitmap that records, has the name, and lacks a bit. Only then the user is told, and
   ``cont`` is given.
4. **Save** (`saving`), of a VM in state ``shutdown``: the bits are read; QEMU's bitmaps are looked at again; ``quit``.
5. When the monitor's connection has ended and QEMU's process has closed the images (where the process is not seen:
   when nobody has them open for writing), each image is synced, and its fingerprint taken. It must be the one from
   before ``quit`` (of a raw image; other formats write when they are closed). The VM may not have run in between.
6. Only now is there a file with its flag set: complete, durable, under its name in one step
   (`incbak.bitmap.saved`). The older files of the disk go.

Whatever fails or is killed in between leaves an invalid file, or none, and the disk is read whole. Both fingerprints
are taken when the clock has gone past the image's time of change, so that a later write shows in it.

=========================================  ========================================================================
found when watch attaches                  what is done
=========================================  ========================================================================
``prelaunch``, nothing written             files are loaded; those that cannot be believed are made invalid
``prelaunch``, but a disk was written      all files are made invalid: ``unwatched``
the VM runs, is paused, or is migrated     the same; QEMU's own bitmaps have recorded all along and are saved at the
                                           end: so watch itself may be killed and started again
``shutdown``                               a dead watch has not saved: this one does, and ends QEMU
a disk is plugged in later                 its files are made invalid; it is watched from then on
no disk to watch                           the VM is started if that was asked for, and ends as it would without us
=========================================  ========================================================================

What QEMU has is trusted as `incbak incremental` trusts it: only bitmaps with our names that record and are neither busy
nor inconsistent. A reset of the guest changes nothing. A guest that panics has shut down, unless that is asked for to
be otherwise: told to pause at a shutdown, QEMU pauses then too. ``quit`` by somebody else, or a signal to QEMU, ends it
at once: the bitmaps are lost, and the next backup reads everything. Watch notes when and why (`incbak.bitmap.lost`), so
that the reason in the next record is the true one.

A VM that ran without watch is told by its image's times of change. A manager of VMs that changes the owner or label of
the image at each start and end (libvirt) moves its ctime, and then nothing shows that nobody wrote: the disk is read
whole at each start, unless ``ignore_ctime`` says that only such a manager moves it. On a block device, which has none,
by the sectors that the kernel has counted. That count begins anew when the host boots or the device is set up again,
and then nothing shows that nobody wrote either.
"""

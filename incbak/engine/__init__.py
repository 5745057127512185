"""Engines: whoever runs the disks. The runner sees one interface, `base`; `detect` finds which one a SOURCE is.

================  ==========================================  ===================================================
engine            who writes to the disk                      where the bitmaps are
================  ==========================================  ===================================================
`served`          ``incbak serve``, through its monitor       files of ours: they outlive kills and power cuts
`image`           nobody: a raw image or device that is off   the same files, found by ``--name``
`qemu`            a running QEMU                              in qcow2 (a clean end keeps them), else in its memory
`storage_daemon`  nobody: qcow2 and other formats             in qcow2
================  ==========================================  ===================================================

Three things are called a snapshot, and only the last is a backup:

- An **internal snapshot** (``savevm``, ``qemu-img snapshot``) is in the same qcow2 file as the disk. It costs little to
  make, is lost with the file, and going back to it changes the disk under every dirty bitmap.
- A **backing chain** (an external snapshot) freezes the old file and sends writes to a new one. A copy of the frozen
  file is a point in time; but the guest reads through one more layer from then on, until a commit or a stream has
  copied everything back, and a chain restores only when all its files are there.
- **Copy-before-write** leaves the disk where it is. While a backup runs, old content is saved before the guest
  overwrites it for the first time; when the backup ends, nothing is left. The guest pays one extra copy for each
  cluster that it writes before the backup has read it. This is what all engines here do.

Reverting to a snapshot changes clusters that no bitmap recorded: QEMU refuses it while an image has bitmaps. What a
commit into a qcow2 image writes, its bitmaps record. Where an engine can see more (another image under the device,
another size, an inconsistent bitmap, a changed file), the disk is read whole; after changing an image of ``incbak
serve`` by hand, say ``incbak bitmap invalidate``.

A running QEMU is treated with care that its own modules tell: `qemu` (the order of a run), `qemu_filter` (the nodes of
one disk, and what must not be done while the guest runs), `qemu_jobs`, `qemu_guard` and `guard` (a process of its own
that resumes a stopped VM if the runner dies). `session` puts a deadline on every wait for a monitor.
"""

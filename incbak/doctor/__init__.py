"""``incbak doctor``: what of this host, a repository and a VM would spoil a backup, found before the day it is needed.

Nothing is changed: what must be tried (a write, a sync, a lock) is tried on a file without a name. Each look gives
`Finding`s of three levels:

- *ok*: as it should be, with the fact that was found;
- *warning*: backups work, but something costs more, or protects less, than one may think;
- *fault*: backups or restores fail, or what they rest on does not hold.

``host``: the kernel, the clock, the directories of bitmaps and sockets, QEMU's programs. ``repository``: what is in a
repository, and where it lies. ``source``: a monitor or an image; its disks, how their bitmaps survive a restart, and
what is left out of a backup, with the reason.
"""

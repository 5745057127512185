"""Single files out of a backup, without root: the file systems of a disk are read by the library pytsk3.

::

    cli  ->  copy, library  <== socket pair ==>  worker (pytsk3, a process of its own)
                  |
             the image: verified reads on demand, as for ``incbak export``

What a guest left on its disk may be made to harm who reads it, and the library is a large one in C. So it runs in the
``worker``: a process that has one socket, no repository and no key, cannot open a file, may use so much memory and no
more, and is nobody when we are root. If it crashes, that is an error like any other. It asks for parts of the disk, and
says what it finds; `library` holds all that to limits, and `copy` believes no name: nothing is written but below the
target directory.

``systems`` knows what is on a disk by its first bytes: the library is only asked to read what it reads well (ext2 to
ext4, NTFS, FAT, exFAT). Nothing is repaired: what is in a journal only is not seen, and `systems` says so of an ext
file system that was in use. For everything else there is ``incbak export``, and a kernel that mounts it.
"""

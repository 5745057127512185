"""From a backup to a disk again: needs the repository, no VM, no server.

`targets` are what can be written to; `restore` walks the tree of a disk, verifies every cluster, and writes it. What is
done is done whole: a file has its name only when all of it is there and synced; a device or an export that was written
to in part is said to be so, loudly. `vm` makes a directory of a whole VM.
"""

"""A drill: try a restore before the day on which it is needed, and write down how it went.

1. **Data** (`data`). The disk is restored by the code that every restore runs, into a target that keeps nothing: it
   hashes what it is given, makes a tree of that, and compares the root with the record's. So content, place and length
   of every cluster are proved, and all that was not written must be zeroes. A sample compares clusters that a seed
   draws.
2. **File systems** (`fsck`). On the way, each partition (`partitions`: GPT, MBR, or a bare disk) whose file system has
   a tool here goes into a sparse file without a name, and the tool looks at that. A disk that was in use when it was
   backed up is like one after a power cut, and what a boot mends by itself is no damage:

   ========  ======================================  ==================================================================
   ext2-4    ``e2fsck -p``, then ``e2fsck -fn``      the journal is replayed first, on the copy; then nothing may be
                                                     wrong
   FAT       ``fsck.fat -n``                         "in use" and the count of free clusters are cleared on the copy
   NTFS      ``ntfsfix -n``, else ``ntfsfix`` first  its journal can only be emptied here; what is left must be sound
   ========  ======================================  ==================================================================

   Anything else is named and not looked at, and so is what a tool is missing for, or room.
3. **Boot** (`boot`), if it is asked for: QEMU on an export with an overlay, as ``incbak export --writable``, without a
   network, until the guest gives a sign of life on its serial console. What it writes is forgotten.

What a guest left on its disk is hostile: tools and QEMU are nobody when we are root, and QEMU can start no program.
They end when we do. A drill is good when no step found anything wrong. It is written into the repository
(`incbak.repo.drills`), good or bad; damage is noted there too, so that the next backup stores it again.
"""

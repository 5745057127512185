"""The repository: immutable files in a directory, from which every backup can be restored on its own.

::

    config          version, repository id, cluster size, and their digest; written last by ``init``   `repository`
    packs/ID        stored clusters and tree pages, then a table of them; named after that table       `pack`, `blob`
    index/ID        where each blob lies: what the tables say, merged and sorted                       `index`, `merge`
    backups/ID      one record per backup: the disks and the roots of their trees                      `record`
    damaged/ID      what checks have found damaged                                                     `damage`
    pins/ID         empty: the backup of that id is never pruned                                       `pins`
    condemned/ID    packs that nothing needs, and since when; they go when the grace is over            `condemned`
    verified/ID     when each pack was last read whole; a check goes on from there                      `verified`
    needs/ID        what the backups need, as the last prune counted it; it may be gone at any time     `needs`
    drills/ID       how the last drills of each VM went                                                 `drills`
    keys/ID         of an encrypted repository: its master key, wrapped by a passphrase                `keys`
    locks/NAME      empty files to lock                                                                `storage`

A record names roots; a root is the digest of a page (`tree`); pages name pages and clusters by digest; the index says
in which pack a digest lies. Every file but the locks is written once, whole, under its final name, and never changed.

**The write order, and why it is the proof that a listed backup can be restored** (`writer`)

1. packs: content under a temporary name, ``fsync``, the name, ``fsync`` of the folder;
2. the index file that names these packs, the same way;
3. the locks are looked at again: they are still the files that were locked;
4. the record, the same way.

A step begins when the one before is durable. So a name that is visible after any crash or power cut stands for content
that is whole, and all that it refers to was durable before it: a record implies its index files, these imply their
packs. Killed before 4, there is no backup, and what was written is orphaned: the next run that needs the content finds
it in the index and uses it. Content is deduplicated only against durable packs that the index names, that are there
with the size that they should have, and that no check has found damaged; or against what the same run stored. The
first write that fails is final for its run: a writer that failed once commits nothing.

**Readers go the other way**: records are listed first, then the index, then the packs. What is referred to is older
than what refers to it, so a reader finds all that it was told of. Every blob is checked against its digest when it is
read, and every copy is tried before it is called damaged. Sizes, counts and names are held to limits first.

**Removing** is what `prune` does by the rules of `retention`, and `remove` by name, under the same locks; nothing else
takes away. A backup is gone when its record is. The packs of which nothing listed needs anything are condemned, at a
moment without a backup, and removed when the grace is over: packs, then what the index says of them, then the
condemnation. What is condemned is read from, and never built on.

**Encrypted repositories** have the same files in the same order. How content is named and stored is the *seal*'s
business (`seal`, `cipher`); every place that hashes or encodes asks it. What a host remembers of a repository, to
notice that it was put back or replaced, is in `memory`.

**Which operation beside which**, in any number of processes of one host. A sync (`incbak.sync`) reads its
source; in its target it is a backup, with the same locks.

==============  ==============  ==============  ==============  ==============  ==============
..              backup          restore, read   check           rebuild-index   prune
==============  ==============  ==============  ==============  ==============  ==============
backup          yes (1, 2)      yes (3)         yes (4)         no (5)          yes (7)
restore, read   yes (3)         yes             yes             yes (6)         yes (8)
check           yes (4)         yes             yes (4)         with care (6)   yes (9)
rebuild-index   no (5)          yes (6)         with care (6)   no (5)          no (5)
prune           yes (7)         yes (8)         yes (9)         no (5)          no (10)
==============  ==============  ==============  ==============  ==============  ==============

1. Of two VMs: nothing is shared but immutable files with random names. Both may store the same content: stored twice,
   harmless. Of one VM: ``vm-NAME.lock``, held exclusively, lets in one run; the kernel frees it when the process dies,
   and age never does.
2. Two backups may merge small index files at once (`merge`): old files go only when the merged one is durable, so the
   same blobs may be in two files, never in none. A run's own new file is not touched by a merge that listed before it.
   ``index.lock`` makes the second one leave it.
3. A backup adds files, and removes index files only as in 2; a reader has these open, or finds them gone, and lists
   again. Packs and records are never removed by a backup.
4. A check lists the records before it reads the index, so a backup that is committed meanwhile is not part of it.
   Its notes only make later backups store more, and a note is durable before an older one goes.
5. ``repository.lock``: a backup and a prune hold it shared, a rebuild must hold it exclusively. A rebuild that ran
   beside a backup could remove the index file that the backup has just written.
6. The new index is durable before the old files go. A reader that opens the index in between has both. A check that
   looks at a single old file in this moment finds it gone and passes it over.
7. ``content.lock``: a backup holds it shared from before it looks at anything until after its commit; packs are
   condemned while a prune holds it exclusively, for milliseconds, and all listed backups are counted. So what a backup
   has found there and builds on cannot be condemned before it has committed or died, and then it is counted, or
   nobody's. What is condemned already it does not build on; its base, too, was counted, or made by such a run. A prune
   never queues for the lock, and a backup waits some seconds for it, so neither holds up the other; the prune gives up
   instead (exit 11).
   Its base may be removed while it runs: it has its own tree, and shares content, not records. The next incremental of
   a disk whose bitmap counts from a backup that was pruned reads everything (``base-missing``), and the run's cleanup
   removes the bitmap, as any that no backup stands for.
8. Of a backup that stays: content that was copied elsewhere was durable and indexed there before the old pack was
   condemned; a reader that misses it reads the index again. Of a backup that was removed: all of it is there until the
   grace is over; later a read fails, as every blob is verified: never wrong data.
9. A pack that is gone is no loss where it is condemned, or where the index, read again, does not name it; nor is a
   backup damaged whose record is gone by then.
10. ``prune.lock``: one at a time. A pin is set under ``pins.lock``, which a prune holds while it looks at pins a last
   time and removes records: a pinned backup stays, whenever it was pinned.
"""

"""Copying backups to another repository: a second place, perhaps with another passphrase, or with none.

`plan` decides, purely, which backups are copied: those that the source made after the last one that the target has of
it, and those before it that could not be copied then: the next one that was copied says which these are
(`Origin.missed`), and a sync tries them again until they are copied or the source has them no more. One that comes late
stands in the target where it stands in the source: it takes the number of its successor, and stands before that
(`record.order`). So what was pruned from the target does not come back, and the target's own sequence, by which
retention counts and "latest" goes, is that of the source. `copy` copies one backup after the other, oldest first.

A copy keeps the backup's id and says where it came from (`Origin`). All that differs from the backup that the target
has already is read from the source, verified, and stored under the name that the target's seal gives it: the same
digest where neither repository is encrypted (then blobs are copied as they are stored, and the root must be the same in
the end), another one else (then content is opened and closed again). What did not change is not read.

The order is that of a backup (`incbak.repo.writer`): content, index, record. Killed anywhere, the backup that was being
copied does not exist in the target, and the next sync goes on with it. The source is only read; a prune there may run
beside. A backup of which something is damaged in the source is passed over, loudly.
"""

"""Any backup as an NBD export, at once: nothing is restored first, content is fetched and verified as it is asked for.

`image` is a disk of a backup, read-only; `overlay` lays writes over it that are thrown away in the end; `server` runs
them behind an NBD server. Needs the repository and no root: boot a VM from it, mount it, copy a part of it.
"""

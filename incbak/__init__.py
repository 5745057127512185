"""Incremental backups of virtual machine disks that survive crashes.

Threat model
============

incbak runs as root or as the user of the VMs, and speaks with programs that may be broken or in hostile hands. What
is promised against each, and what is not. Everywhere: what a peer sends has a form and limits before it is used, each
wait has a deadline and each walk a bound, memory is taken for what was received and not for what was announced, and a
name that a peer chose is one line of printable characters before it reaches a terminal, a table or a log.

**The guest** chooses the content of its disks. It cannot make incbak read or write any other file of the host, nor
change what the disk is taken for: the format of a disk is never decided by its content. It can reset itself, panic
and write as fast as it likes: watch and backups go on in bounded memory, and old content that has no room breaks the
backup, not the guest. Not promised: that a backup is worth restoring; what a guest has ruined is backed up ruined. A
guest that writes much makes large backups.

**The guest's agent** is the guest. Whatever it sends, or does not, is at most a reason why the guest was not frozen;
the backup is made and says so. Not promised: that the guest froze when its agent says so.

**The QEMU process** may be in its guest's hands. Each answer is decoded into the form written down for its command
(`incbak.engine.qmp_types`); a block graph with a cycle is an error, a job that stands still or trickles is given up,
events are kept up to a bound. A path that it names is opened only if it is a regular file or a block device, for
reading, and nothing of it reaches the repository. It can fail its own VM's backups, not those of others. Not
promised: that the content which it sends is that of the disk, or that a bitmap of its is true; ``--audit`` finds lies
only where incbak keeps the bitmaps. Until a deadline ends the run, it can hold that VM's lock in the repository.

**NBD clients** of ``serve`` and ``export``. Their handshake is bounded in time, options and bytes, and nothing is
opened before it ends. Clients on the network take no slots of local ones; a silent client gives way to a new one;
payloads of refused writes take no memory, and half-sent ones have a bound (`incbak.nbd.slots`). A read-only export is
never written. Not promised: anything against who may write to an export; secrecy on TCP without ``--tls-certs``; that
the network is not filled.

**NBD servers** (restore targets). Sizes, replies, offsets and lengths are checked, answers have deadlines. Not
promised: that a server kept what it acknowledged.

**Who can write to a plain repository** can change and invent backups: content is addressed by its digest, which
proves that it is not damaged by accident, and nothing about who wrote it. Reading such a repository runs nothing,
writes nowhere but to the target that was named, and ends in bounded memory. Not promised: that the backups are yours.

**Who can write to an encrypted repository**, without the passphrase, can neither read content nor change or invent a
backup without being noticed; sizes, times of access and the number of things are visible. They can remove things, or
put an older copy of the whole in place: a host that has used the repository before notices that its newest backup is
gone or that encryption is (`incbak.repo.memory`). Not promised: that a fresh host notices, or that removed data is
back.

**Other local users** see nothing: files and directories that incbak makes are the user's alone under any umask,
except a metrics file and what is restored into a directory of theirs. Sockets are private before anybody can connect,
and unless incbak runs as root, a monitor of another user is not used. Configuration that names commands
must not be writable by others. Not promised: that they cannot guess from the load that a backup runs.

**Other hosts** that share storage or a repository. Locks of a repository hold on one host only. A disk that another
host writes to cannot be told from here; what is known of it (its time of change, its counters) is compared, and
unknown is not taken for unchanged. Not promised: backups of a disk that two hosts write to.

**Root on this host**, the kernel, and drives that lie about a flush are trusted.
"""

__version__ = "0.1.0"

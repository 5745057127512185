"""Disks: the bytes of an image, whatever holds them.

`base` is the contract, `file` a raw file or block device through the page cache, `memory` one for tests and scratch,
`faults` a wrapper that fails or stalls when told to, `locks` the image locks. ``tests/contract`` runs one suite on all.

What can be relied on: a read is never short, and an image that ends early is an error, never zeroes (faults row 29);
any offset and length will do; the size of a raw file is that of QEMU's disk, the next multiple of 512 bytes, and the
rest of its last sector reads as zeroes; data is never told as zero; the first
failed flush is final, for those that wait for it too (row 31); a fingerprint differs after any change of time, inode or
size, and after a change of the sampled blocks. An open image holds the locks that QEMU would hold, so that QEMU and
incbak refuse to open one image for writing twice, and readers share it (row 82).
"""

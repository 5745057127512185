"""Incremental backups of virtual machine disks that a crash does not spoil."""

__version__ = "0.1.0"

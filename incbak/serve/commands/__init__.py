"""The QMP commands, one function each, by topic. Importing this package registers them all.

Names, arguments, defaults and error texts are QEMU 7.2's; what is ours has the prefix ``x-incbak-``.
"""

from incbak.serve.commands import backup, bitmaps, block, credentials, exports, jobs, machine, points
from incbak.serve.commands.registry import COMMANDS, execute

__all__ = ["COMMANDS", "backup", "bitmaps", "block", "credentials", "execute", "exports", "jobs", "machine", "points"]

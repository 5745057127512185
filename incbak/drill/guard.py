"""Runs a program, and kills it when its own stdin ends: so QEMU ends with us, however we end.

``python guard.py PROGRAM ARGUMENT ...``, by path: it imports nothing of ours. The kernel's own way (PR_SET_PDEATHSIG)
is forgotten when the program gives up root's rights.
"""

from __future__ import annotations

import os
import select
import subprocess
import sys


def main() -> int:
    """The program's exit code, or 137."""
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    ended = os.pidfd_open(child.pid)
    ready, _, _ = select.select([ended, sys.stdin], [], [])
    if ended not in ready:
        child.kill()
    code = child.wait()
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())

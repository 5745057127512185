"""The entry point: what must be in order before anything else is imported.

Imports take some tenths of a second, and an interrupt within them would be a traceback in the midst of somebody else's
code. Nothing has been done by then, so Ctrl-C ends the process at once until a command begins. Nothing but the console
script and ``python -m incbak`` import this module.
"""

from __future__ import annotations

import resource
from contextlib import suppress

from incbak.cli.interrupts import until_begun

until_begun()


_MOST_FILES = 1 << 16


def main() -> None:
    """Run the command line. Always raises `SystemExit`."""
    _allow_files()
    from incbak.cli.main import main as run

    run()


def _allow_files() -> None:
    """Raise the limit of open files as far as may be: an index has a file for each million clusters or so."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))

"""The entry point: what must be in order before anything else is imported.

Imports take some tenths of a second, and an interrupt within them would be a traceback in the midst of somebody else's
code. Nothing has been done by then, so Ctrl-C ends the process at once until a command begins. Nothing but the console
script imports this module.
"""

from __future__ import annotations

from incbak.cli.interrupts import until_begun

until_begun()


def main() -> None:
    """Run the command line. Always raises `SystemExit`."""
    from incbak.cli.main import main as run

    run()

"""What all tests have in common."""

from __future__ import annotations

import signal

# A shell that starts pytest in the background tells it to ignore SIGINT, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

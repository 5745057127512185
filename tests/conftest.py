"""What all tests have in common."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.kit.cli import Incbak

# A shell that starts pytest in the background tells it to ignore SIGINT, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# ``nohup pytest`` ignores SIGHUP, and so would the children whose handling of SIGHUP is tested.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def incbak(tmp_path: Path) -> Incbak:
    """The command, with an empty repository."""
    made = Incbak(tmp_path)
    made("init")
    return made


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the part of the tests that ``INCBAK_TEST_PART`` names (``parallel`` or ``alone``); else all of them.

    Not by ``-m``, of which pytest heeds only the last: that is the user's.
    """
    part = os.environ.pop("INCBAK_TEST_PART", None)  # what the tests start runs what it is told
    if not part:
        return
    left_out = [item for item in items if ("alone" in item.keywords) != (part == "alone")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)

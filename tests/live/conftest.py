"""What tests of live VMs have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from tests.kit.guest import need_guest


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Ends the VMs of a test."""
    need_guest()
    with ExitStack() as made:
        yield made

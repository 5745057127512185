"""What the tests of repositories have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from incbak import durable


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    durable.arm()

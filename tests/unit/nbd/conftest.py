"""Fixtures for the NBD tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.unit.nbd.peers import DiskExport, Raw, served


@pytest.fixture
def export() -> DiskExport:
    return DiskExport()


@pytest.fixture
def connect(export: DiskExport) -> Iterator[Callable[[], Raw]]:
    """Connects a client by hand to a server of ``export``."""
    with served(export) as (_server, connect):
        yield connect


@pytest.fixture
def raw(connect: Callable[[], Raw]) -> Raw:
    """One such client, before the handshake."""
    return connect()

"""Fixtures for the bitmap tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from incbak import durable
from incbak.bitmap import body
from tests.unit.bitmap.scene import Scene


@pytest.fixture(params=[True, False], ids=["mapped", "written"])
def scene(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    """In memory where that is possible: what a sync does is watched, not waited for. With both kinds of `Body`."""
    monkeypatch.setattr(body, "shows_writes", lambda fd: request.param)
    with _scene(monkeypatch) as made:
        yield made


@contextmanager
def _scene(monkeypatch: pytest.MonkeyPatch) -> Iterator[Scene]:
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as directory:
        made = Scene(Path(directory), monkeypatch)
        yield made
        made.store.unlock()


@pytest.fixture(autouse=True)
def _disarm() -> Iterator[None]:
    yield
    durable.arm()

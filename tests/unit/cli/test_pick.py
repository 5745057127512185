"""``--bitmap NAME``: a whole name, or a part that one bitmap only has."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from incbak.bitmap.store import BitmapStore
from incbak.cli.bitmap import _pick
from incbak.cli.settings import Settings
from incbak.errors import UsageError
from incbak.fingerprint import Fingerprint, take_path

NAMES = ("incbak-11112222-33334444", "incbak-11112222-33335555", "incbak-1")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "a.raw").write_bytes(bytes(1 << 20))
    found: Fingerprint = take_path(tmp_path / "a.raw", raw=True)
    for disk in ("vda", "vdb"):
        store = BitmapStore(tmp_path / "state", "vm", disk)
        store.lock()
        for name in NAMES:
            store.create(name, 1 << 20, 65536, found).close(found)
        store.unlock()
    return tmp_path / "state"


@pytest.mark.parametrize(
    ("disk", "part", "found"),
    [
        ("vda", "5555", NAMES[1]),
        ("vda", NAMES[0], NAMES[0]),
        ("vdb", "incbak-1", NAMES[2]),  # a whole name, and part of the others
        ("vda", "3333", "several bitmaps"),
        ("vda", "9", "no such bitmap"),
        ("vdc", "5555", "no such bitmap"),
        (None, "5555", "several disks"),
        ("vdc", None, "no such bitmap"),
    ],
)
def test_a_part_of_a_name(state: Path, disk: str | None, part: str | None, found: str) -> None:
    with click.Context(click.Command("x"), obj=Settings(state=state)):
        if found in NAMES:
            picked = _pick("vm", disk, part)
            assert (picked.disk, picked.name) == (disk, found)
        else:
            with pytest.raises(UsageError, match=found):
                _pick("vm", disk, part)
